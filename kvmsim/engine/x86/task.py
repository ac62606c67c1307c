"""Task switches by a task gate of the interrupt table: 32-bit code only.

Far jumps and calls to a task, and IRET out of a nested one, are the emulator's business; it does
not take part in the delivery of events. Source: Intel SDM volume 3, 7.2 and 7.3; 16-bit task state
segments end the guest, as an emulation failure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import (
    GP,
    NP,
    SS,
    TS,
    Fault,
    Unsupported,
    descriptor,
)

if TYPE_CHECKING:
    from kvmsim.engine.x86.delivery import Event, Linear
    from kvmsim.engine.x86.registers import Registers

AVAILABLE, BUSY, BUSY_BIT = 9, 11, 2
LEAST_LIMIT = 103
CR0_TS, CR0_PG = 1 << 3, 1 << 31
_LINK, _CR3, _EIP, _EFLAGS, _GENERAL, _SEGMENTS, _LDT = 0, 28, 32, 36, 40, 72, 96
_CODE, _WRITABLE, _READABLE, _EXPANDS_OR_CONFORMS = 1 << 11, 1 << 9, 1 << 9, 1 << 10


def switch(registers: Registers, linear: Linear, selector: int, event: Event) -> None:
    """Deliver an event by a task: the interrupted one is saved, the other one is entered.

    Args:
        registers: of the vCPU.
        linear: its memory.
        selector: in the gate.
        event: what is delivered.

    Raises:
        Fault: the descriptor or the new task's state is not in order.
        Unsupported: a 16-bit task.
    """
    extern = 0 if event.software else 1
    task, at = _task(registers, linear, selector, extern)
    _save(registers, linear)
    linear.write(task.base + _LINK, registers.segment(r.TR).selector.to_bytes(2, "little"))
    linear.write(at + 5, bytes([linear.read(at + 5, 1)[0] | BUSY_BIT]))
    task = replace(task, rights=task.rights | BUSY_BIT << 8)
    registers.set_segment(r.TR, task)
    registers.cr0 |= CR0_TS
    _load(registers, linear, task)
    if event.pushes_code:
        _push(registers, linear, event.code)


def _task(
    registers: Registers, linear: Linear, selector: int, extern: int
) -> tuple[r.Segment, int]:
    """The new task's segment, and where its descriptor is."""
    reference = (selector & ~3) | extern
    if selector & 4:
        raise Fault(TS, reference)
    task, at = descriptor(registers, linear, selector, GP, extern)
    kind = task.rights >> 8 & 0x1F
    if kind in {1, 3}:
        raise Unsupported("a 16-bit task")
    if kind != AVAILABLE:
        raise Fault(GP, reference)
    if not task.rights & r.RIGHTS_P:
        raise Fault(NP, reference)
    if task.limit < LEAST_LIMIT:
        raise Fault(TS, reference)
    return task, at


def _save(registers: Registers, linear: Linear) -> None:
    """Save the state of the task that is left."""
    old = registers.segment(r.TR)
    words = [registers.rip, registers.flags, *(registers.q[number] for number in range(8))]
    data = b"".join((word & r.U32).to_bytes(4, "little") for word in words)
    linear.write(old.base + _EIP, data)
    for number in range(6):
        chosen = registers.segment(number).selector
        linear.write(old.base + _SEGMENTS + 4 * number, chosen.to_bytes(2, "little"))


def _load(registers: Registers, linear: Linear, task: r.Segment) -> None:
    """Enter the new task; a fault from here on is one of its own."""
    base = task.base
    words = linear.read(base + _CR3, _LDT + 4 - _CR3)
    values = [int.from_bytes(words[at : at + 4], "little") for at in range(0, len(words), 4)]
    if registers.cr0 & CR0_PG:
        registers.cr3 = values[0]
    registers.rip = values[1]
    registers.flags = values[2] | r.FLAG_NT | 2
    for number in range(8):
        registers.q[number] = values[3 + number]
    chosen = [value & 0xFFFF for value in values[11:17]]
    _load_table(registers, linear, values[17] & 0xFFFF)
    level = chosen[r.CS] & 3
    for number in (r.CS, r.SS, r.ES, r.DS, r.FS, r.GS):
        registers.set_segment(number, _segment(registers, linear, number, chosen[number], level))


def _load_table(registers: Registers, linear: Linear, selector: int) -> None:
    if not selector & ~3:
        registers.set_segment(r.LDTR, r.Segment(selector, 0, 0, 0))
        return
    if selector & 4:
        raise Fault(TS, selector & ~3)
    table, _ = descriptor(registers, linear, selector, TS)
    if table.rights >> 8 & 0x9F != 0x82:
        raise Fault(TS, selector & ~3)
    registers.set_segment(r.LDTR, table)


def _segment(
    registers: Registers, linear: Linear, number: int, selector: int, level: int
) -> r.Segment:
    """A segment register of the new task."""
    reference = selector & ~3
    if not reference:
        if number in {r.CS, r.SS}:
            raise Fault(TS)
        return r.Segment(selector, 0, 0, 0)
    found, _ = descriptor(registers, linear, selector, TS)
    if not found.rights & r.RIGHTS_S or not _fits(found, number, selector, level):
        raise Fault(TS, reference)
    if not found.rights & r.RIGHTS_P:
        raise Fault(SS if number == r.SS else NP, reference)
    return replace(found, selector=selector)


def _fits(found: r.Segment, number: int, selector: int, level: int) -> bool:
    """Whether type and privilege level of a descriptor suit a segment register."""
    code = bool(found.rights & _CODE)
    if number == r.CS:
        conforming = found.rights & _EXPANDS_OR_CONFORMS
        return code and (found.dpl <= level if conforming else found.dpl == level)
    if number == r.SS:
        writable = not code and bool(found.rights & _WRITABLE)
        return writable and found.dpl == level == selector & 3
    if code and not found.rights & _READABLE:
        return False
    conforming = code and found.rights & _EXPANDS_OR_CONFORMS
    return bool(conforming) or found.dpl >= max(level, selector & 3)


def _push(registers: Registers, linear: Linear, code: int) -> None:
    """Push an error code onto the new task's stack."""
    stack = registers.segment(r.SS)
    mask = r.U32 if stack.rights & r.RIGHTS_DB else 0xFFFF
    pointer = (registers.q[r.RSP] - 4) & mask
    linear.write(stack.base + pointer, code.to_bytes(4, "little"), user=registers.cpl == 3)
    registers.q[r.RSP] = (registers.q[r.RSP] & ~mask & r.U32) | pointer
