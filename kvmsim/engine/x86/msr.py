"""Model-specific registers the engine keeps itself; all others are the policy's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86.paging import CR0_PG, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu

IA32_TSC = 0x10
IA32_MTRRCAP = 0xFE
IA32_PAT = 0x277
IA32_MTRR_DEF_TYPE = 0x2FF
EFER = 0xC0000080
_VARIABLE, _VARIABLE_END = 0x200, 0x210
#: Fixed-range registers in address order.
_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
#: Eight variable ranges, fixed ranges, write combining.
_CAPABILITY = 8 | 1 << 8 | 1 << 10

#: Registers that hold linear addresses.
_ADDRESSES = frozenset({0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102})
_PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})
_MTRR_TYPES = frozenset({0, 1, 4, 5, 6})


def read_msr(cpu: Cpu, index: int) -> int | None:
    """Read a register; None: there is none."""
    mtrrs = cpu.mtrrs
    if _VARIABLE <= index < _VARIABLE_END:
        return mtrrs.variable[(index - _VARIABLE) // 2][index % 2]
    if index in _FIXED:
        return mtrrs.fixed[_FIXED.index(index)]
    if cpu.lbr is not None and (record := cpu.lbr.read(index)) is not None:
        return record
    special = {IA32_TSC: cpu.tsc, IA32_MTRRCAP: _CAPABILITY, IA32_MTRR_DEF_TYPE: mtrrs.default}
    if index in special:
        return special[index]
    kept = cpu.registers.msr(index)
    return cpu.policy.rdmsr(cpu, index) if kept is None else kept


def write_msr(cpu: Cpu, index: int, value: int) -> bool:
    """Write a register; False: refused, and nothing changed."""
    if index == EFER:
        return _write_efer(cpu, value)
    if _VARIABLE <= index < _VARIABLE_END or index in _FIXED or index == IA32_MTRR_DEF_TYPE:
        return _write_mtrr(cpu, index, value)
    if not _is_valid(index, value):
        return False
    if index == IA32_TSC:
        cpu.tsc = value
        return True
    if cpu.lbr is not None and cpu.lbr.read(index) is not None:
        return cpu.lbr.write(index, value)
    if index == IA32_PAT:
        cpu.mapping_changed()
    return cpu.registers.set_msr(index, value) or cpu.policy.wrmsr(cpu, index, value)


def _is_valid(index: int, value: int) -> bool:
    """Whether a register takes a value at all."""
    if index == IA32_PAT:
        return all(value >> 8 * at & 0xFF in _PAT_TYPES for at in range(8))
    if index in _ADDRESSES:
        return _canonical(value)
    if index in {0x174, 0xC0000103}:
        return value >> 32 == 0
    return index != IA32_MTRRCAP


def _canonical(value: int) -> bool:
    return value < 1 << 47 or value >> 47 == (1 << 17) - 1


def _write_efer(cpu: Cpu, value: int) -> bool:
    old = cpu.registers.efer
    known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
    if value & ~known or ((value ^ old) & EFER_LME and cpu.registers.cr0 & CR0_PG):
        return False
    # The guest cannot write LMA: the processor sets it.
    cpu.registers.efer = (value & ~EFER_LMA) | (old & EFER_LMA)
    cpu.changed()
    return True


def _write_mtrr(cpu: Cpu, index: int, value: int) -> bool:
    mtrrs = cpu.mtrrs
    if index == IA32_MTRR_DEF_TYPE:
        if value & ~0xCFF or value & 0xFF not in _MTRR_TYPES:
            return False
        mtrrs.default = value
    elif index in _FIXED:
        if any(value >> 8 * at & 0xFF not in _MTRR_TYPES for at in range(8)):
            return False
        mtrrs.fixed[_FIXED.index(index)] = value
    else:
        base, mask = mtrrs.variable[(index - _VARIABLE) // 2]
        if index % 2:
            if value & 0x7FF:
                return False
            mask = value
        else:
            if value & 0xF00 or value & 0xFF not in _MTRR_TYPES:
                return False
            base = value
        mtrrs.variable[(index - _VARIABLE) // 2] = (base, mask)
    cpu.mapping_changed()
    return True
