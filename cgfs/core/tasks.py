"""Processes and threads, and the cgroup of each in every hierarchy.

A real process is tracked only while it is outside the root of some hierarchy; all others are
members of the roots. A thread is tracked by itself only while its cgroup differs from that of
its thread group leader, which takes a threaded cgroup or v1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cgfs.core.cgroup import Cgroup
    from cgfs.core.hierarchy import Hierarchy

# Linux PID_MAX_LIMIT on 64-bit: no real process has a number from here on.
FIRST_EMULATED_PID = 4194304


@dataclass(frozen=True, slots=True)
class RealTask:
    """What /proc tells of a thread.

    Attributes:
        tid: thread id.
        tgid: its process.
        kthread: a kernel thread that must not be moved.
        zombie: no thread of the process lives.
        state: state letter of the thread.
        uid: real user id.
        suid: saved user id.
    """

    tid: int
    tgid: int
    kthread: bool
    zombie: bool
    state: str
    uid: int
    suid: int


class Processes(Protocol):
    """What the model asks about real processes."""

    def sync(self) -> None:
        """Bring pending forks and exits into the task table."""

    def find(self, tid: int) -> RealTask | None:
        """Look a thread up; None when there is none, not even a zombie."""

    def tgids(self) -> list[int]:
        """All live processes, ascending, kernel threads included."""

    def threads(self, tgid: int) -> list[int]:
        """Live threads of a process, ascending."""

    def from_caller(self, caller_tid: int, number: int) -> int | None:
        """A pid as the caller's pid namespace numbers it, in ours; None when there is none."""

    def to_caller(self, caller_tid: int, pid: int) -> int:
        """One of our pids as the caller's pid namespace shows it; 0 when invisible there."""

    def kill(self, tgid: int) -> None:
        """Send SIGKILL; a process that is gone is no error."""

    def freeze(self, tgid: int) -> None:
        """Stop a process, remembering whether it was stopped before."""

    def thaw(self, tgid: int) -> None:
        """Let it go on, unless it was stopped before."""

    def is_frozen(self, tgid: int) -> bool:
        """Whether it is stopped or traced; may wait a few milliseconds for that."""

    def watch(self, tgid: int) -> None:
        """The model tracks this process from here on."""

    def unwatch(self, tgid: int) -> None:
        """The model does not track it any longer."""


class NoProcesses:
    """A host without real processes: only emulated ones can be members."""

    def sync(self) -> None:
        """Do nothing."""

    def find(self, tid: int) -> RealTask | None:
        """Find none."""

    def tgids(self) -> list[int]:
        """No process."""
        return []

    def threads(self, tgid: int) -> list[int]:
        """No thread."""
        return []

    def from_caller(self, caller_tid: int, number: int) -> int | None:
        """One pid namespace."""
        return number

    def to_caller(self, caller_tid: int, pid: int) -> int:
        """One pid namespace."""
        return pid

    def kill(self, tgid: int) -> None:
        """Do nothing."""

    def freeze(self, tgid: int) -> None:
        """Do nothing."""

    def thaw(self, tgid: int) -> None:
        """Do nothing."""

    def is_frozen(self, tgid: int) -> bool:
        """Nothing runs."""
        return True

    def watch(self, tgid: int) -> None:
        """Do nothing."""

    def unwatch(self, tgid: int) -> None:
        """Do nothing."""


class TaskOwner(Protocol):
    """Who stands behind an emulated process."""

    def killed(self, now_ns: int) -> None:
        """The process got SIGKILL: end it, and with it what it holds."""

    def frozen(self, frozen: bool, now_ns: int) -> None:
        """Its cgroup was frozen or thawed."""

    def moved(self, now_ns: int) -> None:
        """It is in another cgroup."""


class Task:
    """A process the model tracks.

    Attributes:
        pid: process id (thread group id).
        owner: who stands behind an emulated process; None for a real one.
        places: cgroup of the thread group leader per hierarchy; a hierarchy that is missing
            means its root.
        strays: threads whose cgroup differs from the leader's, per thread id and hierarchy.
        frozen: whether it was told to stop.
    """

    __slots__ = ("frozen", "owner", "pid", "places", "strays")

    def __init__(self, pid: int, owner: TaskOwner | None = None) -> None:
        self.pid = pid
        self.owner = owner
        self.places: dict[Hierarchy, Cgroup] = {}
        self.strays: dict[int, dict[Hierarchy, Cgroup]] = {}
        self.frozen = False

    @property
    def emulated(self) -> bool:
        """Whether no real process stands behind it."""
        return self.owner is not None

    def place(self, hierarchy: Hierarchy, tid: int | None = None) -> Cgroup:
        """The cgroup of the leader, or of one thread."""
        if tid is not None and (stray := self.strays.get(tid, {}).get(hierarchy)) is not None:
            return stray
        return self.places.get(hierarchy, hierarchy.root)

    def cgroups(self) -> set[Cgroup]:
        """Every cgroup the leader or another thread was put into."""
        return {*self.places.values(), *(c for own in self.strays.values() for c in own.values())}

    def strays_in(self, hierarchy: Hierarchy) -> Iterator[tuple[int, Cgroup]]:
        """(tid, cgroup) of the threads placed by themselves in one hierarchy."""
        for tid, places in self.strays.items():
            if hierarchy in places:
                yield tid, places[hierarchy]


class TaskTable:
    """All tracked processes of a host.

    Attributes:
        processes: who knows the real ones.
        followers: pid of a real process -> who hears what a cgroup does to it, beside itself.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.followers: dict[int, list[TaskOwner]] = {}
        self._tasks: dict[int, Task] = {}
        self._next_emulated_pid = FIRST_EMULATED_PID

    def get(self, pid: int) -> Task | None:
        """The tracked process of that number."""
        return self._tasks.get(pid)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    def track(self, tgid: int) -> Task:
        """The task of a real process, tracked from here on if it was not."""
        task = self._tasks.get(tgid)
        if task is None:
            task = self._tasks[tgid] = Task(tgid)
            self.processes.watch(tgid)
        return task

    def spawn(self, owner: TaskOwner) -> Task:
        """Make an emulated process, in no cgroup yet."""
        task = Task(self._next_emulated_pid, owner)
        self._next_emulated_pid += 1
        self._tasks[task.pid] = task
        return task

    def release(self, task: Task) -> None:
        """Forget a real process that is in the roots only."""
        if not task.emulated and not task.places and not task.strays:
            self._drop(task)

    def threads_apart(self) -> list[tuple[int, int]]:
        """(tid, tgid) of every thread that is placed by itself in some hierarchy."""
        return [(tid, task.pid) for task in self._tasks.values() for tid in task.strays]

    def _drop(self, task: Task) -> None:
        if self._tasks.pop(task.pid, None) is not None and not task.emulated:
            self.processes.unwatch(task.pid)

    def forked(
        self, parent_tid: int, parent_tgid: int, child_tid: int, child_tgid: int, now_ns: int
    ) -> None:
        """A real thread was cloned: it joins the cgroups of the thread that cloned it."""
        parent = self._tasks.get(parent_tgid)
        if parent is None:
            return
        if child_tgid == parent_tgid:
            for hierarchy, cgrp in list(parent.strays.get(parent_tid, {}).items()):
                cgrp.add_stray(parent, child_tid, now_ns)
                parent.strays.setdefault(child_tid, {})[hierarchy] = cgrp
            return
        if child_tgid in self._tasks:
            return
        places = {**parent.places, **parent.strays.get(parent_tid, {})}
        places = {h: cgrp for h, cgrp in places.items() if cgrp is not h.root}
        if not places:
            return
        child = self.track(child_tgid)
        for hierarchy, cgrp in places.items():
            child.places[hierarchy] = cgrp
            cgrp.add_member(child, now_ns)

    def exited(self, tid: int, tgid: int, now_ns: int) -> None:
        """A real thread ended, or with ``tid == tgid`` a whole process, which leaves its cgroups.

        The end of one thread never ends the process here, even if by now no thread lives: forks
        that the others made before they died are still to be told.
        """
        task = self._tasks.get(tgid)
        if task is None or task.emulated:
            return
        for cgrp in task.strays.pop(tid, {}).values():
            cgrp.remove_stray(tid, now_ns)
        self.thaw(task, now_ns)
        if tid == tgid and not self.processes.threads(tgid):
            self.exit(task, now_ns)
        else:
            self.release(task)

    def stopped(self, tgid: int) -> None:
        """A frozen process that still ran when somebody asked stands still at last."""
        task = self._tasks.get(tgid)
        if task is None:
            return
        frozen = {a: None for cgrp in task.cgroups() for a in cgrp.ancestors() if a.e_freeze}
        for cgrp in frozen:
            cgrp.notify("cgroup.events")

    def exit(self, task: Task, now_ns: int) -> None:
        """A process ends: it leaves every cgroup."""
        for tid, places in list(task.strays.items()):
            for cgrp in places.values():
                cgrp.remove_stray(tid, now_ns)
        task.strays.clear()
        task.frozen = False
        self._drop(task)
        for cgrp in list(task.places.values()):
            cgrp.remove_member(task, now_ns)
        task.places.clear()
        for follower in self._followers(task):
            follower.moved(now_ns)

    def move(self, task: Task, dst: Cgroup, now_ns: int) -> None:
        """Put a whole process into a cgroup of some hierarchy.

        A leader that has exited stays behind when its threads move (Linux 6.12 cgroup.c
        cgroup_migrate_add_task(): "@task either already exited or can't exit until the end").
        """
        threads = self.threads(task)
        if threads and task.pid not in threads:
            for tid in threads:
                self.move_thread(task, tid, dst, now_ns)
            return
        hierarchy = dst.hierarchy
        src = task.place(hierarchy)
        strays = list(task.strays_in(hierarchy))
        if src is not dst:
            self._relocate(task, src, dst, now_ns)
        for tid, cgrp in strays:
            self._unstray(task, tid, cgrp, now_ns)
        self.thaw(task, now_ns)
        self.release(task)

    def _relocate(self, task: Task, src: Cgroup, dst: Cgroup, now_ns: int) -> None:
        """Move the leader; joining before leaving keeps common ancestors populated all the time.

        As Linux 6.12 cgroup.c css_set_move_task(): such ancestors generate no event.
        """
        if dst is dst.hierarchy.root and not task.emulated:
            task.places.pop(dst.hierarchy, None)
        else:
            task.places[dst.hierarchy] = dst
            dst.add_member(task, now_ns)
        if task.pid in src.members:
            src.remove_member(task, now_ns)
        self.thaw(task, now_ns)
        if task.owner is not None:
            task.owner.moved(now_ns)
        for follower in self._followers(task):
            follower.moved(now_ns)

    def _followers(self, task: Task) -> tuple[TaskOwner, ...]:
        """A copy: one who hears something may stop following."""
        return tuple(self.followers.get(task.pid, ()))

    def follow(self, pid: int, follower: TaskOwner) -> None:
        """Tell somebody besides what happens to a real process."""
        self.followers.setdefault(pid, []).append(follower)

    def unfollow(self, pid: int, follower: TaskOwner) -> None:
        """Tell them no longer."""
        remaining = self.followers[pid]
        remaining.remove(follower)
        if not remaining:
            del self.followers[pid]

    def move_thread(self, task: Task, tid: int, dst: Cgroup, now_ns: int) -> None:
        """Put one thread of a real process into a cgroup; one that has exited stays behind."""
        hierarchy = dst.hierarchy
        src = task.place(hierarchy, tid)
        if src is dst or tid not in self.processes.threads(task.pid):
            self.release(task)
            return
        if tid == task.pid:
            for other in self.processes.threads(task.pid):
                if other != tid and hierarchy not in task.strays.get(other, {}):
                    self._stray(task, other, src, now_ns)
            self._relocate(task, src, dst, now_ns)
            for other, cgrp in list(task.strays_in(hierarchy)):
                if cgrp is dst:
                    self._unstray(task, other, cgrp, now_ns)
        elif dst is task.place(hierarchy):
            self._unstray(task, tid, src, now_ns)
        else:
            was_apart = hierarchy in task.strays.get(tid, {})
            self._stray(task, tid, dst, now_ns)
            if was_apart:
                src.remove_stray(tid, now_ns)
        self.thaw(task, now_ns)
        self.release(task)

    def _stray(self, task: Task, tid: int, cgrp: Cgroup, now_ns: int) -> None:
        task.strays.setdefault(tid, {})[cgrp.hierarchy] = cgrp
        cgrp.add_stray(task, tid, now_ns)

    def _unstray(self, task: Task, tid: int, cgrp: Cgroup, now_ns: int) -> None:
        places = task.strays[tid]
        del places[cgrp.hierarchy]
        if not places:
            del task.strays[tid]
        cgrp.remove_stray(tid, now_ns)

    def freeze(self, task: Task, now_ns: int) -> bool:
        """Stop a process of a frozen cgroup; False if it was told before."""
        if task.frozen:
            return False
        task.frozen = True
        if task.owner is not None:
            task.owner.frozen(frozen=True, now_ns=now_ns)
        else:
            self.processes.freeze(task.pid)
        for follower in self._followers(task):
            follower.frozen(frozen=True, now_ns=now_ns)
        return True

    def thaw(self, task: Task, now_ns: int) -> None:
        """Let it go on, unless it or one of its threads is in a frozen cgroup.

        Where Linux stops single threads, here the whole process stands still.
        """
        if not task.frozen or any(cgrp.e_freeze for cgrp in task.cgroups()):
            return
        task.frozen = False
        if task.owner is not None:
            task.owner.frozen(frozen=False, now_ns=now_ns)
        else:
            self.processes.thaw(task.pid)
        for follower in self._followers(task):
            follower.frozen(frozen=False, now_ns=now_ns)

    def kill(self, task: Task, now_ns: int) -> None:
        """SIGKILL."""
        if task.owner is not None:
            task.owner.killed(now_ns)
        else:
            self.processes.kill(task.pid)
        for follower in self._followers(task):
            follower.killed(now_ns)

    def threads(self, task: Task) -> list[int]:
        """Thread ids of a tracked process."""
        return [task.pid] if task.emulated else self.processes.threads(task.pid)
