"""Accesses to guest-physical memory that is not there: out to user space and back in.

The emulator has no way to wait in the middle of an instruction. An access stops the guest with the
instruction undone; when user space has answered, the pages concerned are filled with the answers
for the time of one single step. What the instruction then writes goes out as further stops; what it
reads besides takes it back to its beginning, and out once more.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from kvmsim.engine.base import InKernel, InternalError, Mmio
from kvmsim.engine.x86 import decode, exits, sites, stepping
from kvmsim.engine.x86.backend import ACCESS_FETCHES, ACCESS_READ, ACCESS_WRITES
from kvmsim.engine.x86.memory import Slot
from kvmsim.engine.x86.watch import Why

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.vm import X86Vm

PAGE = 4096
EMULATION_FAILED = 1
_MAX_BYTES = 8
_MAX_WORD = 4  # of the emulator's callbacks
_PREFIXES = frozenset(bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3"))


class Answers:
    """What user space has said about one instruction's accesses.

    Attributes:
        read: bytes it answered, by address.
        written: bytes it took, by address.
        pages: where those are.
        words: where the emulator begins to read, one after the other, when it makes these accesses.
        last: address and bytes of the latest read.
        rest: bytes of it that are in the next page, wherever that is.
    """

    def __init__(self) -> None:
        self.read: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.pages: set[int] = set()
        self.words: list[int] = []
        self.last = (0, 0)
        self.rest = 0

    def part(self, gpa: int, size: int, begins: int) -> tuple[int, int]:
        """What user space is to be asked for of a read: KVM asks page by page.

        Args:
            gpa: address, as the emulator has it: of the operand, or of an aligned word around it.
            size: bytes.
            begins: where in its page the operand begins, if it goes on in the next; else 0.
        """
        words = _words(gpa, size)
        before = PAGE - gpa % PAGE
        self.last = gpa, size
        if size > before:
            self.rest = size - before
            words = [word for word in words if word < gpa + before]
            size = before
        elif self.rest and gpa % PAGE == 0:
            size, self.rest = self.rest, 0
        elif begins:
            # The rest of the words the emulator reads is never looked at.
            self.read.update(dict.fromkeys(range(gpa, gpa + size), 0))
            gpa, size = _own_part(begins, gpa, size)
        self.words += words
        return gpa, size


def stopped(vm: X86Vm, cpu: Cpu, answers: Answers | None = None) -> Stop:
    """The emulator met memory that is not there; the stop for user space."""
    assert vm.watch.access is not None
    kind, gpa, size, value = vm.watch.access
    vm.watch.access = None
    if kind in ACCESS_FETCHES:
        return InternalError(suberror=EMULATION_FAILED)
    if answers is None and _is_beyond_kvm(vm, cpu):
        return exits.emulation_failed(vm, cpu)
    size = min(size, _MAX_BYTES)
    answers = answers or Answers()
    write = kind in ACCESS_WRITES
    begins = _crossing(vm, cpu, size)
    if begins and write and gpa & -PAGE not in answers.pages:
        return _write_both(vm, cpu, gpa, answers)
    if not write:
        gpa, size = answers.part(gpa, size, begins)
    data = (value & (1 << 8 * size) - 1).to_bytes(size, "little") if write else b""

    def took(answer: bytes) -> None:
        for at in range(size):
            if write:
                answers.written[gpa + at] = data[at]
            else:
                answers.read[gpa + at] = answer[at] if at < len(answer) else 0xFF
            answers.pages.add((gpa + at) & -PAGE)
        _finish(vm, cpu, answers)

    cpu.on_completion(took, executes=True)
    return Mmio(gpa=gpa, size=size, data=data)


def _crossing(vm: X86Vm, cpu: Cpu, size: int) -> int:
    """Where in its page an operand begins that goes on in the next page; 0 for others.

    The emulator reads aligned words on both sides of the boundary, and stores byte by byte.
    """
    registers = cpu.registers
    at = registers.linear_rip
    found = decode.decode(vm.watch.read_code(at, decode.MAX_LENGTH), 0, registers.mode)
    if found is None:
        return 0
    place = sites.operand_address(at, found, registers.mode, registers.q)
    width = max(size, found.bits // 8) if size == 1 else size
    begins = 0 if place is None else place % PAGE
    return begins if begins + width > PAGE else 0


def _words(gpa: int, size: int) -> list[int]:
    """Where the emulator reads for an access; for an unaligned one on both sides of a boundary."""
    whole = size if gpa % size == 0 else 2 * size
    return list(range(gpa & -size, (gpa & -size) + whole, min(size, _MAX_WORD)))


def _own_part(begins: int, gpa: int, size: int) -> tuple[int, int]:
    """The part of an aligned word that belongs to an operand across a boundary."""
    before = PAGE - begins
    if gpa % PAGE == 0 and size > before:
        return gpa, size - before
    if (gpa + size) % PAGE == 0 and size > before:
        return gpa + size - before, before
    return gpa, size


def _write_both(vm: X86Vm, cpu: Cpu, gpa: int, answers: Answers) -> Stop:
    """A store across a boundary: memory gets its part now, and user space hears of the other."""
    answers.pages.add(gpa & -PAGE)
    _finish(vm, cpu, answers)
    return cpu.stops.pop(0) if cpu.stops else InKernel()


def _is_beyond_kvm(vm: X86Vm, cpu: Cpu) -> bool:
    """Whether KVM's emulator does not know the instruction: x87 but for two stores of a word.

    Linux 6.12 arch/x86/kvm/emulate.c, the tables of D8 to DF.
    """
    code = vm.watch.read_code(cpu.registers.linear_rip, decode.MAX_LENGTH)
    at = 0
    rex = range(0x40, 0x50) if cpu.registers.mode == 64 else ()
    while at < len(code) - 2 and (code[at] in _PREFIXES or code[at] in rex):
        at += 1
    opcode, modrm = code[at : at + 2].ljust(2, b"\0")
    is_x87 = 0xD8 <= opcode <= 0xDF
    return is_x87 and not (opcode in {0xD9, 0xDD} and modrm >> 3 & 7 == 7)  # FNSTCW, FNSTSW


class _Step:
    """One attempt at an instruction with answers in place.

    Args:
        answers: the answers.
    """

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.words: list[int] = []
        self.writes: list[tuple[int, bytes]] = []
        self.missing: tuple[int, int] | None = None

    def read(self, page: int, offset: int, size: int) -> int:
        """The emulator reads; it may ask for aligned words around what the guest wants."""
        known = self.answers.read
        at = page + offset
        if at in self.answers.words[:1]:
            self.words = self.answers.words[:]
        if at in self.words[:1]:
            del self.words[0]
        elif self.missing is None and self._goes_on(at, size):
            self.missing = (sum(self.answers.last), _MAX_BYTES)
        elif self.missing is None and not any(at + n in known for n in range(size)):
            self.missing = (at, size)
        return int.from_bytes(bytes(known.get(at + n, 0) for n in range(size)), "little")

    def _goes_on(self, at: int, size: int) -> bool:
        """Whether a read is of the second half of 16 bytes, the first of which is known."""
        last, before = self.answers.last
        follows = at <= last + before < at + size
        return follows and before == _MAX_BYTES and size == _MAX_WORD and not self.words

    def write(self, page: int, offset: int, size: int, value: int) -> None:
        """The emulator writes: old news, or another access for user space."""
        data = value.to_bytes(_MAX_BYTES, "little")[:size]
        at = page + offset
        if all(at + n in self.answers.written for n in range(size)):
            return
        if self.writes:
            last, before = self.writes[-1]
            follows = last + len(before) == at and at % PAGE
            if follows and len(before) + size <= _MAX_BYTES:
                self.writes[-1] = (last, before + data)
                return
        self.writes.append((at, data))


def _finish(vm: X86Vm, cpu: Cpu, answers: Answers) -> None:
    """Try to execute the instruction with what is known; stops that come of it wait in the vCPU."""
    step = _Step(answers)
    before = bytes(vm.unicorn.env)
    scratch: list[Slot] = []
    for page in answers.pages:
        slot = vm.memory.find(page)
        if slot is None:
            vm.unicorn.map_mmio(page, *_callbacks(step, page))
        else:
            vm.unicorn.unmap(page, PAGE)
            scratch.append(_scratch(slot, page))
            vm.unicorn.map(page, PAGE, scratch[-1].address)
    vm.unicorn.flush_tlb()
    vm.meter.start(vm.slice_bytes)
    why = stepping.single(vm, cpu)
    for page in answers.pages:
        vm.unicorn.unmap(page, PAGE)
        slot = vm.memory.find(page)
        if slot is not None:
            vm.unicorn.map(page, PAGE, slot.address + page - slot.gpa, writable=False)
    vm.unicorn.flush_tlb()
    if step.missing is not None or vm.watch.access is not None:
        vm.unicorn.env[:] = before
        cpu.events.clear()
        if step.missing is not None:  # before the access to a page that is not there
            vm.watch.access = (ACCESS_READ, *step.missing, 0)
        cpu.stops.insert(0, stopped(vm, cpu, answers))
        return
    stop = None if why is Why.NOTHING else exits.handle(vm, cpu, why)
    if stop is not None:
        cpu.stops.append(stop)
    cpu.stops.extend(Mmio(gpa=gpa, size=len(data), data=data) for gpa, data in step.writes)


def _scratch(slot: Slot, page: int) -> Slot:
    """A copy of a page of read-only memory that takes the write user space was told of."""
    copy = mmap.mmap(-1, PAGE)
    copy[:] = slot.memory[page - slot.gpa : page - slot.gpa + PAGE]
    return Slot(page, memoryview(copy))


def _callbacks(
    step: _Step, page: int
) -> tuple[Callable[[int, int], int], Callable[[int, int, int], None]]:
    """The emulator's callbacks of one page."""
    return (
        lambda offset, size: step.read(page, offset, size),
        lambda offset, size, value: step.write(page, offset, size, value),
    )
