"""The guest's page tables: translation with the architectural checks, and memory types.

Used for what the engine itself does with guest memory (event delivery, string I/O) and for the type
of the memory behind a locked access. Ordinary accesses are translated by the emulator below.

Memory types: the PAT entry a mapping selects, combined with the MTRRs. MTRRs that are not enabled
do not count (by the letter all memory would be uncached then, and every locked instruction of a
guest that never sets them a bus lock; KVM maps such guests write-back). CR0.CD does not count
either, as in KVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsim.engine.x86.memory import Memory
    from kvmsim.engine.x86.registers import Registers

CR0_PE, CR0_WP, CR0_PG = 1, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11
FLAG_AC = 1 << 18

P, RW, US, PWT, PCD, A, D, PS = (1 << bit for bit in range(8))
NX = 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000

# Bits of a page fault's error code.
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16


class MemoryType(IntEnum):
    """PAT and MTRR encodings."""

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6
    UC_MINUS = 7


PAT_RESET = 0x0007_0406_0007_0406


class PageFault(Exception):
    """The access is not allowed by the page tables.

    Attributes:
        address: linear address.
        code: error code.
    """

    def __init__(self, address: int, code: int) -> None:
        super().__init__(address, code)
        self.address = address
        self.code = code


@dataclass(frozen=True, slots=True)
class Translation:
    """Where a linear address leads.

    Attributes:
        gpa: guest-physical address.
        pat_index: which PAT entry the mapping selects; 0 without paging.
    """

    gpa: int
    pat_index: int


def translate(
    registers: Registers,
    memory: Memory,
    linear: int,
    *,
    write: bool = False,
    user: bool = False,
    fetch: bool = False,
    touch: bool = True,
) -> Translation:
    """Walk the guest's page tables.

    Args:
        registers: for CR0, CR3, CR4, EFER and the flags.
        memory: where the tables are.
        linear: address; its upper half counts in long mode only.
        write: the access writes.
        user: it is made at CPL 3 and not implicit.
        fetch: it fetches an instruction.
        touch: accessed and dirty bits are set.

    Raises:
        PageFault: not mapped, or not for this.
    """
    cr0, cr4 = registers.cr0, registers.cr4
    if not cr0 & CR0_PG:
        return Translation(linear & 0xFFFF_FFFF, 0)
    efer = registers.efer
    nx = bool(efer & EFER_NXE)
    wanted = (PF_WRITE if write else 0) | (PF_USER if user else 0)
    if fetch and (nx or cr4 & CR4_SMEP):
        wanted |= PF_FETCH
    walk = _entries(registers, memory, linear, wanted)
    writable = all(entry & RW for _, entry, _, _ in walk.directory)
    for_user = all(entry & US for _, entry, _, _ in walk.directory)
    no_execute = nx and any(entry & NX for _, entry, _, _ in walk.directory)
    smap = cr4 & CR4_SMAP and not user and not fetch and not registers.flags & FLAG_AC
    refused = (
        (user and not for_user)
        or (write and not writable and (user or cr0 & CR0_WP))
        or (fetch and no_execute)
        or (fetch and not user and for_user and cr4 & CR4_SMEP)
        or (smap and for_user)
    )
    if refused:
        raise PageFault(linear, wanted | PF_PRESENT)
    if touch:
        _touch(memory, walk, write=write)
    return Translation(walk.gpa, walk.pat_index)


def locate(registers: Registers, memory: Memory, linear: int) -> int:
    """Where a linear address leads, whoever may go there: the guest-physical address.

    For looks of the engine's own, which are no accesses of the guest's: with SMAP the system may
    not read code of ring 3.

    Raises:
        PageFault: not mapped.
    """
    if not registers.cr0 & CR0_PG:
        return linear & 0xFFFF_FFFF
    return _entries(registers, memory, linear, 0).gpa


@dataclass(slots=True)
class _Walk:
    """Entries on the way: (address, value, size, whether it is the last)."""

    directory: list[tuple[int, int, int, bool]]
    gpa: int
    pat_index: int


def _entries(registers: Registers, memory: Memory, linear: int, wanted: int) -> _Walk:
    long_mode = bool(registers.efer & EFER_LMA)
    pae = bool(registers.cr4 & CR4_PAE)
    if not long_mode:
        linear &= 0xFFFF_FFFF
    levels, bits, size = 2, 10, 4
    if pae:
        bits, size = 9, 8
        levels = (5 if registers.cr4 & CR4_LA57 else 4) if long_mode else 3
    table = registers.cr3 & (_ADDRESS if pae and long_mode else 0xFFFF_FFE0 if pae else 0xFFFF_F000)
    found: list[tuple[int, int, int, bool]] = []
    for level in range(levels, 0, -1):
        shift = 12 + bits * (level - 1)
        address = table + ((linear >> shift) & ((1 << bits) - 1)) * size
        entry = memory.read_word(address, size)
        if not entry & P:
            raise PageFault(linear, wanted & ~PF_PRESENT)
        large = bool(entry & PS) and _may_be_large(level, levels, registers.cr4, pae=pae)
        if levels == 3 and level == 3:
            table = entry & _ADDRESS  # PAE directory pointers have no rights
            continue
        found.append((address, entry, size, large or level == 1))
        if large or level == 1:
            mask = (1 << shift) - 1
            frame = entry & _ADDRESS & ~mask
            if size == 4 and large:
                frame |= (entry >> 13 & 0xFF) << 32
            pat_bit = entry >> (12 if large else 7) & 1
            pat = (pat_bit << 2) | (entry & PCD and 2) | (entry & PWT and 1)
            return _Walk(found, frame | linear & mask, pat)
        table = entry & _ADDRESS
    raise AssertionError("the last level ends the walk")


def _may_be_large(level: int, levels: int, cr4: int, *, pae: bool) -> bool:
    if not pae:
        return level == 2 and bool(cr4 & CR4_PSE)
    return level == 2 or (level == 3 and levels >= 4)


def _touch(memory: Memory, walk: _Walk, *, write: bool) -> None:
    for address, entry, size, last in walk.directory:
        bits = A | (D if write and last else 0)
        if entry & bits != bits and memory.find(address) is not None:
            memory.write(address, (entry | bits).to_bytes(size, "little"))


# -- memory types ------------------------------------------------------------------------------


@dataclass(slots=True)
class Mtrrs:
    """Memory type range registers.

    Attributes:
        default: ``IA32_MTRR_DEF_TYPE``: type, bit 10 fixed ranges on, bit 11 all on.
        fixed: the eleven fixed-range registers, 64 KiB, 16 KiB and 4 KiB ranges, in address order.
        variable: (base, mask) pairs.
    """

    default: int
    fixed: list[int]
    variable: list[tuple[int, int]]

    @classmethod
    def reset(cls) -> Mtrrs:
        """All off."""
        return cls(0, [0] * 11, [(0, 0)] * 8)

    def type_of(self, gpa: int) -> MemoryType:
        """Type of the memory at an address; write-back while the registers are off."""
        if not self.default & 1 << 11:
            return MemoryType.WB
        if gpa < 0x10_0000 and self.default & 1 << 10:
            return _known(self._fixed_type(gpa))
        types = {
            base & 0xFF
            for base, mask in self.variable
            if mask & 1 << 11 and (gpa ^ base) & mask & ~0xFFF == 0
        }
        if not types:
            return _known(self.default & 0xFF)
        if types == {MemoryType.WT, MemoryType.WB}:
            return MemoryType.WT
        # Any other overlap but of equals is undefined: the safest wins.
        return _known(types.pop()) if len(types) == 1 else MemoryType.UC

    def _fixed_type(self, gpa: int) -> int:
        if gpa < 0x8_0000:
            register, byte = 0, gpa >> 16
        elif gpa < 0xC_0000:
            register, byte = 1 + (gpa - 0x8_0000 >> 17), gpa >> 14 & 7
        else:
            register, byte = 3 + (gpa - 0xC_0000 >> 15), gpa >> 12 & 7
        return self.fixed[register] >> 8 * byte & 0xFF


def _known(value: int) -> MemoryType:
    try:
        return MemoryType(value)
    except ValueError:
        return MemoryType.UC


def is_write_back(translation: Translation, pat: int, mtrrs: Mtrrs, *, paging: bool) -> bool:
    """Whether memory is write-back, the only type in which a lock stays in the cache."""
    if paging and pat >> 8 * translation.pat_index & 0xFF != MemoryType.WB:
        return False
    return mtrrs.type_of(translation.gpa) == MemoryType.WB
