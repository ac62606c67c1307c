"""The core files of v2: one row each (Linux 6.12 ``cgroup_base_files[]``)."""

from __future__ import annotations

from errno import EINVAL, EOPNOTSUPP, ERANGE
from typing import TYPE_CHECKING

from cgfs.core import attach, control, domain, freezer
from cgfs.core.cftype import CFType, Kind, On
from cgfs.core.parse import S32_MAX, parse_s32, show_limit, strip
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.hierarchy import Hierarchy
    from cgfs.core.tasks import Task


def _lines(numbers: Iterable[int]) -> str:
    return "".join(f"{number}\n" for number in numbers)


def _words(names: Iterable[str]) -> str:
    text = " ".join(names)
    return f"{text}\n" if text else ""


def _type_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{domain.type_of(cgrp)}\n"


def _type_write(cgrp: Cgroup, text: bytes, _opener: Caller, now_ns: int) -> None:
    if strip(text) != b"threaded":
        raise CgroupError(EINVAL)
    cgrp.hierarchy.roots.processes.sync()
    domain.enable_threaded(cgrp, now_ns)


def process_ids(cgrp: Cgroup) -> list[int]:
    """Processes of a cgroup in the order in which they joined; a root also has all others."""
    if domain.is_thread_root(cgrp) and not cgrp.is_root:
        members = [pid for dsct in cgrp.subtree() if dsct.dom is cgrp for pid in dsct.members]
    else:
        members = list(cgrp.members)
    return members if not cgrp.is_root else [*_untracked(cgrp), *members]


def _untracked(root: Cgroup) -> list[int]:
    roots, hierarchy = root.hierarchy.roots, root.hierarchy
    placed = {task.pid for task in roots.tasks if hierarchy in task.places}
    return [pid for pid in roots.processes.tgids() if pid not in placed]


def thread_ids(cgrp: Cgroup) -> list[int]:
    """Threads of a cgroup, those of one process together."""
    roots, hierarchy = cgrp.hierarchy.roots, cgrp.hierarchy
    tids: list[int] = []
    for task in cgrp.members.values():
        tids += _beside_the_leader(task, hierarchy)
    tids += cgrp.strays
    if cgrp.is_root:
        for pid in _untracked(cgrp):
            tracked = roots.tasks.get(pid)
            if tracked is None:
                tids += roots.processes.threads(pid)
            else:
                tids += _beside_the_leader(tracked, hierarchy)
    return tids


def _beside_the_leader(task: Task, hierarchy: Hierarchy) -> list[int]:
    apart = {tid for tid, _ in task.strays_in(hierarchy)}
    return [tid for tid in hierarchy.roots.tasks.threads(task) if tid not in apart]


def _in_namespace(cgrp: Cgroup, pids: Iterable[int], caller: Caller) -> list[int]:
    to_caller = cgrp.hierarchy.roots.processes.to_caller
    tasks = cgrp.hierarchy.roots.tasks
    return [
        pid if (task := tasks.get(pid)) is not None and task.emulated
        else to_caller(caller.pid, pid)
        for pid in pids
    ]  # fmt: skip


def _procs_show(cgrp: Cgroup, caller: Caller) -> str:
    if domain.is_threaded(cgrp):
        raise CgroupError(EOPNOTSUPP)
    cgrp.hierarchy.roots.processes.sync()
    return _lines(_in_namespace(cgrp, process_ids(cgrp), caller))


def _procs_write(cgrp: Cgroup, text: bytes, opener: Caller, now_ns: int) -> None:
    attach.write(cgrp, text, opener, now_ns, thread=False)


def _threads_show(cgrp: Cgroup, caller: Caller) -> str:
    cgrp.hierarchy.roots.processes.sync()
    return _lines(_in_namespace(cgrp, thread_ids(cgrp), caller))


def _threads_write(cgrp: Cgroup, text: bytes, opener: Caller, now_ns: int) -> None:
    attach.write(cgrp, text, opener, now_ns, thread=True)


def _controllers_show(cgrp: Cgroup, _caller: Caller) -> str:
    return _words(domain.available(cgrp))


def _subtree_control_show(cgrp: Cgroup, _caller: Caller) -> str:
    return _words(name for name in cgrp.hierarchy.controllers if name in cgrp.subtree_control)


def _subtree_control_write(cgrp: Cgroup, text: bytes, opener: Caller, now_ns: int) -> None:
    cgrp.hierarchy.roots.processes.sync()
    control.write(cgrp, text, opener, now_ns)


def _events_show(cgrp: Cgroup, caller: Caller) -> str:
    cgrp.hierarchy.roots.processes.sync()
    frozen = freezer.is_frozen(cgrp, caller)
    return f"populated {int(cgrp.populated)}\nfrozen {int(frozen)}\n"


def _max_write(text: bytes) -> int:
    text = strip(text)
    value = S32_MAX if text == b"max" else parse_s32(text)
    if value < 0:
        raise CgroupError(ERANGE)
    return value


def _max_descendants_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{show_limit(cgrp.max_descendants, S32_MAX)}\n"


def _max_descendants_write(cgrp: Cgroup, text: bytes, _opener: Caller, _now_ns: int) -> None:
    cgrp.max_descendants = _max_write(text)


def _max_depth_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{show_limit(cgrp.max_depth, S32_MAX)}\n"


def _max_depth_write(cgrp: Cgroup, text: bytes, _opener: Caller, _now_ns: int) -> None:
    cgrp.max_depth = _max_write(text)


def _stat_show(cgrp: Cgroup, _caller: Caller) -> str:
    names = list(cgrp.hierarchy.controllers)
    active = [(n, css.nr_active if (css := cgrp.css.get(n)) else 0) for n in names]
    dying = [(n, cgrp.nr_dying_css(n)) for n in names]
    return "".join(
        [
            f"nr_descendants {cgrp.nr_descendants}\n",
            *(f"nr_subsys_{name} {count}\n" for name, count in active),
            f"nr_dying_descendants {cgrp.nr_dying}\n",
            *(f"nr_dying_subsys_{name} {count}\n" for name, count in dying),
        ]
    )


def _bool_write(text: bytes, allowed: tuple[int, ...]) -> int:
    value = parse_s32(strip(text))
    if value not in allowed:
        raise CgroupError(ERANGE)
    return value


def _freeze_show(cgrp: Cgroup, _caller: Caller) -> str:
    return f"{int(cgrp.freeze)}\n"


def _freeze_write(cgrp: Cgroup, text: bytes, _opener: Caller, now_ns: int) -> None:
    freezer.set_freeze(cgrp, bool(_bool_write(text, (0, 1))), now_ns)


def _kill_write(cgrp: Cgroup, text: bytes, _opener: Caller, now_ns: int) -> None:
    _bool_write(text, (1,))
    freezer.kill(cgrp, now_ns)


CORE_FILES = (
    CFType(
        "cgroup.type",
        show=_type_show,
        write=_type_write,
        on=On.NON_ROOT,
        changes=("cgroup.type", "cgroup.controllers"),
        doc="`domain`, `domain threaded`, `domain invalid` or `threaded`; write `threaded`.",
    ),
    CFType(
        "cgroup.procs",
        show=_procs_show,
        write=_procs_write,
        kind=Kind.LIVE,
        doc="Process ids, one a line, in the order in which they joined; write one to move it, "
        "0 for the writer.",
    ),
    CFType(
        "cgroup.threads",
        show=_threads_show,
        write=_threads_write,
        kind=Kind.LIVE,
        doc="Thread ids, one a line; write one to move a thread within its resource domain.",
    ),
    CFType(
        "cgroup.controllers",
        show=_controllers_show,
        doc="Controllers that may be enabled for the children.",
    ),
    CFType(
        "cgroup.subtree_control",
        show=_subtree_control_show,
        write=_subtree_control_write,
        changes=("cgroup.controllers",),
        doc="Controllers enabled for the children; write `+name` and `-name` words.",
    ),
    CFType(
        "cgroup.events",
        show=_events_show,
        on=On.NON_ROOT,
        kind=Kind.LIVE,
        notify=True,
        doc="`populated` and `frozen`, 0 or 1 each; every change generates an event.",
    ),
    CFType(
        "cgroup.max.descendants",
        show=_max_descendants_show,
        write=_max_descendants_write,
        doc="How many live cgroups may be below, or `max`.",
    ),
    CFType(
        "cgroup.max.depth",
        show=_max_depth_show,
        write=_max_depth_write,
        doc="How many levels of cgroups may be below, or `max`.",
    ),
    CFType(
        "cgroup.stat",
        show=_stat_show,
        kind=Kind.LIVE,
        doc="Live and dying cgroups below, in all and per controller.",
    ),
    CFType(
        "cgroup.freeze",
        show=_freeze_show,
        write=_freeze_write,
        on=On.NON_ROOT,
        doc="Own setting, 0 or 1; 1 stops every process in and below the cgroup.",
    ),
    CFType(
        "cgroup.kill",
        write=_kill_write,
        on=On.NON_ROOT,
        kind=Kind.LIVE,
        doc="Write 1 to send SIGKILL to every process in and below the cgroup.",
    ),
)
