"""Model-specific registers: those the emulator needs, and the rules of a bare processor for them.

A policy that owns all registers (``Policy.owns_msrs``) is asked for each of them and gives the
emulator what it needs by :func:`adopt`; else the engine keeps these itself, by the rules here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86.paging import CR0_PG, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE

if TYPE_CHECKING:
    from kvmsim.engine.base import Rdmsr, Wrmsr
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


def read_msr(cpu: Cpu, index: int) -> int | Rdmsr | None:
    """Read a register; None: there is none; a stop: user space answers."""
    if cpu.policy.owns_msrs:
        return cpu.policy.rdmsr(cpu, index)
    kept = held(cpu, index)
    if kept is not None:
        return kept
    if cpu.lbr is not None and (record := cpu.lbr.read(index)) is not None:
        return record
    return cpu.policy.rdmsr(cpu, index)


def held(cpu: Cpu, index: int) -> int | None:
    """What the emulator, or the engine for it, has of a register; None: it needs none of it."""
    mtrrs = cpu.mtrrs
    if _VARIABLE <= index < _VARIABLE_END:
        return mtrrs.variable[(index - _VARIABLE) // 2][index % 2]
    if index in _FIXED:
        return mtrrs.fixed[_FIXED.index(index)]
    if index == IA32_TSC:
        return cpu.policy.tsc(cpu)
    special = {IA32_MTRRCAP: _CAPABILITY, IA32_MTRR_DEF_TYPE: mtrrs.default}
    return special[index] if index in special else cpu.registers.msr(index)


def adopt(cpu: Cpu, index: int, value: int) -> None:
    """Give the emulator the value of a register that somebody else has checked and keeps."""
    mtrrs = cpu.mtrrs
    if index == IA32_MTRR_DEF_TYPE:
        mtrrs.default = value
    elif index in _FIXED:
        mtrrs.fixed[_FIXED.index(index)] = value
    elif _VARIABLE <= index < _VARIABLE_END:
        base, mask = mtrrs.variable[(index - _VARIABLE) // 2]
        pair = (base, value) if index % 2 else (value, mask)
        mtrrs.variable[(index - _VARIABLE) // 2] = pair
    else:
        cpu.registers.set_msr(index, value)
    if index == EFER:
        cpu.changed()
    elif _VARIABLE <= index <= IA32_MTRR_DEF_TYPE:
        cpu.mapping_changed()


def write_msr(cpu: Cpu, index: int, value: int) -> bool | Wrmsr:
    """Write a register; False: refused, and nothing changed; a stop: user space answers."""
    if cpu.policy.owns_msrs:
        return cpu.policy.wrmsr(cpu, index, value)
    if index == EFER:
        return write_efer(cpu, value)
    if _VARIABLE <= index < _VARIABLE_END or index in _FIXED or index == IA32_MTRR_DEF_TYPE:
        return _write_mtrr(cpu, index, value)
    return _is_valid(index, value) and _write(cpu, index, value)


def _write(cpu: Cpu, index: int, value: int) -> bool | Wrmsr:
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


def write_efer(cpu: Cpu, value: int) -> bool:
    """EFER as the guest writes it; False: #GP."""
    old = cpu.registers.efer
    known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
    if value & ~known or ((value ^ old) & EFER_LME and cpu.registers.cr0 & CR0_PG):
        return False
    # The guest cannot write LMA: the processor sets it.
    cpu.registers.efer = (value & ~EFER_LMA) | (old & EFER_LMA)
    cpu.changed()
    return True


def _write_mtrr(cpu: Cpu, index: int, value: int) -> bool:
    if index == IA32_MTRR_DEF_TYPE:
        valid = not value & ~0xCFF and value & 0xFF in _MTRR_TYPES
    elif index in _FIXED:
        valid = all(value >> 8 * at & 0xFF in _MTRR_TYPES for at in range(8))
    elif index % 2:
        valid = not value & 0x7FF
    else:
        valid = not value & 0xF00 and value & 0xFF in _MTRR_TYPES
    if valid:
        adopt(cpu, index, value)
    return valid
