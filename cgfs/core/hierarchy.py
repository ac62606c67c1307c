"""One tree of cgroups: the single v2 tree, or one v1 tree per set of controllers."""

from __future__ import annotations

import stat
from dataclasses import replace
from errno import EAGAIN, EBUSY, EEXIST, EINVAL, EIO, ENOENT, EPERM
from typing import TYPE_CHECKING

from cgfs.core import domain
from cgfs.core.caller import KERNEL
from cgfs.core.cftype import listings
from cgfs.core.cgroup import Cgroup
from cgfs.core.node import DIRECTORY
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.caller import Caller
    from cgfs.core.cftype import CFType
    from cgfs.core.css import Controller, Css
    from cgfs.core.roots import Roots

_ROOT_MODE = 0o555


class Hierarchy:
    """A tree of cgroups.

    Attributes:
        roots: all hierarchies of the host.
        id: number in /proc/cgroups; 0 is v2.
        version: 1 or 2.
        name: v1 ``name=`` option, "" without.
        controllers: the controllers bound to it, by name, in controller order.
        core_files: rows of the files every cgroup has.
        core_slots: slot of each by name.
        listings: those that exist in the root, and elsewhere.
        release_agent: v1, path of the program; "" for none.
    """

    def __init__(
        self, roots: Roots, id: int, version: int, core_files: tuple[CFType, ...], name: str = ""
    ) -> None:
        self.roots = roots
        self.id = id
        self.version = version
        self.name = name
        self.controllers: dict[str, Controller] = {}
        self.core_files = core_files
        self.core_slots = {row.name: slot for slot, row in enumerate(core_files, 1)}
        self.listings = listings(core_files)
        self.release_agent = ""
        self.root = Cgroup(self, None, "", KERNEL, _ROOT_MODE, 0)
        roots.nodes[self.root.block] = self.root

    def bind(self, controller: Controller, css: Css | None = None) -> None:
        """Take a controller into this hierarchy; its root state comes along with its charges."""
        self.controllers[controller.name] = controller
        self.controllers = self.roots.in_order(self.controllers)
        controller.hierarchy = self
        if css is None:
            css = self.alloc_css(controller, self.root, KERNEL, 0)
        else:
            css.cgrp = self.root
            self.root.css[controller.name] = css
        self.root.css = self.roots.in_order(self.root.css)
        self.roots.listener.appeared(self.root, css)
        if self.version == 2:
            self.root.changed("cgroup.controllers")

    def unbind(self, controller: Controller) -> Css:
        """Give a controller away, with its state in the root."""
        del self.controllers[controller.name]
        self.root.subtree_control = self.roots.control_set(
            self.root.subtree_control - {controller.name}
        )
        css = self.root.css.pop(controller.name)
        self.roots.listener.vanished(self.root, css)
        if self.version == 2:
            self.root.changed("cgroup.controllers")
            self.root.changed("cgroup.subtree_control")
        return css

    def alloc_css(self, controller: Controller, cgrp: Cgroup, owner: Caller, now_ns: int) -> Css:
        """Make a controller's state for one cgroup and put it into service."""
        parent = None if cgrp.parent is None else cgrp.parent.css[controller.name]
        css = controller.css_alloc(cgrp, parent, _owner_inside(cgrp, owner), now_ns)
        self.roots.nodes[css.block] = css
        cgrp.add_css(css)
        return css

    def find(self, path: str) -> Cgroup:
        """Look a cgroup up by its path from the root, such as "/tenant/a".

        Raises:
            CgroupError: ENOENT.
        """
        cgrp = self.root
        for name in path.split("/"):
            if name in ("", "."):
                continue
            child = cgrp.children.get(name)
            if child is None:
                raise CgroupError(ENOENT, f"cgroup {path} does not exist")
            cgrp = child
        return cgrp

    def mkdir(
        self,
        parent: Cgroup,
        name: str,
        caller: Caller = KERNEL,
        mode: int = 0o755,
        now_ns: int = 0,
    ) -> Cgroup:
        """Make a child cgroup, with the controllers its parent enables for its children.

        Args:
            parent: where.
            name: one path component, decoded with surrogate escapes.
            caller: becomes the owner of the directory and all files.
            mode: permission bits, umask applied.
            now_ns: model time.

        Raises:
            CgroupError: ENOENT in a removed cgroup, EINVAL for a newline, EEXIST, EAGAIN at
                cgroup.max.depth or cgroup.max.descendants.
        """
        if parent.dead:
            raise CgroupError(ENOENT)
        if "\n" in name:
            raise CgroupError(EINVAL)
        if name in parent.children or self.file(parent, name) is not None:
            raise CgroupError(EEXIST)
        if self.version == 2:
            _vet_limits(parent)
        cgrp = self._new_child(parent, name, caller, mode, now_ns)
        names = list(self.controllers) if self.version == 1 else domain.available(cgrp)
        for controller in names:
            if controller in parent.css:
                self.alloc_css(self.controllers[controller], cgrp, caller, now_ns)
        self.roots.listener.appeared(cgrp, cgrp)
        return cgrp

    def _new_child(
        self, parent: Cgroup, name: str, caller: Caller, mode: int, now_ns: int
    ) -> Cgroup:
        mode |= parent.mode(DIRECTORY) & stat.S_ISGID
        cgrp = Cgroup(self, parent, name, _owner_inside(parent, caller), mode, now_ns)
        self.roots.nodes[cgrp.block] = cgrp
        parent.children[name] = cgrp
        _touch(parent, now_ns)
        for ancestor in parent.ancestors():
            ancestor.nr_descendants += 1
        return cgrp

    def rmdir(self, cgrp: Cgroup, now_ns: int = 0) -> None:
        """Remove a cgroup.

        Raises:
            CgroupError: EBUSY for the root, with child cgroups or with live processes;
                ENOENT when it is removed already.
        """
        if cgrp.dead:
            raise CgroupError(ENOENT)
        self.roots.processes.sync()
        if cgrp.parent is None or cgrp.children or cgrp.populated:
            raise CgroupError(EBUSY)
        parent = cgrp.parent
        del parent.children[cgrp.name]
        _touch(parent, now_ns)
        controllers = list(cgrp.css.values())
        cgrp.taken_down(now_ns)
        domain.child_removed(parent, cgrp)
        for css in controllers:
            self.roots.listener.vanished(cgrp, css)
        self.roots.listener.vanished(cgrp, cgrp)
        self.check_for_release(parent)

    def rename(self, cgrp: Cgroup, new_parent: Cgroup, new_name: str) -> None:
        """Rename a directory (v1 only; Linux 6.12 cgroup-v1.c cgroup1_rename()).

        Raises:
            CgroupError: EPERM on v2, EIO for another parent, EINVAL for a newline, EEXIST.
        """
        if self.version == 2 or cgrp.parent is None:
            raise CgroupError(EPERM)
        if "\n" in new_name:
            raise CgroupError(EINVAL)
        if new_parent is not cgrp.parent:
            raise CgroupError(EIO)
        if new_name in new_parent.children or self.file(new_parent, new_name) is not None:
            raise CgroupError(EEXIST)
        new_parent.children = {
            new_name if child is cgrp else name: child
            for name, child in new_parent.children.items()
        }
        cgrp.name = new_name

    def file(self, cgrp: Cgroup, name: str) -> tuple[Cgroup | Css, int] | None:
        """The node and slot of a control file that a cgroup shows, or None."""
        root = cgrp.parent is None
        slot = self.core_slots.get(name)
        if slot is not None:
            return (cgrp, slot) if self.core_files[slot - 1].exists_on(root=root) else None
        css = cgrp.css.get(name.partition(".")[0])
        if css is None:
            return None
        slot = css.controller.slots.get(name)
        if slot is None or not css.rows[slot - 1].exists_on(root=root):
            return None
        return css, slot

    def check_for_release(self, cgrp: Cgroup) -> None:
        """Run the v1 release agent for a cgroup that has become unused (spec D.2)."""
        if not cgrp.notify_on_release or self.version == 2 or not self.release_agent:
            return
        if cgrp.online and not cgrp.is_root and not cgrp.populated and not cgrp.children:
            self.roots.release(self.release_agent, cgrp.path)


def _touch(cgrp: Cgroup, now_ns: int) -> None:
    cgrp.mtime_ns = now_ns
    own = cgrp.attributes(DIRECTORY)
    if own is not None:
        own.mtime_ns = None


def _vet_limits(parent: Cgroup) -> None:
    for level, ancestor in enumerate(parent.ancestors()):
        if ancestor.nr_descendants >= ancestor.max_descendants or level >= ancestor.max_depth:
            raise CgroupError(EAGAIN)


def _owner_inside(directory: Cgroup, owner: Caller) -> Caller:
    """Who owns what appears in a directory (Linux fs/kernfs/dir.c, kernfs_new_node())."""
    if not directory.mode(DIRECTORY) & stat.S_ISGID:
        return owner
    return replace(owner, gid=directory.owner(DIRECTORY)[1])
