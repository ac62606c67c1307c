"""``cgroup.subtree_control``: enabling and disabling controllers for the children.

Linux 6.12 kernel/cgroup/cgroup.c cgroup_subtree_control_write().
"""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL, ENOENT
from typing import TYPE_CHECKING

from cgfs.core import domain
from cgfs.core.parse import strip
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.hierarchy import Hierarchy

# Controllers of Linux that can exist on v2 and that no emulated host has: the kernel knows the
# word, so enabling is ENOENT and disabling a no-op, where an unknown word is EINVAL.
ELSEWHERE = frozenset(
    {"cpuset", "cpu", "io", "memory", "perf_event", "hugetlb", "pids", "rdma"},
)


def write(cgrp: Cgroup, text: bytes, opener: Caller, now_ns: int) -> None:
    """Apply ``+name`` and ``-name`` words, all or nothing.

    Raises:
        CgroupError: EINVAL, ENOENT, EBUSY, EOPNOTSUPP or EEXIST; nothing is changed then.
    """
    wanted = _parse(strip(text), cgrp.hierarchy)
    enable, disable = _effective(cgrp, wanted)
    if not enable and not disable:
        return
    if enable:
        domain.vet_enable(cgrp, enable)
        _vet_names(cgrp, enable)
    _apply(cgrp, enable, disable, opener, now_ns)


def _parse(text: bytes, hierarchy: Hierarchy) -> dict[str, bool]:
    wanted: dict[str, bool] = {}
    for token in text.split(b" "):
        if not token:
            continue
        name = token[1:].decode("latin-1")
        known = name in ELSEWHERE or name in hierarchy.roots.controllers
        if token[:1] not in (b"+", b"-") or not known:
            raise CgroupError(EINVAL)
        wanted[name] = token[:1] == b"+"
    return wanted


def _effective(cgrp: Cgroup, wanted: dict[str, bool]) -> tuple[list[str], list[str]]:
    available = domain.available(cgrp)
    order = [*sorted(ELSEWHERE & wanted.keys()), *cgrp.hierarchy.roots.controllers]
    enable, disable = [], []
    for name in (name for name in order if name in wanted):
        if wanted[name] and name not in cgrp.subtree_control:
            if name not in available:
                raise CgroupError(ENOENT)
            enable.append(name)
        elif not wanted[name] and name in cgrp.subtree_control:
            if any(name in child.subtree_control for child in cgrp.children.values()):
                raise CgroupError(EBUSY)
            disable.append(name)
    return enable, disable


def _vet_names(cgrp: Cgroup, enable: list[str]) -> None:
    for name in enable:
        controller = cgrp.hierarchy.controllers[name]
        files = {row.name for row in controller.files if row.exists_on(root=False)}
        for child in cgrp.children.values():
            if not files.isdisjoint(child.children):
                raise CgroupError(EEXIST)


def _apply(
    cgrp: Cgroup, enable: list[str], disable: list[str], opener: Caller, now_ns: int
) -> None:
    hierarchy = cgrp.hierarchy
    listener = hierarchy.roots.listener
    names = cgrp.subtree_control.union(enable).difference(disable)
    cgrp.subtree_control = hierarchy.roots.control_set(names)
    for child in list(cgrp.children.values()):
        for name in disable:
            if name in child.css:
                listener.vanished(child, child.remove_css(name, now_ns))
        for name in enable:
            controller = hierarchy.controllers[name]
            if controller.threaded or not domain.is_threaded(child):
                css = hierarchy.alloc_css(controller, child, opener, now_ns)
                listener.appeared(child, css)
        child.changed("cgroup.controllers")
