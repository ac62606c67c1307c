"""The ASID allocator of SEV.

One number space, two classes: SEV-ES and SNP guests use 1 .. EDX-1, plain SEV guests EDX .. ECX.
An ASID that was freed is not handed out again before the caches were flushed; a flush is done only
when a class has nothing left, and then makes the freed ones of both classes usable::

    ECX=6 EDX=6   take 1, take 2, free 1, take 3, 4, 5   the class is used up once
                  take: flush, 1                         lowest first again

Source: Linux 6.12 ``arch/x86/kvm/svm/sev.c``, ``sev_asid_new``, ``__sev_recycle_asids`` and
``sev_asid_free``.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EBUSY, ENOTTY
from typing import TYPE_CHECKING, NewType

from kvmsim.errors import KvmError
from kvmsim.sev.errors import FirmwareError

if TYPE_CHECKING:
    from collections.abc import Callable

Asid = NewType("Asid", int)


@dataclass(frozen=True, slots=True)
class AsidStatistics:
    """What a pool has done so far.

    Attributes:
        sev: plain SEV ASIDs some guest holds.
        sev_es: SEV-ES ASIDs some guest holds.
        reclaimable: freed ASIDs that wait for a flush.
        flushes: how often all caches were flushed to recycle ASIDs.
    """

    sev: int
    sev_es: int
    reclaimable: int
    flushes: int


class AsidPool:
    """ASIDs of one machine.

    Args:
        min_sev_asid: lowest ASID of a plain SEV guest (EDX).
        max_sev_asid: highest ASID (ECX).
        flush_fails: the data fabric flush fails on this machine; nothing is ever recycled.

    Attributes:
        flushes: how often all caches were flushed to recycle ASIDs.
        on_flush: tells the firmware; FirmwareError: it did not flush, nothing is recycled.
    """

    __slots__ = (
        *("_es_mask", "_in_use", "_reclaim", "_sev_mask"),
        *("flush_fails", "flushes", "on_flush"),
    )

    def __init__(self, min_sev_asid: int, max_sev_asid: int, *, flush_fails: bool = False) -> None:
        self._es_mask = _bits(1, min_sev_asid - 1)
        self._sev_mask = _bits(max(1, min_sev_asid), max_sev_asid)
        self._in_use = 0
        self._reclaim = 0
        self.flush_fails = flush_fails
        self.flushes = 0
        self.on_flush: Callable[[], None] = _nobody

    def check_range(self, *, es: bool) -> None:
        """Look whether there is any ASID of a class on this machine.

        Raises:
            KvmError: ENOTTY, the range is empty.
        """
        if not self._mask(es=es):
            raise KvmError(ENOTTY, f"no ASIDs for {'SEV-ES' if es else 'SEV'} guests")

    def take(self, *, es: bool) -> Asid:
        """Hand out the lowest ASID of a class that is usable, flushing if need be.

        Raises:
            KvmError: EBUSY, every ASID of the class is held or cannot be recycled.
        """
        mask = self._mask(es=es)
        free = mask & ~self._in_use
        if not free and self._recycle(mask):
            free = mask & ~self._in_use
        if not free:
            raise KvmError(EBUSY, f"no free {'SEV-ES' if es else 'SEV'} ASID")
        lowest = free & -free
        self._in_use |= lowest
        return Asid(lowest.bit_length() - 1)

    def free(self, asid: Asid) -> None:
        """Take an ASID back. It stays unusable until the next flush."""
        bit = 1 << asid
        if not self._in_use & bit or self._reclaim & bit:
            msg = f"ASID {asid} is not held by any guest"
            raise ValueError(msg)
        self._reclaim |= bit

    def statistics(self) -> AsidStatistics:
        """Count what is held and what waits for a flush."""
        held = self._in_use & ~self._reclaim
        return AsidStatistics(
            sev=(held & self._sev_mask).bit_count(),
            sev_es=(held & self._es_mask).bit_count(),
            reclaimable=self._reclaim.bit_count(),
            flushes=self.flushes,
        )

    def _mask(self, *, es: bool) -> int:
        return self._es_mask if es else self._sev_mask

    def _recycle(self, mask: int) -> bool:
        """Flush, if that can yield an ASID of the class ``mask``; both classes get theirs back."""
        if not self._reclaim & mask or self.flush_fails:
            return False
        try:
            self.on_flush()
        except (FirmwareError, KvmError):
            return False
        self.flushes += 1
        self._in_use &= ~self._reclaim
        self._reclaim = 0
        return True


def _nobody() -> None:
    """No firmware to tell."""


def _bits(low: int, high: int) -> int:
    """A mask with the bits ``low`` to ``high`` set; 0 when there are none."""
    return (1 << (high + 1)) - (1 << low) if low <= high else 0
