"""Exceptions and interrupts on their way into the guest: real, protected and long mode.

The emulator below stops at every exception and leaves the rest to its caller, which is this file:
vector tables, gates, rings, stacks. Source: Intel SDM volume 3, chapter 6. Task gates: ``task``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.memory import NoMemory
from kvmsim.engine.x86.paging import PageFault, translate

if TYPE_CHECKING:
    from kvmsim.engine.x86.memory import Memory
    from kvmsim.engine.x86.registers import Registers

DE, DB, NMI, BP, OF, UD, NM, DF, TS, NP, SS, GP, PF, AC = (
    *(0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 17),
)
WITH_CODE = frozenset({DF, TS, NP, SS, GP, PF, AC})
_CONTRIBUTORY = frozenset({DE, TS, NP, SS, GP})
PAGE = 4096

_TASK_GATE, _INTERRUPT_16, _TRAP_16, _INTERRUPT_32, _TRAP_32 = 5, 6, 7, 14, 15


class Fault(Exception):
    """An exception the guest is to get.

    Attributes:
        vector: which.
        code: error code; 0 for vectors without.
        address: what #PF puts into CR2; None otherwise.
    """

    def __init__(self, vector: int, code: int = 0, address: int | None = None) -> None:
        super().__init__(vector, code)
        self.vector = vector
        self.code = code
        self.address = address


class TripleFault(Exception):
    """An exception while #DF was delivered: the processor shuts down."""


class Unsupported(Exception):
    """The guest needs something that is not delivered here."""


@dataclass(frozen=True, slots=True)
class Event:
    """What is to be delivered. RIP is the address to return to already.

    Attributes:
        vector: which.
        code: error code, for exceptions that have one.
        software: raised by INT n, INT3 or INTO: gates check the privilege level.
        length: bytes of the instruction that raised a software interrupt.
        resumes: a #DB that is a fault: RF is set where the guest returns to.
        external: an interrupt or NMI: its faults say so in their error code.
    """

    vector: int
    code: int = 0
    software: bool = False
    external: bool = False
    length: int = 0
    resumes: bool = False

    @property
    def pushes_code(self) -> bool:
        """Whether the handler finds an error code on its stack."""
        return self.vector in WITH_CODE and not (self.software or self.external)


class Linear:
    """Guest memory by linear address, as the processor itself accesses it.

    Args:
        registers: whose address space.
        memory: the physical one.
        delivers: for an event, which needs memory everywhere: KVM gives up where there is none.
    """

    __slots__ = ("delivers", "memory", "registers")

    def __init__(self, registers: Registers, memory: Memory, *, delivers: bool = False) -> None:
        self.registers = registers
        self.memory = memory
        self.delivers = delivers

    def read(self, linear: int, size_bytes: int, *, user: bool = False) -> bytes:
        """Copy out; Fault #PF where not mapped. Holes read as ones."""
        data = b""
        while len(data) < size_bytes:
            at = linear + len(data)
            size = min(size_bytes - len(data), PAGE - at % PAGE)
            gpa = self._gpa(at, write=False, user=user)
            try:
                data += self.memory.read(gpa, size)
            except NoMemory:
                self._miss(gpa)
                data += b"\xff" * size
        return data

    def write(self, linear: int, data: bytes, *, user: bool = False) -> None:
        """Copy in, all or nothing; Fault #PF where not mapped. Writes to holes are dropped."""
        pieces = []
        done = 0
        while done < len(data):
            at = linear + done
            size = min(len(data) - done, PAGE - at % PAGE)
            pieces.append((self._gpa(at, write=True, user=user), data[done : done + size]))
            done += size
        for gpa, piece in pieces:
            try:
                self.memory.write(gpa, piece)
            except NoMemory:
                self._miss(gpa)

    def _miss(self, gpa: int) -> None:
        if self.delivers:
            msg = f"an event goes by way of {gpa:#x}, where there is no memory"
            raise Unsupported(msg)

    def word(self, linear: int, size_bytes: int) -> int:
        """A little-endian number, read with the rights of the system."""
        return int.from_bytes(self.read(linear, size_bytes), "little")

    def _gpa(self, linear: int, *, write: bool, user: bool) -> int:
        linear &= r.U64 if self.registers.long_mode else r.U32
        try:
            return translate(self.registers, self.memory, linear, write=write, user=user).gpa
        except PageFault as fault:
            raise Fault(PF, fault.code, fault.address) from None


def inject(registers: Registers, memory: Memory, event: Event) -> None:
    """Deliver an event and what comes of it: a second fault, #DF, the end.

    Raises:
        TripleFault: a fault during #DF.
        Unsupported: a gate to a 16-bit task, or no memory where a table or the stack should be.
    """
    linear = Linear(registers, memory, delivers=True)
    while True:
        try:
            _deliver(registers, linear, event)
        except Fault as fault:
            # A fault of INT n is one of the instruction: that is where the guest returns to.
            registers.rip -= event.length
            event = _after(event, fault)
            if fault.address is not None:
                registers.cr2 = fault.address
        else:
            return


def _after(event: Event, fault: Fault) -> Event:
    """What is delivered when delivery of an event faulted (SDM table 6-5)."""
    first, second = event.vector, fault.vector
    if event.software or event.external:
        return Event(second, fault.code)
    if first == DF:
        raise TripleFault
    page_fault_then = first == PF and (second == PF or second in _CONTRIBUTORY)
    if page_fault_then or (first in _CONTRIBUTORY and second in _CONTRIBUTORY):
        return Event(DF)
    return Event(second, fault.code)


def _deliver(registers: Registers, linear: Linear, event: Event) -> None:
    if registers.long_mode:
        _deliver_long(registers, linear, event)
    elif registers.cr0 & 1:
        _deliver_protected(registers, linear, event)
    else:
        _deliver_real(registers, linear, event)
    registers.shadow = False


# -- real mode ---------------------------------------------------------------------------------


def _deliver_real(registers: Registers, linear: Linear, event: Event) -> None:
    table = registers.segment(r.IDTR)
    at = event.vector * 4
    if at + 3 > table.limit:
        raise Fault(GP)
    target = linear.word(table.base + at, 4)
    old_flags = registers.flags
    stack = registers.segment(r.SS)
    frame = b"".join(
        value.to_bytes(2, "little")
        for value in (
            registers.rip & 0xFFFF,
            registers.segment(r.CS).selector,
            old_flags & 0xFFFF,
        )
    )
    pointer = (registers.q[r.RSP] - 6) & 0xFFFF
    linear.write(stack.base + pointer, frame)
    registers.q[r.RSP] = (registers.q[r.RSP] & ~0xFFFF) | pointer
    registers.flags = old_flags & ~(r.FLAG_IF | r.FLAG_TF | r.FLAG_AC | r.FLAG_RF)
    selector = target >> 16
    old = registers.segment(r.CS)
    registers.set_segment(r.CS, replace(old, selector=selector, base=selector << 4))
    registers.rip = target & 0xFFFF


# -- protected and long mode ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gate:
    selector: int
    offset: int
    kind: int
    ist: int


def _gate(registers: Registers, linear: Linear, event: Event, size_bytes: int) -> _Gate:
    table = registers.segment(r.IDTR)
    extern = 0 if event.software else 1
    reference = event.vector * 8 | 2 | extern
    if event.vector * size_bytes + size_bytes - 1 > table.limit:
        raise Fault(GP, reference)
    words = linear.read(table.base + event.vector * size_bytes, size_bytes)
    low, high = (int.from_bytes(words[at : at + 4], "little") for at in (0, 4))
    kind, dpl = high >> 8 & 0x1F, high >> 13 & 3
    offset = (low & 0xFFFF) | (high & 0xFFFF_0000)
    if size_bytes == 16:
        allowed = {_INTERRUPT_32, _TRAP_32}
        offset |= int.from_bytes(words[8:12], "little") << 32
    else:
        allowed = {_TASK_GATE, _INTERRUPT_16, _TRAP_16, _INTERRUPT_32, _TRAP_32}
    if kind not in allowed or (event.software and dpl < registers.cpl):
        raise Fault(GP, reference)
    if not high & r.RIGHTS_P:
        raise Fault(NP, reference)
    if kind in {_INTERRUPT_16, _TRAP_16}:
        offset &= 0xFFFF
    return _Gate(low >> 16, offset, kind, high & 7 if size_bytes == 16 else 0)


def descriptor(
    registers: Registers, linear: Linear, selector: int, vector: int = GP, extern: int = 0
) -> tuple[r.Segment, int]:
    """Read a segment descriptor: the segment, and where the descriptor is.

    Raises:
        Fault: of the vector, it is beyond its table.
    """
    table = registers.segment(r.LDTR if selector & 4 else r.GDTR)
    if (selector & ~7) + 7 > table.limit:
        raise Fault(vector, (selector & ~3) | extern)
    at = table.base + (selector & ~7)
    low, high = linear.word(at, 4), linear.word(at + 4, 4)
    base = (low >> 16) | (high & 0xFF) << 16 | high & 0xFF00_0000
    limit = (low & 0xFFFF) | high & 0xF_0000
    if high & r.RIGHTS_G:
        limit = limit << 12 | 0xFFF
    return r.Segment(selector, base, limit, high), at


def _code_segment(
    registers: Registers, linear: Linear, selector: int, extern: int
) -> tuple[r.Segment, int]:
    """The handler's code segment, marked as accessed, and its privilege level."""
    if not selector & ~3:
        raise Fault(GP, extern)
    segment, at = descriptor(registers, linear, selector, GP, extern)
    reference = (selector & ~3) | extern
    code = segment.rights & (r.RIGHTS_S | 1 << 11) == r.RIGHTS_S | 1 << 11
    wide = segment.rights & (r.RIGHTS_L | r.RIGHTS_DB) == r.RIGHTS_L
    if not code or segment.dpl > registers.cpl or (registers.long_mode and not wide):
        raise Fault(GP, reference)
    if not segment.rights & r.RIGHTS_P:
        raise Fault(NP, reference)
    if not segment.rights & 1 << 8:
        segment = replace(segment, rights=segment.rights | 1 << 8)
        linear.write(at + 5, bytes([segment.rights >> 8 & 0xFF]))
    conforming = bool(segment.rights & 1 << 10)
    level = registers.cpl if conforming else segment.dpl
    return replace(segment, selector=selector & ~3 | level), level


def _entered_flags(registers: Registers, kind: int) -> int:
    cleared = r.FLAG_TF | r.FLAG_NT | r.FLAG_RF | r.FLAG_VM
    if kind in {_INTERRUPT_16, _INTERRUPT_32}:
        cleared |= r.FLAG_IF
    return registers.flags & ~cleared


def _pushed_flags(registers: Registers, event: Event) -> int:
    """Faults push RF set, so that a breakpoint on the instruction does not hit again."""
    trap = event.software or event.external or event.vector in {DB, BP, OF, DF}
    return registers.flags | (0 if trap and not event.resumes else r.FLAG_RF)


def _deliver_long(registers: Registers, linear: Linear, event: Event) -> None:
    gate = _gate(registers, linear, event, 16)
    extern = 0 if event.software else 1
    old_stack = registers.segment(r.SS)
    code, level = _code_segment(registers, linear, gate.selector, extern)
    old_pointer = pointer = registers.q[r.RSP]
    if gate.ist or level < registers.cpl:
        task = registers.segment(r.TR)
        field = 36 + 8 * (gate.ist - 1) if gate.ist else 4 + 8 * level
        if field + 7 > task.limit:
            raise Fault(TS, (task.selector & ~3) | extern)
        pointer = linear.word(task.base + field, 8)
    if not _canonical(pointer):
        raise Fault(SS, extern)
    values = [old_stack.selector, old_pointer, _pushed_flags(registers, event)]
    values += [registers.segment(r.CS).selector, registers.rip]
    values += [event.code] if event.pushes_code else []
    pointer = (pointer & ~15) - 8 * len(values)
    frame = b"".join(value.to_bytes(8, "little") for value in reversed(values))
    if not _canonical(gate.offset):
        raise Fault(GP, extern)
    linear.write(pointer, frame)
    changed = level != registers.cpl
    registers.flags = _entered_flags(registers, gate.kind)
    if changed:
        rights = r.RIGHTS_P | level << 13 | r.RIGHTS_S | 3 << 8
        registers.set_segment(r.SS, r.Segment(level, 0, r.U32, rights))
    registers.set_segment(r.CS, code)
    registers.q[r.RSP] = pointer & r.U64
    registers.rip = gate.offset


def _canonical(address: int) -> bool:
    return -(1 << 47) <= address < 1 << 47 or (address & r.U64) >> 47 == (1 << 17) - 1


def _deliver_protected(registers: Registers, linear: Linear, event: Event) -> None:
    gate = _gate(registers, linear, event, 8)
    if gate.kind == _TASK_GATE:
        from kvmsim.engine.x86 import task  # noqa: PLC0415 - it needs the faults of this module

        task.switch(registers, linear, gate.selector, event)
        return
    extern = 0 if event.software else 1
    width = 4 if gate.kind in {_INTERRUPT_32, _TRAP_32} else 2
    virtual = bool(registers.flags & r.FLAG_VM)
    old_level = 3 if virtual else registers.cpl
    code, level = _code_segment(registers, linear, gate.selector, extern)
    if virtual and level:
        raise Fault(GP, (gate.selector & ~3) | extern)
    old_stack, stack = registers.segment(r.SS), registers.segment(r.SS)
    pointer = registers.q[r.RSP] & r.U32
    values: list[int] = []
    if level < old_level:
        if virtual:
            values += [registers.segment(n).selector for n in (r.GS, r.FS, r.DS, r.ES)]
        values += [old_stack.selector, pointer]
        stack, pointer = _inner_stack(registers, linear, level, extern)
    values += [_pushed_flags(registers, event), registers.segment(r.CS).selector, registers.rip]
    values += [event.code] if event.pushes_code else []
    mask = r.U32 if stack.rights & r.RIGHTS_DB else 0xFFFF
    top = (pointer - width * len(values)) & mask
    frame = b"".join(
        (value & (1 << 8 * width) - 1).to_bytes(width, "little") for value in reversed(values)
    )
    _check_stack(stack, top, len(frame), extern if level < old_level else None)
    linear.write(stack.base + top, frame, user=level == 3)
    flags = _entered_flags(registers, gate.kind)
    registers.flags = flags
    if virtual:
        for number in (r.ES, r.DS, r.FS, r.GS):
            registers.set_segment(number, r.Segment(0, 0, 0, 0))
    registers.set_segment(r.SS, stack)
    registers.set_segment(r.CS, code)
    registers.q[r.RSP] = (pointer & ~mask) | top
    registers.rip = gate.offset


def _check_stack(stack: r.Segment, top: int, size: int, inner_extern: int | None) -> None:
    """Whether a frame fits into the stack segment; expand-down segments are taken as they are."""
    if stack.rights & 1 << 10:
        return
    if top + size - 1 > stack.limit:
        inner = 0 if inner_extern is None else (stack.selector & ~3) | inner_extern
        raise Fault(SS, inner)


def _inner_stack(
    registers: Registers, linear: Linear, level: int, extern: int
) -> tuple[r.Segment, int]:
    """Stack of a more privileged ring, from the task state segment."""
    task = registers.segment(r.TR)
    wide = bool(task.rights & 1 << 11)
    field = 4 + 8 * level if wide else 2 + 4 * level
    if field + (5 if wide else 3) > task.limit:
        raise Fault(TS, (task.selector & ~3) | extern)
    pointer = linear.word(task.base + field, 4 if wide else 2)
    selector = linear.word(task.base + field + (4 if wide else 2), 2)
    reference = (selector & ~3) | extern
    if not selector & ~3:
        raise Fault(TS, reference)
    segment, _ = descriptor(registers, linear, selector, TS, extern)
    writable = segment.rights & (r.RIGHTS_S | 1 << 11 | 1 << 9) == r.RIGHTS_S | 1 << 9
    if not writable or segment.dpl != level or selector & 3 != level:
        raise Fault(TS, reference)
    if not segment.rights & r.RIGHTS_P:
        raise Fault(SS, reference)
    return segment, pointer
