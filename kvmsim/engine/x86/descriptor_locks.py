"""Locked accesses the processor makes by itself: to descriptors that become accessed or busy.

MOV to a segment register sets the accessed bit of the descriptor where it is clear, and LTR the
busy bit, as a locked update of eight bytes. Where the table is not aligned to eight bytes that can
be a split lock, and in memory that is not write-back any is a bus lock (kvm.md A.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86 import sites
from kvmsim.engine.x86.decode import LTR_GROUP
from kvmsim.engine.x86.delivery import Fault

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction

BYTES = 8
_LOCAL = 4
_ACCESSED, _PRESENT, _CODE_OR_DATA = 1 << 8, 1 << 15, 1 << 12
_TYPE_SHIFT, _AVAILABLE = 8, frozenset({1, 9})


def updated(cpu: Cpu, found: Instruction) -> int | None:
    """Linear address of the descriptor an instruction is about to update; None: it does not."""
    try:
        return _updated(cpu, found)
    except Fault:
        return None  # the instruction meets the same one


def _updated(cpu: Cpu, found: Instruction) -> int | None:
    registers = cpu.registers
    if not registers.protected:
        return None
    selector = _selector(cpu, found)
    table = registers.segment(r.LDTR if selector & _LOCAL else r.GDTR)
    if not selector & ~3 or selector | 7 > table.limit:
        return None
    at = table.base + (selector & ~7)
    rights = cpu.linear.word(at + 4, 4)
    if not rights & _PRESENT:
        return None
    if found.opcode == LTR_GROUP:
        free = not rights & _CODE_OR_DATA and rights >> _TYPE_SHIFT & 0xF in _AVAILABLE
        return at if free else None
    return at if rights & (_CODE_OR_DATA | _ACCESSED) == _CODE_OR_DATA else None


def _selector(cpu: Cpu, found: Instruction) -> int:
    registers = cpu.registers
    mode = registers.mode
    place = sites.operand_address(registers.linear_rip, found, mode, registers.q)
    if place is None:
        return registers.q[found.rm] & 0xFFFF
    return cpu.linear.word(place, 2)
