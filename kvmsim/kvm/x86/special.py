"""Segments, tables and control registers: ``kvm_sregs`` and the engine's.

Done in whole structures: a VMM that emulates devices asks for them at every other exit.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.kvm.sregs import Sregs

#: Base, limit, selector; then what is in the access rights, and a byte of padding.
_SEGMENT = Struct("<QIH9sx")
#: Base and limit.
_TABLE = Struct("<QH6x")
#: CR0, CR2, CR3, CR4; CR8, which the vCPU has; EFER.
_CONTROL = Struct("<5QQ")
_TABLES_AT, _CONTROL_AT = 192, 224
#: In the order of ``kvm_sregs``.
_SEGMENTS = (r.CS, r.DS, r.ES, r.FS, r.GS, r.SS, r.TR, r.LDTR)
_TABLES = (r.GDTR, r.IDTR)
#: Type, present, DPL, D/B, S, L, G, AVL in the access rights: shift and bits.
_RIGHTS = ((8, 4), (15, 1), (13, 2), (22, 1), (12, 1), (21, 1), (23, 1), (20, 1))


@lru_cache(maxsize=256)
def _rights_of(parts: bytes) -> int:
    """Access rights from the members of ``kvm_segment``; none, where it is unusable."""
    if parts[8]:
        return 0
    pairs = zip(parts, _RIGHTS, strict=False)
    return sum((part & (1 << bits) - 1) << shift for part, (shift, bits) in pairs)


@lru_cache(maxsize=256)
def _parts_of(rights: int) -> bytes:
    parts = [rights >> shift & (1 << bits) - 1 for shift, bits in _RIGHTS]
    return bytes([*parts, int(not rights & r.RIGHTS_P)])


def load(special: Sregs, cpu: Cpu) -> None:
    """Put them into the engine."""
    registers, data = cpu.registers, special.data
    for at, number in enumerate(_SEGMENTS):
        base, limit, selector, parts = _SEGMENT.unpack_from(data, at * _SEGMENT.size)
        registers.set_segment(number, r.Segment(selector, base, limit, _rights_of(parts)))
    for at, number in enumerate(_TABLES):
        base, limit = _TABLE.unpack_from(data, _TABLES_AT + at * _TABLE.size)
        registers.set_segment(number, r.Segment(0, base, limit))
    cr0, cr2, cr3, cr4, _cr8, efer = _CONTROL.unpack_from(data, _CONTROL_AT)
    registers.cr2, registers.cr3 = cr2, cr3
    registers.cr4, registers.efer, registers.cr0 = cr4, efer, cr0
    cpu.changed()


def store(special: Sregs, cpu: Cpu) -> None:
    """Take them out of the engine."""
    registers, data = cpu.registers, special.data
    for at, number in enumerate(_SEGMENTS):
        selector, base, limit, rights = registers.descriptor(number)
        _SEGMENT.pack_into(data, at * _SEGMENT.size, base, limit, selector, _parts_of(rights))
    for at, number in enumerate(_TABLES):
        _selector, base, limit, _rights = registers.descriptor(number)
        _TABLE.pack_into(data, _TABLES_AT + at * _TABLE.size, base, limit & 0xFFFF)
    cr8 = _CONTROL.unpack_from(data, _CONTROL_AT)[4]
    control = (registers.cr0, registers.cr2, registers.cr3, registers.cr4, cr8, registers.efer)
    _CONTROL.pack_into(data, _CONTROL_AT, *control)
