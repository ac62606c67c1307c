"""All hierarchies of one host, and what they share.

A controller belongs to one hierarchy at a time: v1 takes it from v2 and gives it back.
"""

from __future__ import annotations

import re
from errno import EBUSY, EINVAL, ENODEV
from typing import TYPE_CHECKING

from cgfs.core import domain, files, legacy
from cgfs.core.events import Silence
from cgfs.core.hierarchy import Hierarchy
from cgfs.core.tasks import NoProcesses, TaskTable
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from cgfs.core.cgroup import Cgroup
    from cgfs.core.css import Controller, Css
    from cgfs.core.events import ModelListener
    from cgfs.core.node import Node
    from cgfs.core.tasks import Processes, Task, TaskOwner

    T = TypeVar("T")

_V1_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")


def _no_release(agent: str, path: str) -> None:
    """Without a runner, release agents are not started."""


class Roots:
    """The cgroup side of a host.

    Args:
        controllers: the controllers the host's kernel has, in order.
        processes: who knows the real processes; none by default.

    Attributes:
        v2: the v2 hierarchy; it has every controller no v1 hierarchy has taken.
        hierarchies: v2 and the v1 ones, newest last.
        controllers: all controllers by name.
        tasks: the tracked processes.
        nodes: what owns files, by block number; removed ones until the listener drops them.
        listener: who hears of changes.
        release: runs a v1 release agent: (agent, path).
    """

    def __init__(
        self,
        controllers: Sequence[type[Controller]],
        processes: Processes | None = None,
    ) -> None:
        self._blocks = 0
        self._control_sets: dict[frozenset[str], frozenset[str]] = {}
        self.nodes: dict[int, Node] = {}
        self.listener: ModelListener = Silence(self.nodes)
        self.release: Callable[[str, str], None] = _no_release
        self.processes: Processes = processes or NoProcesses()
        self.tasks = TaskTable(self.processes)
        self.controllers = {c.name: c() for c in controllers}
        self.v2 = Hierarchy(self, 0, 2, files.CORE_FILES)
        self.hierarchies = [self.v2]
        for controller in self.controllers.values():
            self.v2.bind(controller)

    def next_block(self) -> int:
        """A number no node ever had."""
        self._blocks += 1
        return self._blocks

    def control_set(self, names: frozenset[str]) -> frozenset[str]:
        """One shared object per distinct ``cgroup.subtree_control``."""
        return self._control_sets.setdefault(names, names)

    def in_order(self, controllers: dict[str, T]) -> dict[str, T]:
        """The same entries in controller order."""
        return {name: controllers[name] for name in self.controllers if name in controllers}

    def controller(self, name: str) -> Controller:
        """A controller by name; KeyError when the host does not have it."""
        return self.controllers[name]

    def use_processes(self, processes: Processes) -> None:
        """Install who knows the real processes; before any of them is moved."""
        self.processes = self.tasks.processes = processes

    # -- tasks -----------------------------------------------------------------------------

    def tgid_of(self, tid: int) -> int:
        """The process a thread belongs to; the number itself when it is unknown."""
        if self.tasks.get(tid) is not None:
            return tid
        found = self.processes.find(tid)
        return tid if found is None else found.tgid

    def cgroup_of(self, pid: int, hierarchy: Hierarchy) -> Cgroup:
        """The cgroup of a process or thread in one hierarchy."""
        task = self.tasks.get(pid)
        if task is not None and task.emulated:
            return task.place(hierarchy)
        self.processes.sync()
        task = self.tasks.get(self.tgid_of(pid))
        return hierarchy.root if task is None else task.place(hierarchy, pid)

    def css_of(self, pid: int, controller: str) -> Css:
        """The effective css of a task: that of the nearest cgroup that has the controller.

        Raises:
            KeyError: the host does not have that controller.
        """
        hierarchy = self.controllers[controller].hierarchy
        task = self.tasks.get(pid)
        if task is not None and task.emulated:
            cgrp = task.places[hierarchy]
        else:
            cgrp = self.cgroup_of(pid, hierarchy)
        while (css := cgrp.css.get(controller)) is None and cgrp.parent is not None:
            cgrp = cgrp.parent
        return cgrp.css[controller] if css is None else css

    def spawn(self, cgrp: Cgroup, owner: TaskOwner, now_ns: int = 0) -> Task:
        """Start an emulated process in a cgroup; it is in the root of every other hierarchy.

        Raises:
            CgroupError: as a write of a pid to cgroup.procs: ENODEV, EOPNOTSUPP, EBUSY.
        """
        if cgrp.dead:
            raise CgroupError(ENODEV)
        domain.vet_destination(cgrp)
        task = self.tasks.spawn(owner)
        for hierarchy in self.hierarchies:
            place = cgrp if hierarchy is cgrp.hierarchy else hierarchy.root
            task.places[hierarchy] = place
            place.add_member(task, now_ns)
        return task

    def exit(self, task: Task, now_ns: int = 0) -> None:
        """End an emulated process."""
        self.tasks.exit(task, now_ns)

    # -- v1 ----------------------------------------------------------------------------------

    def mount_v1(self, controllers: Sequence[str], name: str = "", now_ns: int = 0) -> Hierarchy:
        """Make, or find, the v1 hierarchy of a set of controllers (spec D.3).

        Raises:
            CgroupError: EINVAL for an unknown controller, a bad name or neither; EBUSY while a
                controller is in use elsewhere, or for the name of a hierarchy with others.
        """
        if name and not _V1_NAME.fullmatch(name):
            raise CgroupError(EINVAL, f"bad hierarchy name: {name}")
        for controller in controllers:
            if controller not in self.controllers:
                raise CgroupError(EINVAL, f"unknown controller: {controller}")
        if not controllers and not name:
            raise CgroupError(EINVAL, "neither controllers nor name= given")
        existing = self._find_v1(controllers, name)
        if existing is not None:
            return existing
        self._vet_takeover(controllers)
        next_id = max(h.id for h in self.hierarchies) + 1
        hierarchy = Hierarchy(self, next_id, 1, legacy.CORE_FILES, name)
        self.hierarchies.append(hierarchy)
        for task in self.tasks:
            if task.emulated:
                task.places[hierarchy] = hierarchy.root
                hierarchy.root.add_member(task, now_ns)
        for controller in controllers:
            bound = self.controllers[controller]
            hierarchy.bind(bound, bound.hierarchy.unbind(bound))
        return hierarchy

    def _find_v1(self, controllers: Sequence[str], name: str) -> Hierarchy | None:
        """What is given has to match (Linux 6.12 cgroup-v1.c cgroup1_root_to_use())."""
        for hierarchy in self.hierarchies[1:]:
            if name and hierarchy.name != name:
                continue
            if not controllers or set(hierarchy.controllers) == set(controllers):
                return hierarchy
            if name:
                raise CgroupError(EBUSY, f"hierarchy {name} has other controllers")
        return None

    def _vet_takeover(self, controllers: Sequence[str]) -> None:
        for name in controllers:
            controller = self.controllers[name]
            if controller.hierarchy is not self.v2:
                raise CgroupError(EBUSY, f"controller {name} is in another v1 hierarchy")
            root = controller.root_css()
            if root.nr_active > 1 or root.cgrp.nr_dying_css(name):
                raise CgroupError(EBUSY, f"controller {name} is in use in v2")

    def unmount_v1(self, hierarchy: Hierarchy, now_ns: int = 0) -> None:
        """Destroy a v1 hierarchy without child cgroups; one with children lives on invisibly.

        A removed child that a charge pins counts: cgroup-v1.c lets the last mount go only when
        the root's list of children is empty, and there it stays until it is freed.
        """
        if hierarchy.root.children or hierarchy.root.nr_dying:
            return
        for task in self.tasks:
            if task.places.pop(hierarchy, None) is not None:
                hierarchy.root.remove_member(task, now_ns)
        for controller in list(hierarchy.controllers.values()):
            self.v2.bind(controller, hierarchy.unbind(controller))
        self.hierarchies.remove(hierarchy)
