"""Values control registers do not take: #GP, where the emulator takes anything.

Source: Intel SDM volume 3, 2.5 and 6.15; Linux 6.12 x86.c, ``kvm_set_cr0``, ``kvm_set_cr3`` and
``kvm_is_valid_cr4``. Which bits of CR4 a guest's CPUID allows is not looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r

if TYPE_CHECKING:
    from kvmsim.engine.x86.registers import Registers

CR0_PE, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 29, 1 << 30, 1 << 31
CR4_PAE, CR4_LA57, CR4_PCIDE = 1 << 5, 1 << 12, 1 << 17
EFER_LME = 1 << 8
#: VME to OSXMMEXCPT, UMIP, LA57, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP, PKE.
CR4_KNOWN = 0x7FF | 1 << 11 | 1 << 12 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21 | 1 << 22
#: Beyond 52 bits of physical address; bit 63 says only what a PCID's entries do.
CR3_RESERVED = 0x7FF0_0000_0000_0000


def refuses(registers: Registers, number: int, value: int) -> bool:
    """Whether MOV to a control register raises #GP.

    Args:
        registers: before.
        number: 0, 2, 3 or 4.
        value: what is to be written, as wide as the mode makes it.
    """
    if number == 0:
        return _refuses_0(registers, value)
    if number == 3:
        pcid = registers.cr4 & CR4_PCIDE
        reserved = CR3_RESERVED | (0 if pcid else 1 << 63)
        return registers.long_mode and bool(value & reserved)
    return number == 4 and _refuses_4(registers, value)


def _refuses_0(registers: Registers, value: int) -> bool:
    paging, protected = bool(value & CR0_PG), bool(value & CR0_PE)
    if value > r.U32 or (paging and not protected) or (value & CR0_NW and not value & CR0_CD):
        return True
    turned_on = paging and not registers.cr0 & CR0_PG
    if turned_on and registers.efer & EFER_LME:
        wide = registers.segment(r.CS).rights & r.RIGHTS_L
        return not registers.cr4 & CR4_PAE or bool(wide)
    turned_off = not paging and registers.cr0 & CR0_PG
    return bool(turned_off and (registers.mode == 64 or registers.cr4 & CR4_PCIDE))


def _refuses_4(registers: Registers, value: int) -> bool:
    changed = value ^ registers.cr4
    if value & ~CR4_KNOWN:
        return True
    if registers.long_mode:
        if not value & CR4_PAE or changed & CR4_LA57:
            return True
    elif value & CR4_PCIDE:
        return True
    return bool(changed & value & CR4_PCIDE and registers.cr3 & 0xFFF)
