"""Moving processes and threads: writes to ``cgroup.procs``, ``cgroup.threads`` and ``tasks``.

Linux 6.12 kernel/cgroup/cgroup.c __cgroup_procs_write() and cgroup-v1.c __cgroup1_procs_write().
"""

from __future__ import annotations

from errno import EACCES, EINVAL, ENODEV, EOPNOTSUPP, ESRCH
from typing import TYPE_CHECKING, NamedTuple

from cgfs.core import domain
from cgfs.core.parse import parse_s32, strip
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.roots import Roots
    from cgfs.core.tasks import Task


class Target(NamedTuple):
    """The process or thread a number names."""

    tgid: int
    tid: int
    uids: frozenset[int]
    gone: bool


def write(dst: Cgroup, text: bytes, opener: Caller, now_ns: int, *, thread: bool) -> None:
    """Move the process or thread whose number was written.

    Raises:
        CgroupError: ENODEV, EINVAL, ESRCH, EACCES, EOPNOTSUPP or EBUSY, in this order of checks.
    """
    if dst.dead:
        raise CgroupError(ENODEV)
    try:
        number = parse_s32(strip(text))
    except CgroupError:
        raise CgroupError(EINVAL) from None
    if number < 0:
        raise CgroupError(EINVAL)
    attach(dst, number, opener, now_ns, thread=thread)


def attach(dst: Cgroup, number: int, opener: Caller, now_ns: int, *, thread: bool = False) -> None:
    """The same for a number; 0 names the opener.

    Raises:
        CgroupError: as :func:`write`.
    """
    roots = dst.hierarchy.roots
    roots.processes.sync()
    target = _find(roots, number, opener)
    task = roots.tasks.get(target.tgid)
    tid = target.tid if thread else None
    src = task.place(dst.hierarchy, tid) if task else dst.hierarchy.root
    _authorize(src, dst, target, opener)
    domain.vet_destination(dst)
    if thread and dst.hierarchy.version == 2 and src.dom is not dst.dom:
        raise CgroupError(EOPNOTSUPP)
    if target.gone:
        return
    _move(roots, target, task, dst, now_ns, thread=thread)


def _find(roots: Roots, number: int, opener: Caller) -> Target:
    task = roots.tasks.get(number)
    if task is not None and task.emulated:
        return Target(number, number, frozenset({0}), gone=False)
    pid = opener.pid if number == 0 else roots.processes.from_caller(opener.pid, number)
    found = None if pid is None else roots.processes.find(pid)
    if found is None:
        raise CgroupError(ESRCH)
    if found.kthread:
        raise CgroupError(EINVAL)
    return Target(found.tgid, found.tid, frozenset({found.uid, found.suid}), gone=found.zombie)


def _authorize(src: Cgroup, dst: Cgroup, target: Target, opener: Caller) -> None:
    if dst.hierarchy.version == 1:
        if opener.uid != 0 and opener.uid not in target.uids:
            raise CgroupError(EACCES)
        return
    common = src
    while not dst.is_descendant_of(common):
        assert common.parent is not None  # the root is everybody's ancestor
        common = common.parent
    if not common.may_write(dst.hierarchy.core_slots["cgroup.procs"], opener):
        raise CgroupError(EACCES)


def _move(
    roots: Roots, target: Target, task: Task | None, dst: Cgroup, now_ns: int, *, thread: bool
) -> None:
    if task is None:
        if dst.is_root:
            return
        task = roots.tasks.track(target.tgid)
    if thread and not task.emulated:
        roots.tasks.move_thread(task, target.tid, dst, now_ns)
    else:
        roots.tasks.move(task, dst, now_ns)
