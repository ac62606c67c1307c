"""Where news of forks comes from: what the process connector and the scan have in common."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol


class Fork(NamedTuple):
    """A new task.

    Attributes:
        parent_tid: the thread that forked. For a new thread its process, since the kernel reports
            the parent of the process instead of the creating thread.
        parent_tgid: that thread's process.
        child_tid: the new task.
        child_tgid: its process; differs from `child_tid` for a new thread.
    """

    parent_tid: int
    parent_tgid: int
    child_tid: int
    child_tgid: int


class ThreadExit(NamedTuple):
    """A thread other than the leader has died."""

    tid: int
    tgid: int


class ForkSource(Protocol):
    """Reports what watched processes do, in the order in which it happened.

    `watched` maps the process ids of interest to the clock tick since boot from which on their
    children count.
    It may grow and shrink while `read` iterates.

    Attributes:
        reports_threads: new threads and their exits are news too.
    """

    reports_threads: bool

    def describe(self) -> str:
        """One line for a person: what it is, and what it misses."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that becomes readable with news; None if `read` has to be called to see."""
        ...

    def start(self) -> None:
        """From now on `read` must know of every fork. Not called twice without `stop`."""
        ...

    def stop(self) -> None:
        """Nobody is interested for now."""
        ...

    def read(self, watched: Mapping[int, int]) -> Iterator[Fork | ThreadExit]:
        """The news since the last call; never blocks."""
        ...

    def close(self) -> None:
        """Let go of all descriptors."""
        ...
