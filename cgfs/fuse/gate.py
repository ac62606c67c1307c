"""When a control file may be served from the kernel's page cache.

A CONFIG file changes only when somebody sets it, so between changes the kernel may answer reads
by itself. A change of length is not atomic there: the size (GETATTR) and the page (READ) a reader
combines come from different moments. So no page-cache reader may be in flight while a text
changes. That is what the gate sees to:

* a reader's open of a *quiet* file is counted and cached, of a *hot* one it is direct;
* a file is hot while somebody has it open for writing, while a change that may reach it is under
  way, and QUIET_NS after either ended;
* a writer's open, and any other change, waits until the counted readers have closed, GRACE_NS at
  most. Descriptors still open then are *held*: they are not waited for again, and the file stays
  direct for everybody else until they are closed.

Files are counted by inode and by row name, because a write to one file may change the text of all
files of another name (``CFType.changes``): ``cgroup.subtree_control`` changes
``cgroup.controllers`` of the children.

The gate waits for nothing itself. An opening that must wait gives a `Ticket`; whoever holds it
waits for `Ticket.on_clear` or, at its deadline, calls `Gate.expire`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

QUIET_NS = 250_000_000

# A reader between its open and its close can be kept from running for tens of milliseconds on a
# busy machine; who is overtaken there can read a torn text.
GRACE_NS = 100_000_000
_PURGE_ABOVE = 4096
_Key = TypeVar("_Key", int, str)


class Ticket:
    """A change that waits for page-cache readers to close.

    Attributes:
        deadline_ns: when to call `Gate.expire`.
        waiting: inode and row name of the files that still have readers.
        on_clear: called once, when the last of them has closed.
    """

    __slots__ = ("deadline_ns", "on_clear", "waiting")

    def __init__(self, deadline_ns: int, waiting: dict[int, str]) -> None:
        self.deadline_ns = deadline_ns
        self.waiting = waiting
        self.on_clear: Callable[[], object] = lambda: None

    @property
    def clear(self) -> bool:
        """Whether nothing is left to wait for."""
        return not self.waiting


class Gate:
    """Counts page-cache readers and writers; says who may be cached and who must wait.

    Args:
        clock: monotonic time in nanoseconds.
        quiet_ns: how long a file stays direct after a change.
        grace_ns: how long a change waits for readers at most.
    """

    def __init__(
        self, clock: Callable[[], int], *, quiet_ns: int = QUIET_NS, grace_ns: int = GRACE_NS
    ) -> None:
        self._clock = clock
        self._quiet_ns = quiet_ns
        self._grace_ns = grace_ns
        self._readers: dict[str, dict[int, int]] = {}
        self._held: dict[int, int] = {}
        self._writers: dict[int, int] = {}
        self._changing: dict[str, int] = {}
        # An inode or a row name: hot until then.
        self._hot_until: dict[int | str, int] = {}
        self._tickets: dict[int, list[Ticket]] = {}

    def open_reader(self, ino: int, row: str) -> bool:
        """Whether this open may use the page cache; it is counted then."""
        if ino in self._writers or ino in self._held or row in self._changing:
            return False
        if self._hot_until and (self._is_hot(ino) or self._is_hot(row)):
            return False
        files = self._readers.get(row)
        if files is None:
            files = self._readers[row] = {}
        files[ino] = files.get(ino, 0) + 1
        return True

    def close_reader(self, ino: int, row: str) -> None:
        """A counted reader has closed; unknown ones are ignored."""
        if ino in self._held:
            _count_down(self._held, ino)
            return
        files = self._readers.get(row)
        if files is None or _count_down(files, ino):
            return
        for ticket in self._tickets.pop(ino, ()):
            self._cleared(ticket, ino)

    def open_writer(self, ino: int, row: str) -> Ticket | None:
        """The file is hot from here on; a ticket if readers must close first."""
        self._writers[ino] = self._writers.get(ino, 0) + 1
        return self._park({ino: row} if self.has_readers(ino, row) else {})

    def close_writer(self, ino: int) -> None:
        """A writer has closed; after the last one the quiet time begins."""
        if not _count_down(self._writers, ino):
            self.touch(ino)

    def begin_change(self, rows: Iterable[str]) -> Ticket | None:
        """All files of these rows are hot from here on; a ticket if readers must close first."""
        waiting: dict[int, str] = {}
        for row in rows:
            self._changing[row] = self._changing.get(row, 0) + 1
            waiting.update(dict.fromkeys(self._readers.get(row, ()), row))
        return self._park(waiting)

    def end_change(self, rows: Iterable[str]) -> None:
        """The change has been acknowledged; the quiet time begins."""
        for row in rows:
            if not _count_down(self._changing, row):
                self.touch(row)

    def touch(self, key: int | str) -> None:
        """An inode, or all files of a row, changed: direct for the quiet time."""
        if len(self._hot_until) >= _PURGE_ABOVE:
            self._purge()
        self._hot_until[key] = self._clock() + self._quiet_ns

    def has_readers(self, ino: int, row: str) -> bool:
        """Whether a page-cache reader is open that a change would wait for."""
        files = self._readers.get(row)
        return files is not None and ino in files

    @property
    def has_readers_at_all(self) -> bool:
        """Whether any file has a page-cache reader that a change would wait for."""
        return any(self._readers.values())

    def is_cached(self, ino: int, row: str) -> bool:
        """Whether any page-cache descriptor is open, waited for or not."""
        return ino in self._held or self.has_readers(ino, row)

    def is_held(self, ino: int) -> bool:
        """Whether descriptors are open that outstayed a change."""
        return ino in self._held

    def grace_left_s(self, ticket: Ticket) -> float:
        """How long to wait for a ticket, in seconds."""
        return max(0, ticket.deadline_ns - self._clock()) / 1e9

    def expire(self, ticket: Ticket) -> None:
        """The grace is over: who still reads is not waited for again."""
        for ino, row in ticket.waiting.items():
            count = self._readers[row].pop(ino, 0)
            if count:
                self._held[ino] = self._held.get(ino, 0) + count
            for other in self._tickets.pop(ino, ()):
                if other is not ticket:
                    self._cleared(other, ino)
        ticket.waiting = {}

    def _park(self, waiting: dict[int, str]) -> Ticket | None:
        if not waiting:
            return None
        ticket = Ticket(self._clock() + self._grace_ns, waiting)
        for ino in waiting:
            self._tickets.setdefault(ino, []).append(ticket)
        return ticket

    def _cleared(self, ticket: Ticket, ino: int) -> None:
        ticket.waiting.pop(ino, None)
        if not ticket.waiting:
            ticket.on_clear()

    def _is_hot(self, key: int | str) -> bool:
        until = self._hot_until.get(key)
        if until is None:
            return False
        if self._clock() < until:
            return True
        del self._hot_until[key]
        return False

    def _purge(self) -> None:
        now_ns = self._clock()
        self._hot_until = {key: until for key, until in self._hot_until.items() if until > now_ns}


def _count_down(counts: dict[_Key, int], key: _Key) -> int:
    """Takes one away and drops what reaches zero; how many are left."""
    left = counts.get(key, 0) - 1
    if left > 0:
        counts[key] = left
        return left
    counts.pop(key, None)
    return 0
