"""One node of a hierarchy (Linux: ``struct cgroup``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cgfs.core.node import DIRECTORY, Node
from cgfs.core.parse import S32_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cgfs.core.caller import Caller
    from cgfs.core.cftype import CFType, Listing
    from cgfs.core.css import Css
    from cgfs.core.hierarchy import Hierarchy
    from cgfs.core.tasks import Task

NO_CONTROLLERS: frozenset[str] = frozenset()


class Cgroup(Node):
    """A cgroup: children, controller state, members.

    Attributes:
        name: name in the parent's directory, decoded with surrogate escapes; "" for a root.
        css: state of each controller that is active here, by name, in controller order.
        subtree_control: controllers enabled for the children (v2).
        level: distance from the root.
        nr_descendants: live cgroups below.
        nr_dying: removed cgroups below that are still pinned, by a charge made in them or below.
        members: processes whose leader is here, in the order in which they joined.
        strays: threads placed here apart from their leader, by thread id.
        nr_populated_children: children with a live process in them or below.
        dom: the cgroup whose resource domain this one belongs to: itself unless threaded.
        nr_threaded_children: children that are threaded.
        freeze: own setting of cgroup.freeze.
        e_freeze: how many of this cgroup and its ancestors have that setting.
        mtime_ns: model time of the last mkdir or rmdir in it.
        dir_mode: permission bits the directory was made with.
        notify_on_release, clone_children: v1 flags.
    """

    __slots__ = (
        "_dying",
        "_dying_css",
        "_nr_css",
        "children",
        "clone_children",
        "css",
        "dir_mode",
        "dom",
        "e_freeze",
        "freeze",
        "hierarchy",
        "level",
        "max_depth",
        "max_descendants",
        "members",
        "mtime_ns",
        "name",
        "notify_on_release",
        "nr_descendants",
        "nr_dying",
        "nr_populated_children",
        "nr_threaded_children",
        "parent",
        "strays",
        "subtree_control",
    )

    def __init__(
        self,
        hierarchy: Hierarchy,
        parent: Cgroup | None,
        name: str,
        owner: Caller,
        mode: int,
        now_ns: int,
    ) -> None:
        super().__init__(hierarchy.roots.next_block(), owner, now_ns)
        self.hierarchy = hierarchy
        self.parent = parent
        self.name = name
        self.children: dict[str, Cgroup] = {}
        self.css: dict[str, Css] = {}
        self.subtree_control = NO_CONTROLLERS
        self.level: int = 0 if parent is None else parent.level + 1
        self.nr_descendants = 0
        self.nr_dying = 0
        self.max_descendants = S32_MAX
        self.max_depth = S32_MAX
        self.members: dict[int, Task] = {}
        self.strays: dict[int, Task] = {}
        self.nr_populated_children = 0
        self.dom: Cgroup = self
        self.nr_threaded_children = 0
        self.freeze = False
        self.e_freeze: int = 0 if parent is None else parent.e_freeze
        self.mtime_ns = now_ns
        self.dir_mode = mode
        self.notify_on_release: bool = parent is not None and parent.notify_on_release
        self.clone_children: bool = parent is not None and parent.clone_children
        self._nr_css = 0
        self._dying = False
        self._dying_css: dict[str, int] | None = None

    @property
    def rows(self) -> Sequence[CFType]:
        """The core files of the hierarchy's version."""
        return self.hierarchy.core_files

    def listing(self, *, root: bool) -> Listing:
        """The core files."""
        return self.hierarchy.listings[root]

    def default_mode(self, slot: int) -> int:
        """Permission bits of a fresh file, or of the directory as it was made."""
        return self.dir_mode if slot == DIRECTORY else self.rows[slot - 1].mode

    @property
    def id(self) -> int:
        """Number of the cgroup: the inode of its directory."""
        return self.ino(DIRECTORY)

    @property
    def is_root(self) -> bool:
        """Whether this is the root of its hierarchy."""
        return self.parent is None

    @property
    def dead(self) -> bool:
        """Whether the cgroup was removed."""
        return not self.online

    @property
    def path(self) -> str:
        """Path from the root of the hierarchy, "/" for the root itself."""
        names = [cgrp.name for cgrp in self.ancestors() if cgrp.parent is not None]
        return "/" + "/".join(reversed(names))

    def ancestors(self) -> Iterator[Cgroup]:
        """This cgroup, its parent, and so on up to the root."""
        cgrp: Cgroup | None = self
        while cgrp is not None:
            yield cgrp
            cgrp = cgrp.parent

    def subtree(self) -> Iterator[Cgroup]:
        """This cgroup and its live descendants, parents before children."""
        stack = [self]
        while stack:
            cgrp = stack.pop()
            yield cgrp
            stack.extend(reversed(cgrp.children.values()))

    def inhabited(self) -> Iterator[Cgroup]:
        """Those of the subtree that have tasks themselves; branches without any cost nothing."""
        stack = [self]
        while stack:
            cgrp = stack.pop()
            if cgrp.has_tasks:
                yield cgrp
            if cgrp.nr_populated_children:
                stack.extend(c for c in reversed(cgrp.children.values()) if c.populated)

    def is_descendant_of(self, other: Cgroup) -> bool:
        """Whether ``other`` is this cgroup or one of its ancestors."""
        return any(cgrp is other for cgrp in self.ancestors())

    # -- membership ------------------------------------------------------------------------

    @property
    def has_tasks(self) -> bool:
        """Whether a live process or thread is in this very cgroup."""
        return bool(self.members or self.strays)

    @property
    def populated(self) -> bool:
        """Whether one is here or in a descendant."""
        return bool(self.members or self.strays or self.nr_populated_children)

    def add_member(self, task: Task, now_ns: int) -> None:
        """A process joins."""
        was_populated = self.populated
        self.members[task.pid] = task
        if not was_populated:
            self._became_populated()
        if self.e_freeze:
            self._freeze_newcomer(task, now_ns)

    def remove_member(self, task: Task, now_ns: int) -> None:
        """A process leaves; ``now_ns`` is when."""
        del self.members[task.pid]
        if not self.populated:
            self._became_empty()

    def add_stray(self, task: Task, tid: int, now_ns: int) -> None:
        """A thread joins without its leader."""
        was_populated = self.populated
        self.strays[tid] = task
        if not was_populated:
            self._became_populated()
        if self.e_freeze:
            self._freeze_newcomer(task, now_ns)

    def remove_stray(self, tid: int, now_ns: int) -> None:
        """Such a thread leaves; ``now_ns`` is when."""
        self.strays.pop(tid, None)
        if not self.populated:
            self._became_empty()

    def _freeze_newcomer(self, task: Task, now_ns: int) -> None:
        # Linux 6.12 freezer.c cgroup_freezer_migrate_task(): the destination stops being
        # frozen until the newcomer is, which generates an event even if it was populated.
        if self.hierarchy.roots.tasks.freeze(task, now_ns):
            self.notify("cgroup.events")

    def _became_populated(self) -> None:
        cgrp: Cgroup | None = self
        while cgrp is not None:
            cgrp.notify("cgroup.events")
            parent = cgrp.parent
            if parent is None:
                return
            was_populated = parent.populated
            parent.nr_populated_children += 1
            cgrp = None if was_populated else parent

    def _became_empty(self) -> None:
        cgrp: Cgroup | None = self
        while cgrp is not None:
            cgrp.notify("cgroup.events")
            cgrp.hierarchy.check_for_release(cgrp)
            parent = cgrp.parent
            if parent is None:
                return
            parent.nr_populated_children -= 1
            cgrp = None if parent.populated else parent

    # -- files -----------------------------------------------------------------------------

    def notify(self, file: str) -> None:
        """Generate an event on a core file that exists here."""
        slot = self.hierarchy.core_slots.get(file)
        if slot is None or not self.online:
            return
        if self.rows[slot - 1].exists_on(root=self.is_root):
            self.bump(slot)
            self.hierarchy.roots.listener.modified(self, slot)

    def changed(self, file: str) -> None:
        """Tell the view that a CONFIG file reads differently now."""
        if self.online:
            self.hierarchy.roots.listener.changed(self, self.hierarchy.core_slots[file])

    # -- controllers -----------------------------------------------------------------------

    def add_css(self, css: Css) -> None:
        """Put a controller's state into service."""
        self._nr_css += 1
        self.css[css.controller.name] = css
        css.online_css()

    def remove_css(self, name: str, now_ns: int) -> Css:
        """Take it out of service; it lives on while a charge pins it."""
        css = self.css.pop(name)
        css.offline_css(now_ns)
        return css

    def css_died(self) -> None:
        """The last reference to a controller's removed state is gone."""
        self._nr_css -= 1
        if self._dying and self._nr_css == 0:
            self._dying = False
            self._count_dying(-1)

    def nr_dying_css(self, name: str) -> int:
        """How many states of a controller, here and below, are removed but still pinned."""
        return self._dying_css.get(name, 0) if self._dying_css else 0

    def count_dying_css(self, name: str, count: int) -> None:
        """Count them; the count outlives the controller's being enabled here."""
        if self._dying_css is None:
            self._dying_css = {}
        self._dying_css[name] = self._dying_css.get(name, 0) + count

    def taken_down(self, now_ns: int) -> None:
        """The directory is removed: leave the tree, dying while a charge pins the state."""
        for name in list(self.css):
            self.remove_css(name, now_ns)
        self.online = False
        for cgrp in self.ancestors():
            if cgrp is not self:
                cgrp.nr_descendants -= 1
        if self._nr_css:
            self._dying = True
            self._count_dying(1)

    def _count_dying(self, count: int) -> None:
        for cgrp in self.ancestors():
            if cgrp is not self:
                cgrp.nr_dying += count
