"""The engine under test, in a process of its own: ``python -m fuzz.subject``; see ``second``."""

import mmap
import os
import pickle
import sys

from fuzz.machine import CODE, RAM_BYTES, Outcome, changed_pages, image, registers_of

from kvmsim.engine.base import BusLock, Debug, Hlt, InKernel, InternalError, Io, Mmio, Shutdown
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.memory import Slot
from kvmsim.engine.x86.policy import PlainPolicy

SLICE_BYTES = 20_000
#: x87 and vector registers.
FPU = slice(608, 4768)
KINDS = {
    Hlt: "hlt",
    Io: "io",
    Mmio: "mmio",
    InKernel: "limit",
    Shutdown: "shutdown",
    InternalError: "error",
    Debug: "debug",
}


class Subject:
    """One VM that serves guest after guest."""

    def __init__(self):
        from kvmsim.engine.x86.vm import X86Vm

        self.ram = mmap.mmap(-1, RAM_BYTES)
        self.vm = X86Vm([Slot(0, memoryview(self.ram))], PlainPolicy(), slice_bytes=SLICE_BYTES)
        self.cpu = self.vm.add_cpu()
        self.blank = bytes(self.cpu.registers.env)

    def run(self, case):
        # Guests that were left spinning end here: memory is another from now on.
        self.vm.withdraw(self.cpu)
        before = bytes(image(case))
        self.ram[:] = before
        self._load(case)
        stop = self.vm.run(self.cpu)
        while isinstance(stop, BusLock):
            stop = self.vm.run(self.cpu)
        detail = f"{stop.gpa:#x}" if isinstance(stop, Mmio) else ""
        detail = repr(stop) if isinstance(stop, InternalError) else detail
        registers = self.cpu.registers
        segments = [registers.segment(number) for number in range(6)]
        return Outcome(
            KINDS[type(stop)],
            detail,
            registers.rip,
            list(registers.q[:16]),
            registers.flags,
            [(s.selector, s.base, s.limit, s.rights) for s in segments],
            [registers.cr0, registers.cr2, registers.cr3, registers.cr4],
            changed_pages(before, self.ram),
        )

    def _load(self, case):
        cpu = self.cpu
        cpu.abandon()
        cpu.events.clear()
        # The guest before may have been left with a trap due.
        cpu.traps, cpu.creeps, cpu.cautious, cpu.admitted = 0, 0, False, -1
        cpu.reset()
        cpu.registers.env[FPU] = self.blank[FPU]
        registers = cpu.registers
        segments, control, efer, tables = registers_of(case)
        registers.efer = efer
        registers.cr4, registers.cr3, registers.cr2 = control[3], control[2], control[1]
        registers.cr0 = control[0]
        for number, values in enumerate(segments):
            registers.set_segment(number, r.Segment(*values))
        for number, (base, limit) in zip((r.GDTR, r.IDTR), tables, strict=True):
            registers.set_segment(number, r.Segment(0, base, limit))
        for number, value in enumerate(case.general):
            registers.q[number] = value
        registers.rip, registers.flags = CODE, case.flags
        cpu.changed()


def serve():
    """Answer cases until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    subject = Subject()
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(subject.run(case), answers)
        answers.flush()


if __name__ == "__main__":
    serve()
