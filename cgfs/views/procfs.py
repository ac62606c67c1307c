"""Text of /proc/cgroups and /proc/PID/cgroup, as cgroups(7) describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cgfs.core.hierarchy import Hierarchy
    from cgfs.core.roots import Roots

_HEADER = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n"


def cgroups(roots: Roots) -> str:
    """/proc/cgroups: one line per controller; dying cgroups count."""
    lines = []
    for name, controller in roots.controllers.items():
        root = controller.hierarchy.root
        count = 1 + root.nr_descendants + root.nr_dying
        lines.append(f"{name}\t{controller.hierarchy.id}\t{count}\t1\n")
    return _HEADER + "".join(lines)


def pid_cgroup(roots: Roots, pid: int) -> str:
    """/proc/PID/cgroup: newest v1 hierarchy first, v2 last."""
    return "".join(_line(roots, h, pid) for h in [*reversed(roots.hierarchies[1:]), roots.v2])


def _line(roots: Roots, hierarchy: Hierarchy, pid: int) -> str:
    path = roots.cgroup_of(pid, hierarchy).path
    if hierarchy.version == 2:
        return f"0::{path}\n"
    words = list(hierarchy.controllers)
    if hierarchy.name:
        words.append(f"name={hierarchy.name}")
    return f"{hierarchy.id}:{','.join(words)}:{path}\n"
