"""Resource domains and threaded cgroups: what ``cgroup.type`` shows and allows.

Linux 6.12 kernel/cgroup/cgroup.c. Every rule below carries the name it has there.
"""

from __future__ import annotations

from errno import EBUSY, EOPNOTSUPP
from typing import TYPE_CHECKING

from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cgfs.core.cgroup import Cgroup


def is_threaded(cgrp: Cgroup) -> bool:
    """Whether the cgroup was switched to ``threaded``."""
    return cgrp.dom is not cgrp


def _domain_controllers(cgrp: Cgroup, names: Iterable[str]) -> bool:
    controllers = cgrp.hierarchy.controllers
    return any(not controllers[name].threaded for name in names)


def _has_populated_domain_child(cgrp: Cgroup) -> bool:
    return bool(cgrp.nr_populated_children) and any(
        child.populated and not is_threaded(child) for child in cgrp.children.values()
    )


def can_be_thread_root(cgrp: Cgroup) -> bool:
    """Whether threaded children may be made below."""
    if cgrp.is_root:
        return True
    if is_threaded(cgrp) or _has_populated_domain_child(cgrp):
        return False
    return not _domain_controllers(cgrp, cgrp.subtree_control)


def is_thread_root(cgrp: Cgroup) -> bool:
    """Whether it serves a threaded subtree as its domain."""
    if is_threaded(cgrp):
        return False
    if cgrp.nr_threaded_children:
        return True
    controllers = cgrp.hierarchy.controllers
    return cgrp.has_tasks and any(controllers[name].threaded for name in cgrp.subtree_control)


def is_valid_domain(cgrp: Cgroup) -> bool:
    """Whether processes may live in it: no ancestor is threaded or a thread root."""
    if is_threaded(cgrp):
        return False
    for ancestor in cgrp.ancestors():
        if ancestor is cgrp:
            continue
        if not ancestor.is_root and is_thread_root(ancestor):
            return False
        if is_threaded(ancestor):
            return False
    return True


def type_of(cgrp: Cgroup) -> str:
    """The word ``cgroup.type`` shows."""
    if is_threaded(cgrp):
        return "threaded"
    if not is_valid_domain(cgrp):
        return "domain invalid"
    if is_thread_root(cgrp):
        return "domain threaded"
    return "domain"


def enable_threaded(cgrp: Cgroup, now_ns: int) -> None:
    """Switch a cgroup to ``threaded`` (cgroup_enable_threaded()).

    Raises:
        CgroupError: EOPNOTSUPP where the rules forbid it.
    """
    parent = cgrp.parent
    if parent is None or is_threaded(cgrp):
        return
    dom = parent.dom
    if cgrp.populated or _domain_controllers(cgrp, cgrp.subtree_control):
        raise CgroupError(EOPNOTSUPP)
    if not is_valid_domain(dom) or not can_be_thread_root(dom):
        raise CgroupError(EOPNOTSUPP)
    scope = cgrp if dom.is_root else dom
    before = _shown(scope)
    for dsct in cgrp.subtree():
        if dsct is cgrp or is_threaded(dsct):
            dsct.dom = dom
    parent.nr_threaded_children += 1
    for name in [n for n, css in cgrp.css.items() if not css.controller.threaded]:
        css = cgrp.remove_css(name, now_ns)
        cgrp.hierarchy.roots.listener.vanished(cgrp, css)
    _tell(before, written=cgrp)


def child_removed(parent: Cgroup, child: Cgroup) -> None:
    """Count a removed threaded child out; the last one makes the parent a plain domain again."""
    if not is_threaded(child):
        return
    before = {} if child.dom.is_root else _shown(child.dom)
    parent.nr_threaded_children -= 1
    _tell(before, written=None)


def _shown(scope: Cgroup) -> dict[Cgroup, tuple[str, list[str]]]:
    return {cgrp: (type_of(cgrp), available(cgrp)) for cgrp in scope.subtree()}


def _tell(before: dict[Cgroup, tuple[str, list[str]]], written: Cgroup | None) -> None:
    for cgrp, (kind, controllers) in before.items():
        if type_of(cgrp) != kind and cgrp is not written and not cgrp.is_root:
            cgrp.changed("cgroup.type")
        if available(cgrp) != controllers:
            cgrp.changed("cgroup.controllers")


def available(cgrp: Cgroup) -> list[str]:
    """Names in ``cgroup.controllers``, in controller order (cgroup_control())."""
    controllers = cgrp.hierarchy.controllers
    if cgrp.parent is None:
        return list(controllers)
    enabled = cgrp.parent.subtree_control
    threaded = is_threaded(cgrp)
    return [
        name
        for name, controller in controllers.items()
        if name in enabled and (controller.threaded or not threaded)
    ]


def vet_destination(dst: Cgroup) -> None:
    """Whether a process may be put into ``dst`` (cgroup_migrate_vet_dst()).

    Raises:
        CgroupError: EOPNOTSUPP outside a valid domain, EBUSY for the no-internal-process rule.
    """
    if dst.hierarchy.version == 1:
        return
    if not is_valid_domain(dst.dom):
        shown = f'cgroup.type "{type_of(dst)}"'
        raise CgroupError(EOPNOTSUPP, f"cgroup {dst.path} takes no processes: {shown}")
    if not dst.subtree_control or is_threaded(dst) or can_be_thread_root(dst):
        return
    names = [name for name in dst.hierarchy.controllers if name in dst.subtree_control]
    shown = f'cgroup.subtree_control "{" ".join(names)}"'
    raise CgroupError(EBUSY, f"cgroup {dst.path} takes no processes: {shown}")


def vet_enable(cgrp: Cgroup, names: Iterable[str]) -> None:
    """Whether controllers may be enabled (cgroup_vet_subtree_control_enable()).

    Raises:
        CgroupError: EOPNOTSUPP or EBUSY.
    """
    if not is_valid_domain(cgrp.dom):
        raise CgroupError(EOPNOTSUPP)
    if cgrp.is_root:
        return
    if _domain_controllers(cgrp, names):
        if is_thread_root(cgrp) or is_threaded(cgrp):
            raise CgroupError(EOPNOTSUPP)
    elif can_be_thread_root(cgrp) or is_threaded(cgrp):
        return
    if cgrp.has_tasks:
        raise CgroupError(EBUSY)
