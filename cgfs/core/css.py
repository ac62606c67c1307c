"""Per-cgroup controller state, and the interface a controller implements.

Linux: ``struct cgroup_subsys_state`` and ``struct cgroup_subsys``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self, cast

from cgfs.core.caller import KERNEL
from cgfs.core.cftype import listings
from cgfs.core.node import Node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cgfs.core.caller import Caller
    from cgfs.core.cftype import CFType, Listing
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.events import ModelListener
    from cgfs.core.hierarchy import Hierarchy


class Css(Node):
    """State of one controller in one cgroup.

    Attributes:
        cgrp: the cgroup; stays set after removal, so that charges can be returned.
        parent: state of the nearest ancestor, None in the root.
        controller: whose state this is.
        nr_active: live cgroups of this subtree, itself included, that have the controller.
        pins: references that keep removed state alive: one per charge, and one per child that
            is kept alive so.
    """

    __slots__ = ("cgrp", "controller", "nr_active", "parent", "pins")

    def __init__(
        self,
        controller: Controller,
        cgrp: Cgroup,
        parent: Css | None,
        owner: Caller = KERNEL,
        now_ns: int = 0,
    ) -> None:
        super().__init__(controller.next_block(), owner, now_ns)
        self.controller = controller
        self.cgrp = cgrp
        self.parent = parent
        self.nr_active = 0
        self.pins = 0

    @property
    def rows(self) -> Sequence[CFType]:
        """The controller's rows."""
        return self.controller.files

    def listing(self, *, root: bool) -> Listing:
        """The controller's files."""
        return self.controller.listings[root]

    def notify(self, file: str) -> None:
        """Generate an event on one of this css's files; without effect once it is offline."""
        if self.online:
            slot = self.controller.slots[file]
            self.bump(slot)
            self.controller.listener.modified(self, slot)

    def changed(self, file: str) -> None:
        """Tell the view that a CONFIG file reads differently now."""
        if self.online:
            self.controller.listener.changed(self, self.controller.slots[file])

    def ancestors(self) -> Iterator[Self]:
        """This state, its parent's, and so on up to the root's."""
        css: Self | None = self
        while css is not None:
            yield css
            css = cast("Self | None", css.parent)

    def pin(self) -> None:
        """Keep this state alive past the removal of its cgroup."""
        self.pins += 1

    def unpin(self) -> None:
        """Return a reference; the last one of removed state ends its dying."""
        css: Css | None = self
        while css is not None:
            css.pins -= 1
            if css.pins < 0:
                msg = f"{css.controller.name} of {css.cgrp.path}: unpinned more often than pinned"
                raise AssertionError(msg)
            if css.pins or css.online:
                return
            css.count_dying(-1)
            css.cgrp.css_died()
            css = css.parent

    def online_css(self) -> None:
        """Count this state in itself and its ancestors."""
        css: Css | None = self
        while css is not None:
            css.nr_active += 1
            css = css.parent

    def offline_css(self, now_ns: int) -> None:
        """Take the state out of service: its cgroup is removed or the controller disabled."""
        self.online = False
        self.offline(now_ns)
        css: Css | None = self
        while css is not None:
            css.nr_active -= 1
            css = css.parent
        if not self.pins:
            self.cgrp.css_died()
            return
        self.count_dying(1)
        if self.parent is not None:
            self.parent.pin()

    def count_dying(self, count: int) -> None:
        """Count removed state that is still pinned, in its cgroup and that one's ancestors."""
        for cgrp in self.cgrp.ancestors():
            cgrp.count_dying_css(self.controller.name, count)

    def offline(self, now_ns: int) -> None:
        """Hook for controllers: the state goes out of service."""


class Controller:
    """A controller of one host.

    Attributes:
        name: as in cgroup.controllers and as v1 mount option.
        threaded: whether it may be used in threaded cgroups.
        files: the rows of its files, prefixed names.
        hierarchy: the hierarchy it belongs to at present.
    """

    name: ClassVar[str]
    threaded: ClassVar[bool] = False
    files: ClassVar[tuple[CFType, ...]]

    hierarchy: Hierarchy

    def __init__(self) -> None:
        self.slots = {row.name: slot for slot, row in enumerate(self.files, 1)}
        self.listings = listings(self.files)

    @property
    def listener(self) -> ModelListener:
        """Who hears of events of this controller's files."""
        return self.hierarchy.roots.listener

    def next_block(self) -> int:
        """A block number for a new css."""
        return self.hierarchy.roots.next_block()

    def css_alloc(self, cgrp: Cgroup, parent: Css | None, owner: Caller, now_ns: int) -> Css:
        """Make the state of one cgroup."""
        raise NotImplementedError

    def root_css(self) -> Css:
        """The state of the root cgroup."""
        return self.hierarchy.root.css[self.name]
