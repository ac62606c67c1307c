"""QEMU's rate limiter, with which its ``bus-lock-ratelimit`` slows a VM's vCPUs (kvm.md C.1.1).

QEMU include/qemu/ratelimit.h as of mid-2021. One limiter serves all vCPUs of a VM. It hands out
*reservations*: the first ``quota - 1`` events of a slice are free, the one that fills the quota and
all later ones sleep until their share of the slice is over. Where QEMU computes in double precision
this does too, so that delays agree to the nanosecond.
"""

from __future__ import annotations

SLICE_NS = 1_000_000_000
"""Slice of the bus lock limiter (QEMU target/i386/kvm/kvm.c)."""

_NS_PER_S = 1_000_000_000.0


class RateLimit:
    """A limiter of ``speed`` events per second.

    Attributes:
        quota: events per slice; 0 is no limit.
        slice_ns: length of a slice.
        start_ns: when the current slice began.
        end_ns: when the current slice, with what it reserved in advance, ends.
        dispatched: events of the current slice.
    """

    __slots__ = ("dispatched", "end_ns", "quota", "slice_ns", "start_ns")

    def __init__(self, speed: int = 0, slice_ns: int = SLICE_NS) -> None:
        self.start_ns = 0
        self.end_ns = 0
        self.dispatched = 0
        self.set_speed(speed, slice_ns)

    def set_speed(self, speed: int, slice_ns: int = SLICE_NS) -> None:
        """Change the rate; what the current slice has dispatched stays."""
        self.slice_ns = slice_ns
        # ratelimit_set_speed(): MAX(((double)speed * slice_ns) / 1000000000ULL, 1)
        self.quota = max(int(float(speed) * slice_ns / _NS_PER_S), 1) if speed else 0

    def calculate(self, nr_events: int, now_ns: int) -> int:
        """Account for events that have just happened.

        Returns:
            How long the caller has to sleep, in ns.
        """
        if self.quota == 0:
            return 0
        if self.end_ns < now_ns:
            self.start_ns = now_ns
            self.end_ns = now_ns + self.slice_ns
            self.dispatched = 0
        self.dispatched += nr_events
        if self.dispatched < self.quota:
            return 0
        slices = self.dispatched / self.quota
        self.end_ns = self.start_ns + int(slices * self.slice_ns)
        return self.end_ns - now_ns
