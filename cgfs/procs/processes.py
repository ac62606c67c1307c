"""Real processes, as the model sees them.

`RealProcesses` answers the model's questions from /proc, and tells the model's task table about the
forks and exits of the processes it watches. `sync` is where news is delivered; the model calls it
before every question about membership, `cgfs.procs.watch` when there is news.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cgfs.core.tasks import RealTask
from cgfs.procs import proc
from cgfs.procs.forks import Fork, ForkSource
from cgfs.procs.freezer import Freezer
from cgfs.procs.killer import Killer
from cgfs.procs.namespaces import Namespaces
from cgfs.procs.pidfds import Pidfds
from cgfs.procs.scan import clock_ticks

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 64  # one round delivers a generation of children that died before they were seen


class Members(Protocol):
    """Who is told about forks and exits: the model's `TaskTable`."""

    def forked(
        self, parent_tid: int, parent_tgid: int, child_tid: int, child_tgid: int, now_ns: int
    ) -> None:
        """A watched process has made a task; calls `watch` if that is to be watched too."""
        ...

    def stopped(self, tgid: int) -> None:
        """A frozen process that still ran when somebody asked stands still at last."""
        ...

    def threads_apart(self) -> list[tuple[int, int]]:
        """(tid, tgid) of threads whose own exit matters."""
        ...

    def exited(self, tid: int, tgid: int, now_ns: int) -> None:
        """A thread of a watched process is gone; with `tid == tgid` the whole process."""
        ...


class RealProcesses:
    """The `Processes` of a host whose tasks are real.

    Args:
        forks: where news of forks comes from.
        clock: nanoseconds, the model's `now_ns`.
        members: whom to tell; may be set later, before anything is watched.
    """

    def __init__(
        self, forks: ForkSource, clock: Callable[[], int], members: Members | None = None
    ) -> None:
        self.members = members
        self._forks = forks
        self._clock = clock
        self._pidfds = Pidfds()
        self._freezer = Freezer(self._pidfds)
        self._killer = Killer(self._pidfds)
        self._namespaces = Namespaces()
        self._watched: dict[int, int] = {}  # tgid -> clock ticks; its children since then count
        self._stillborn: set[int] = set()  # gone before the watch began
        self._departing = 0  # the process whose exit is being told
        self._listening = False
        self._syncing = False

    def describe(self) -> str:
        """One line for a person: how forks are followed."""
        return self._forks.describe()

    def fileno(self) -> int:
        """Readable when `sync` has something to deliver, as far as that can be waited for."""
        return self._pidfds.fileno()

    def close(self) -> None:
        """Let all frozen processes go on, and let go of all processes and descriptors."""
        self._freezer.thaw_all()
        self._watched.clear()
        self._forks.close()
        self._pidfds.close()

    # What the model asks.

    def sync(self) -> None:
        """Deliver every fork and exit that has happened."""
        self._namespaces.forget()
        if self._syncing or not (self._watched or self._listening):
            return
        self._syncing = True
        try:
            self._listen(wanted=bool(self._watched))
            for _ in range(ROUNDS):
                if not self._deliver():
                    break
        finally:
            self._syncing = False

    def find(self, tid: int) -> RealTask | None:
        """The task with this id, a thread or a process."""
        stat = proc.read_stat(tid)
        status = proc.read_status(tid)
        if stat is None or status is None:
            return None
        return RealTask(
            tid=tid,
            tgid=status.tgid,
            kthread=stat.pinned,
            zombie=stat.state in proc.DEAD_STATES and not proc.process_alive(status.tgid),
            state=stat.state,
            uid=status.ruid,
            suid=status.suid,
        )

    def tgids(self) -> list[int]:
        """Every process with a live thread, ascending, kernel threads included."""
        return proc.live_tgids()

    def threads(self, tgid: int) -> list[int]:
        """The live threads of a process, ascending.

        A watched process that is gone has none, even if its number is in use again.
        """
        if tgid == self._departing or tgid in self._stillborn:
            return []
        return proc.live_threads(tgid)

    def from_caller(self, caller_tid: int, number: int) -> int | None:
        """The task that the caller knows as `number`."""
        return self._namespaces.from_caller(caller_tid, number)

    def to_caller(self, caller_tid: int, pid: int) -> int:
        """The number by which the caller knows a task, 0 if it cannot see it."""
        return self._namespaces.to_caller(caller_tid, pid)

    def kill(self, tgid: int) -> None:
        """Send SIGKILL, also to children of it that are not known yet."""
        self._killer.kill(tgid)

    def freeze(self, tgid: int) -> None:
        """Make a process stand still as soon as it can; does not wait."""
        self._freezer.freeze(tgid)
        if tgid in self._watched:
            self._pidfds.wake()

    def thaw(self, tgid: int) -> None:
        """Undo `freeze`."""
        self._freezer.thaw(tgid)

    def is_frozen(self, tgid: int) -> bool:
        """Whether a process stands still; waits some ms if it was frozen just now."""
        return self._freezer.is_frozen(tgid)

    def watch(self, tgid: int) -> None:
        """Tell `members` about the forks and the exit of this process from here on.

        Tells nothing at once, not even about a process that is gone by now: the caller is about to
        make it a member.
        """
        if tgid in self._watched:
            return
        self._listen(wanted=True)
        self._watched[tgid] = clock_ticks()
        if not self._pidfds.add(tgid):
            self._stillborn.add(tgid)
            self._pidfds.wake()

    def unwatch(self, tgid: int) -> None:
        """Nobody is interested any more. A frozen process stays as it is."""
        if self._watched.pop(tgid, None) is not None:
            self._pidfds.discard(tgid)
            self._stillborn.discard(tgid)
            self._killer.forget(tgid)

    # News.

    def woken(self) -> None:
        """Whoever waits for `fileno` is awake, and about to `sync`.

        Apart from `sync`, because a question of the model must not take the waiter's wake-up away.
        """
        self._pidfds.woken()

    @property
    def must_look(self) -> bool:
        """Whether there may be news that does not make `fileno` readable."""
        return bool(self._watched) and self._forks.fileno() is None

    @property
    def nr_frozen(self) -> int:
        """How many processes are to stand still."""
        return len(self._freezer)

    def enforce_frozen(self) -> None:
        """Stop frozen processes that were continued, let end those that a signal should end."""
        for tgid in self._freezer.enforce():
            if self.members is not None:
                self.members.stopped(tgid)

    def _listen(self, *, wanted: bool) -> None:
        """Follow forks only while somebody is watched: it costs the whole machine a little."""
        if wanted == self._listening:
            return
        self._listening = wanted
        fd = self._forks.fileno()
        if wanted:
            self._forks.start()
            self._pidfds.wake()  # whoever waits may have to look from here on
            if fd is not None:
                self._pidfds.join(fd)
        else:
            if fd is not None:
                self._pidfds.leave(fd)
            self._forks.stop()

    def _deliver(self) -> bool:
        """Deliver what has happened by now; whether there was anything.

        Who is gone is asked first and told last: the forks of a process that is gone by then are
        all in the news that is read in between.
        """
        gone = [*self._pidfds.gone(), *self._stillborn]
        if not self._watched:
            return False
        delivered = bool(gone)
        for news in self._forks.read(self._watched):
            delivered = True
            if isinstance(news, Fork):
                self._forked(news)
            elif self.members is not None:
                self.members.exited(news.tid, news.tgid, self._clock())
        if not self._forks.reports_threads:
            self._look_for_dead_threads()
        for tgid in gone:
            if tgid in self._watched and not self._pidfds.alive(
                tgid
            ):  # not replaced by a new process of this number
                self._gone(tgid)
        return delivered

    def _look_for_dead_threads(self) -> None:
        if self.members is None:
            return
        for tid, tgid in self.members.threads_apart():
            if proc.state(f"/proc/{tgid}/task/{tid}/stat") in proc.DEAD_STATES | {None}:
                self.members.exited(tid, tgid, self._clock())

    def _forked(self, fork: Fork) -> None:
        child = fork.child_tgid
        if fork.child_tid == child and child in self._watched:
            if self._pidfds.alive(child):  # found by a scan before its message was read
                return
            self._gone(child)  # the number has been given to a new process
        if fork.parent_tgid not in self._watched or self.members is None:
            return
        self.members.forked(*fork, self._clock())
        if fork.child_tid == child:
            if child in self._watched:
                # All its children count: they are younger than it, and may be older than this look.
                self._watched[child] = self._watched[fork.parent_tgid]
            self._killer.forked(fork.parent_tgid, child)

    def _gone(self, tgid: int) -> None:
        """A watched process is gone."""
        self.unwatch(tgid)
        self._freezer.forget(tgid)
        if self.members is not None:
            self._departing = tgid
            self.members.exited(tgid, tgid, self._clock())
            self._departing = 0
