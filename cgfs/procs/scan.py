"""Forks found by looking, where the process connector is missing or not permitted.

The kernel numbers processes upwards, and /proc/loadavg ends with the number it gave last. So a look
costs one small read while nothing forked, and otherwise one more for each new number. Where that
number is not to be had (lxcfs puts its own loadavg there), every process is read at every look.

What is lost: a child is known by its parent's number, which changes when the parent exits. A
process whose parent exits between two looks is taken for a child of init and leaves its cgroup
unnoticed; daemons that fork twice do this on purpose. Looks happen before every question about
membership and every `LOOK_EVERY_S` in between (`cgfs.procs.watch`). New threads are not reported,
and a child counts as that of its process, not of one thread.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping

from cgfs.procs import proc
from cgfs.procs.forks import Fork, ForkSource, ThreadExit

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
LOOK_EVERY_S = 0.02


def clock_ticks() -> int:
    """The time in the unit and on the clock of a process's start time."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_SECOND)


def children_since(watched: Mapping[int, int], since_ticks: int) -> Iterator[Fork]:
    """Unwatched descendants of watched processes that began no earlier than both watch and `since`.

    Reads every process of the machine.

    Yields:
        parents before children, provided that the caller adds each to `watched` at once.
    """
    orphans = [
        stat
        for pid in proc.all_pids()
        if pid not in watched
        and (stat := proc.read_stat(pid)) is not None
        and stat.start_ticks >= since_ticks
    ]
    # A child may carry a lower number than its parent where numbering started again, hence the
    # passes: each finds the next generation.
    found = True
    while found and orphans:
        found = False
        rest = []
        for stat in orphans:
            began = watched.get(stat.ppid)
            if began is not None and stat.start_ticks >= began:
                found = True
                yield Fork(stat.ppid, stat.ppid, stat.tid, stat.tid)
            else:
                rest.append(stat)
        orphans = rest


class ForkScan(ForkSource):
    """Forks from looking at /proc."""

    reports_threads = False

    def __init__(self) -> None:
        self._cursor_works = _cursor_moves()
        self._cursor = 0
        self._since_ticks = 0

    def describe(self) -> str:
        """One line for a person."""
        return (
            "scan: children are found by their parent's pid; "
            "one whose parent exits within 20 ms of the fork may be missed"
        )

    def fileno(self) -> None:
        """Nothing to wait for."""

    def start(self) -> None:
        """Forks from here on count."""
        self._cursor = last_pid()
        self._since_ticks = clock_ticks()

    def stop(self) -> None:
        """Nothing runs between looks."""

    def close(self) -> None:
        """Nothing is held."""

    def read(self, watched: Mapping[int, int]) -> Iterator[Fork | ThreadExit]:
        """Look for children that began since the last look."""
        before = self._cursor
        if self._cursor_works:
            self._cursor = last_pid()
            if self._cursor == before:
                return
        begin_ticks = clock_ticks()
        if self._cursor_works and before < self._cursor < before + 1000:
            yield from self._new_pids(before, watched)
        else:
            yield from children_since(watched, self._since_ticks)
        self._since_ticks = begin_ticks

    def _new_pids(self, after: int, watched: Mapping[int, int]) -> Iterator[Fork]:
        """Children among the numbers given out since `after`, in the order of their birth."""
        for pid in range(after + 1, self._cursor + 1):
            if pid in watched:
                continue
            stat = proc.read_stat(pid)
            if stat is None or stat.ppid not in watched:
                continue
            status = proc.read_status(pid)  # threads have numbers too, and their process's parent
            if status is not None and status.tgid == pid:
                yield Fork(stat.ppid, stat.ppid, pid, pid)


def last_pid() -> int:
    """The process number given out last in our pid namespace; 0 if unknown."""
    text = proc.slurp("/proc/loadavg")
    try:
        return int(text.rsplit(None, 1)[1]) if text else 0
    except (IndexError, ValueError):
        return 0


def _cursor_moves() -> bool:
    """Whether `last_pid` sees a new thread of our own."""
    before = last_pid()
    born: list[int] = []
    thread = threading.Thread(target=lambda: born.append(threading.get_native_id()))
    thread.start()
    thread.join()
    after = last_pid()
    # Others may have forked meanwhile, and numbering may have started again.
    return before != after and (before < born[0] <= after or after < before)
