"""Guest-linear to guest-physical: KVM_TRANSLATE through the guest's own page tables.

Intel SDM volume 3, chapter 4. Only whether a page is present matters: KVM translates as a
supervisor's read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmsim.abi.ioctls import KVM_TRANSLATE
from kvmsim.abi.regs import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, KVM_TRANSLATION
from kvmsim.errors import KvmError
from kvmsim.kvm import sregs
from kvmsim.kvm.dispatch import VcpuFile, handles

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

PRESENT = 1 << 0
LARGE = 1 << 7
PAGE_BITS = 12
ADDRESS_MASK = (1 << 52) - 1 & ~0xFFF
INVALID = (1 << 64) - 1


class Paging(NamedTuple):
    """A paging mode.

    Attributes:
        root: address of the first table.
        levels: tables an address goes through.
        entry_bytes: of an entry.
        index_bits: of an address, per level.
        large_levels: levels, counted from the last, whose entries may be pages.
    """

    root: int
    levels: int
    entry_bytes: int
    index_bits: int
    large_levels: tuple[int, ...]


def paging(vcpu: Vcpu) -> Paging | None:
    """The mode a guest is in; None: paging is off."""
    registers = sregs.of(vcpu)
    if not registers.get("cr0") & CR0_PG:
        return None
    cr3, cr4 = registers.get("cr3"), registers.get("cr4")
    if registers.get("efer") & EFER_LMA:
        levels = 5 if cr4 & CR4_LA57 else 4
        return Paging(cr3 & _address_mask(vcpu), levels, 8, 9, (1, 2))
    if cr4 & CR4_PAE:
        return Paging(cr3 & 0xFFFFFFE0, 3, 8, 9, (1,))
    return Paging(cr3 & 0xFFFFF000, 2, 4, 10, (1,) if cr4 & CR4_PSE else ())


def translate(vcpu: Vcpu, address: int) -> int | None:
    """The guest-physical address behind a linear one; None: not present, or no memory there."""
    mode = paging(vcpu)
    if mode is None:
        return address
    if mode.levels < 4:
        address &= 0xFFFF_FFFF
    elif address >> PAGE_BITS + 9 * mode.levels - 1 not in {0, (1 << 53 - 9 * mode.levels) - 1}:
        return None
    table = mode.root
    for level in reversed(range(mode.levels)):
        shift = PAGE_BITS + mode.index_bits * level
        index = address >> shift & (1 << mode.index_bits) - 1
        entry = _entry(vcpu, table + index * mode.entry_bytes, mode.entry_bytes)
        if entry is None or not entry & PRESENT:
            return None
        base = entry & _address_mask(vcpu)
        if level == 0 or (level in mode.large_levels and entry & LARGE):
            offset = (1 << shift) - 1
            if mode.entry_bytes == 4 and level:
                # PSE-36: bits 13 to 20 of the entry are address bits 32 to 39.
                base = entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32
            return (base & ~offset) | (address & offset)
        table = base
    return None


def _entry(vcpu: Vcpu, gpa: int, size_bytes: int) -> int | None:
    try:
        return int.from_bytes(vcpu.vm.memory.read(gpa, size_bytes), "little")
    except KvmError:
        return None


def _address_mask(vcpu: Vcpu) -> int:
    """Address bits of an entry: those of memory encryption are none."""
    sev = vcpu.vm.machine.preset.sev
    if vcpu.vm.sev_active and sev is not None:
        return ADDRESS_MASK & ~(1 << sev.c_bit)
    return ADDRESS_MASK


@handles(VcpuFile, KVM_TRANSLATE)
def translate_ioctl(vcpu: Vcpu, call: Call) -> int:
    """Translate one address. ``writeable`` is always 1 and ``usermode`` 0: KVM does not look."""
    data = bytearray(call.read(KVM_TRANSLATION.size_bytes))
    gpa = translate(vcpu, KVM_TRANSLATION.get(data, "linear_address"))
    KVM_TRANSLATION.put(data, "physical_address", INVALID if gpa is None else gpa)
    KVM_TRANSLATION.put(data, "valid", int(gpa is not None))
    KVM_TRANSLATION.put(data, "writeable", 1)
    KVM_TRANSLATION.put(data, "usermode", 0)
    call.write(data)
    return 0
