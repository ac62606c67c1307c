"""How wide a guest-physical address is: 40 bits for the emulator's page walk, 52 at most for CPUs.

The masks of the bits that are reserved in an entry of a page table are constants in the code of
one function (QEMU 5.0 target/i386/excp_helper.c, PHYS_ADDR_MASK with 40 bits): an entry with a
higher address is a #PF with the bit "reserved". The constants are changed in this process's own
copy of the code; where they are not the expected ones, everything stays as it is.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsim.engine.x86.library import Library

WALK = "x86_cpu_tlb_fill_x86_64"
#: Constants of Unicorn 2.1.4 that have bits 40 to 51 as reserved ones.
NR_MASKS = 12
HIGH_BITS = 0xFFF << 40
#: The mask of the whole address has them too; it has these in addition.
ADDRESS_BITS = 0xFF_FFFF_F000
_MOVABS = re.compile(rb"[\x48\x49][\xb8-\xbf](.{8})", re.DOTALL)


def widen(library: Library) -> bool:
    """Let guests use all 52 bits; whether that worked.

    Before anything is executed: another thread could be in the walk.
    """
    try:
        begin, size = library.symbol(WALK), library.size(WALK)
        places = list(_masks(ctypes.string_at(begin, size)))
        if len(places) != NR_MASKS:
            return False
        # Also where the mapping is not writable; the page becomes this process's own.
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            for at, mask in places:
                memory.seek(begin + at)
                memory.write((mask & ~HIGH_BITS).to_bytes(8, "little"))
    except (LookupError, OSError):
        return False
    return True


def _masks(code: bytes) -> Iterator[tuple[int, int]]:
    """Where the masks are in the code, and what they are."""
    for found in _MOVABS.finditer(code):
        mask = int.from_bytes(found[1], "little")
        if mask & HIGH_BITS == HIGH_BITS and mask & ADDRESS_BITS != ADDRESS_BITS:
            yield found.start(1), mask
