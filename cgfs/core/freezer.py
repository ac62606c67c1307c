"""``cgroup.freeze`` and ``cgroup.kill`` (Linux 6.12 kernel/cgroup/freezer.c, cgroup.c).

A process counts as frozen from the moment it is told to stop: between the telling and the stop
it executes no more than the system call it is in. Reading ``cgroup.events`` waits for it.
"""

from __future__ import annotations

from errno import EOPNOTSUPP
from typing import TYPE_CHECKING

from cgfs.core import domain
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.tasks import Task

# A fork bomb may outrun the search for children; the kernel holds the fork lock instead.
_ROUNDS = 100


def set_freeze(cgrp: Cgroup, freeze: bool, now_ns: int) -> None:
    """Change the cgroup's own setting; an unchanged one generates no event."""
    if cgrp.freeze == freeze:
        return
    cgrp.hierarchy.roots.processes.sync()
    cgrp.freeze = freeze
    applied = False
    for dsct in cgrp.subtree():
        dsct.e_freeze += 1 if freeze else -1
        if dsct.e_freeze == (1 if freeze else 0):
            _apply(dsct, freeze=freeze, now_ns=now_ns)
            applied = True
    if not applied:
        # freezer.c: "Even if the actual state hasn't changed, let's notify a user."
        cgrp.notify("cgroup.events")


def _apply(cgrp: Cgroup, *, freeze: bool, now_ns: int) -> None:
    tasks = cgrp.hierarchy.roots.tasks
    for task in _tasks_in(cgrp):
        if freeze:
            tasks.freeze(task, now_ns)
        else:
            tasks.thaw(task, now_ns)
    cgrp.notify("cgroup.events")


def _tasks_in(cgrp: Cgroup) -> list[Task]:
    return list(
        {task.pid: task for task in (*cgrp.members.values(), *cgrp.strays.values())}.values()
    )


def is_frozen(cgrp: Cgroup, caller: Caller) -> bool:
    """What ``cgroup.events`` shows: told to freeze, and every real process has stopped.

    The caller itself is not waited for: it is in the middle of the read.
    """
    if not cgrp.e_freeze:
        return False
    roots = cgrp.hierarchy.roots
    asking = roots.tgid_of(caller.pid)
    stopped: set[int] = set()
    # A process may have forked after the last look and before it stopped.
    for _ in range(_ROUNDS):
        found = [task for dsct in cgrp.inhabited() for task in _tasks_in(dsct)]
        running = [task for task in found if task.pid not in stopped]
        if not running:
            return True
        if not all(
            task.emulated or task.pid == asking or roots.processes.is_frozen(task.pid)
            for task in running
        ):
            return False
        stopped.update(task.pid for task in running)
        roots.processes.sync()
    return False


def kill(cgrp: Cgroup, now_ns: int) -> None:
    """SIGKILL every process of the subtree, children forked meanwhile included.

    Raises:
        CgroupError: EOPNOTSUPP in a threaded cgroup.
    """
    if domain.is_threaded(cgrp):
        raise CgroupError(EOPNOTSUPP)
    roots = cgrp.hierarchy.roots
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        roots.processes.sync()
        found = {
            task.pid: task
            for dsct in cgrp.inhabited()
            for task in _tasks_in(dsct)
            if task.pid not in killed
        }
        if not found:
            return
        for task in found.values():
            if roots.tasks.get(task.pid) is task:  # it may have ended with one before it
                roots.tasks.kill(task, now_ns)
        killed.update(found)
