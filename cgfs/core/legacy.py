"""The core files of v1: one row each (Linux 6.12 kernel/cgroup/cgroup-v1.c)."""

from __future__ import annotations

import os
from errno import EPERM
from typing import TYPE_CHECKING

from cgfs.core import attach, files
from cgfs.core.cftype import PAGE_SIZE, CFType, Kind, On
from cgfs.core.parse import U64_MAX, parse_unsigned, strip
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup


def _pid_lines(cgrp: Cgroup, pids: Iterable[int], caller: Caller) -> str:
    roots = cgrp.hierarchy.roots
    shown = set()
    for pid in pids:
        task = roots.tasks.get(pid)
        emulated = task is not None and task.emulated
        shown.add(pid if emulated else roots.processes.to_caller(caller.pid, pid))
    return "".join(f"{pid}\n" for pid in sorted(shown - {0}))


def _procs_show(cgrp: Cgroup, caller: Caller) -> str:
    cgrp.hierarchy.roots.processes.sync()
    apart = [task.pid for task in cgrp.strays.values()]
    return _pid_lines(cgrp, [*files.process_ids(cgrp), *apart], caller)


def _procs_write(cgrp: Cgroup, text: bytes, opener: Caller, now_ns: int) -> None:
    attach.write(cgrp, text, opener, now_ns, thread=False)


def _tasks_show(cgrp: Cgroup, caller: Caller) -> str:
    cgrp.hierarchy.roots.processes.sync()
    return _pid_lines(cgrp, files.thread_ids(cgrp), caller)


def _tasks_write(cgrp: Cgroup, text: bytes, opener: Caller, now_ns: int) -> None:
    attach.write(cgrp, text, opener, now_ns, thread=True)


def _flag_write(text: bytes) -> bool:
    # cgroup-v1.c takes these as u64 rows: the text is not stripped.
    return bool(parse_unsigned(text, U64_MAX))


def _notify_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{int(cgrp.notify_on_release)}\n"


def _notify_write(cgrp: Cgroup, text: bytes, _opener: Caller, _now_ns: int) -> None:
    cgrp.notify_on_release = _flag_write(text)


def _clone_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{int(cgrp.clone_children)}\n"


def _clone_write(cgrp: Cgroup, text: bytes, _opener: Caller, _now_ns: int) -> None:
    cgrp.clone_children = _flag_write(text)


def _sane_show(_cgrp: Cgroup, _caller: Caller) -> str:
    return "0\n"


def _agent_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{cgrp.hierarchy.release_agent}\n"


def _agent_write(cgrp: Cgroup, text: bytes, opener: Caller, _now_ns: int) -> None:
    if opener.uid != 0:
        raise CgroupError(EPERM)
    cgrp.hierarchy.release_agent = os.fsdecode(strip(text))


CORE_FILES = (
    CFType(
        "cgroup.procs",
        show=_procs_show,
        write=_procs_write,
        kind=Kind.LIVE,
        doc="v1: Process ids, ascending; write one to move it, 0 for the writer.",
    ),
    CFType(
        "tasks",
        show=_tasks_show,
        write=_tasks_write,
        kind=Kind.LIVE,
        doc="v1: Thread ids, ascending; write one to move that thread.",
    ),
    CFType(
        "cgroup.clone_children",
        show=_clone_show,
        write=_clone_write,
        doc="v1: 0 or 1, inherited by new children; only cpuset ever looked at it.",
    ),
    CFType(
        "notify_on_release",
        show=_notify_show,
        write=_notify_write,
        doc="v1: 0 or 1, inherited by new children; 1 runs the release agent when the cgroup "
        "becomes unused.",
    ),
    CFType(
        "cgroup.sane_behavior",
        show=_sane_show,
        on=On.ROOT,
        doc="v1: Always 0.",
    ),
    CFType(
        "release_agent",
        show=_agent_show,
        write=_agent_write,
        on=On.ROOT,
        max_write=PAGE_SIZE - 1,
        doc="v1: Program to run with the path of a cgroup that became unused.",
    ),
)
