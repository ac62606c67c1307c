"""Times one loop of loops64.S in a process of its own: python loops.py ENGINE ROM.

ENGINE is `real` (the engine as `kvmsim run` has it: time passes by itself), `counted` (guest time
is counted), `records` (last branches are recorded besides) or `plain` (Unicorn as it comes, with
no callback at all). Prints the seconds between the guest's two letters.
"""

import mmap
import sys
import time
from pathlib import Path

from kvmsim.engine.base import Io
from kvmsim.engine.x86 import native
from kvmsim.engine.x86.backend import Unicorn
from kvmsim.engine.x86.cpu import Cpu
from kvmsim.engine.x86.lbr import LastBranches
from kvmsim.engine.x86.memory import Slot
from kvmsim.engine.x86.policy import PlainPolicy
from kvmsim.engine.x86.vm import X86Vm

RAM_BYTES = 4 << 20
ROMS = (0xF0000, 0xFFFF0000)
SERIAL = 0x3F8


def main() -> None:
    """Boots the ROM to its first letter and times the way to the second."""
    engine, path = sys.argv[1:]
    if engine == "plain":
        vars(native)["process"] = lambda _path: None  # the library stays as it is
    slots = _memory(Path(path).read_bytes())
    vm = X86Vm(slots, PlainPolicy(), paced=engine == "counted", slice_bytes=1 << 60)
    cpu = vm.add_cpu()
    _to_letter(vm, cpu)
    cpu.complete()
    if engine == "plain":
        print(_plain(cpu, slots))
        return
    if engine == "records":
        cpu.lbr = LastBranches(32)
        cpu.lbr.enabled = True
    start = time.perf_counter()
    _to_letter(vm, cpu)
    print(time.perf_counter() - start)


def _memory(rom: bytes) -> list[Slot]:
    ram, image = mmap.mmap(-1, RAM_BYTES), mmap.mmap(-1, len(rom))
    image[:] = rom
    low, high = ROMS
    below = Slot(0, memoryview(ram)[:low])
    above = Slot(low + len(rom), memoryview(ram)[low + len(rom) :])
    roms = [Slot(base, memoryview(image), read_only=True) for base in (low, high)]
    return [below, above, *roms]


def _to_letter(vm: X86Vm, cpu: Cpu) -> None:
    stop = vm.run(cpu)
    if not isinstance(stop, Io) or stop.port != SERIAL:
        sys.exit(f"unexpected: {stop}")


def _plain(cpu: Cpu, slots: list[Slot]) -> float:
    """Seconds that an instance without callbacks takes; it ends at the HLT behind the letter."""
    unicorn = Unicorn()
    for slot in slots:
        unicorn.map(slot.gpa, len(slot.memory), slot.address, writable=not slot.read_only)
    unicorn.env[:] = cpu.registers.env
    unicorn.flush_tlb()
    start = time.perf_counter()
    unicorn.start(cpu.registers.rip)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
