"""How often an events file wakes its watchers.

The first event is told at once; those of the following 10 ms are told as one at the end of that
time (Linux 6.12 kernel/cgroup/cgroup.c, CGROUP_FILE_NOTIFY_MIN_INTV; spec C.9).
"""

from __future__ import annotations

from collections import deque

INTERVAL_NS = 10_000_000


class EventRate:
    """Decides when events are told; keeps no clock.

    Args:
        interval_ns: shortest time between two tellings of one file.
    """

    def __init__(self, interval_ns: int = INTERVAL_NS) -> None:
        self._interval_ns = interval_ns
        # Files told less than an interval ago: whether more events have come since.
        self._waiting: dict[int, bool] = {}
        # The same files, by the end of their interval.
        self._ends: deque[tuple[int, int]] = deque()

    def event(self, ino: int, now_ns: int) -> bool:
        """Whether an event is to be told at once; else it is due at the interval's end."""
        if ino in self._waiting:
            self._waiting[ino] = True
            return False
        self._begin(ino, now_ns)
        return True

    def due(self, now_ns: int) -> list[int]:
        """Files whose merged event is to be told."""
        told = []
        while self._ends and self._ends[0][0] <= now_ns:
            _, ino = self._ends.popleft()
            if self._waiting.pop(ino):
                told.append(ino)
        for ino in told:
            self._begin(ino, now_ns)
        return told

    def next_due_ns(self) -> int | None:
        """When to ask again; None while no file has an interval running."""
        return self._ends[0][0] if self._ends else None

    def _begin(self, ino: int, now_ns: int) -> None:
        self._waiting[ino] = False
        self._ends.append((now_ns + self._interval_ns, ino))
