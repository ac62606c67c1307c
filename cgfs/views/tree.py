"""The file tree of one mount: inode numbers to model calls.

This is all an adapter such as FUSE needs: every request is one call here, and every refusal is
a CgroupError. Inode numbers come from the model (:class:`cgfs.core.node.Node`), so that no
object exists per file; the root directory of the mount is 1, whatever node it is.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from errno import E2BIG as TOO_LONG
from errno import EBUSY, EINVAL, EISDIR, ENODEV, ENOENT, ENOTDIR, EPERM
from typing import TYPE_CHECKING, NewType, Protocol

from cgfs.core import domain
from cgfs.core.caller import KERNEL
from cgfs.core.cftype import CFType, Kind
from cgfs.core.cgroup import Cgroup
from cgfs.core.node import DIRECTORY, SLOT_BITS, SLOT_MASK, Node
from cgfs.core.parse import until_nul
from cgfs.errors import CgroupError
from cgfs.views import xattrs
from cgfs.views.static import Directory, TextFile

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    from cgfs.core.caller import Caller
    from cgfs.core.roots import Roots

Ino = NewType("Ino", int)

ROOT = Ino(1)


@dataclass(slots=True)
class Attr:
    """What stat(2) shows. Sizes in bytes, times in ns of the epoch.

    The size of a LIVE file is 0; a CONFIG file's is exact, since the page cache needs it.
    """

    ino: Ino
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Listener(Protocol):
    """What the adapter hears; it must only take note."""

    def modified(self, ino: Ino) -> None:
        """An events file generated an event."""

    def changed(self, ino: Ino) -> None:
        """The text of a CONFIG file changed by something else than a write to itself."""

    def added(self, parent: Ino, name: bytes) -> None:
        """A name appeared in a directory."""

    def removed(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """A name went from a directory; of a removed cgroup's files only known ones are named."""


class Silence:
    """The listener of a tree that nobody serves."""

    def modified(self, ino: Ino) -> None:
        """Ignore an event."""

    def changed(self, ino: Ino) -> None:
        """Ignore a change of text."""

    def added(self, parent: Ino, name: bytes) -> None:
        """Ignore a new name."""

    def removed(self, parent: Ino, name: bytes, ino: Ino) -> None:
        """Ignore a removed name."""


def _nothing() -> None:
    """A host whose model is always up to date."""


def _settled(_row: CFType) -> None:
    """Nothing is on its way."""


def _unknown(_ino: Ino) -> bool:
    """Nobody outside holds a reference to any inode."""
    return False


class Tree:
    """The files of one mount.

    Args:
        roots: the host whose listener this tree becomes.
        top: the directory at the root of the mount: a :class:`Directory` of a host root, or the
            root cgroup of a hierarchy.
        epoch_ns: what to add to model time to get time of the epoch.

    Attributes:
        listener: who hears of changes.
        known: tells whether somebody outside still refers to an inode; a removed node is
            dropped when none of its inodes is known any longer.
        before_access: called by the adapter before live text is read or anything is changed:
            the host brings its model up to the present.
        settle: called by the adapter before live text of a row is read; what has to be awaited
            first, None for nothing.
    """

    def __init__(self, roots: Roots, top: Directory | Cgroup, epoch_ns: int = 0) -> None:
        self.roots = roots
        self.top = top
        self.epoch_ns = epoch_ns
        self.listener: Listener = Silence()
        self.known: Callable[[Ino], bool] = _unknown
        self.before_access: Callable[[], None] = _nothing
        self.settle: Callable[[CFType], Coroutine[Any, Any, None] | None] = _settled
        self._nodes = roots.nodes
        self._removed: set[int] = set()
        self._register(top)
        roots.listener = self

    # -- inodes ------------------------------------------------------------------------------

    def ino(self, node: Node, slot: int = DIRECTORY) -> Ino:
        """Inode number of a node's file or directory."""
        if node is self.top and slot == DIRECTORY:
            return ROOT
        return Ino(node.block << SLOT_BITS | slot)

    def resolve(self, ino: Ino) -> tuple[Node, int]:
        """The node and slot behind an inode number.

        Raises:
            CgroupError: ENOENT for a number nobody holds.
        """
        if ino == ROOT:
            return self.top, DIRECTORY
        node = self._nodes.get(ino >> SLOT_BITS)
        if node is None:
            raise CgroupError(ENOENT)
        return node, ino & SLOT_MASK

    def _directory(self, ino: Ino) -> Directory | Cgroup:
        node, slot = self.resolve(ino)
        if slot != DIRECTORY:
            raise CgroupError(ENOTDIR)
        assert isinstance(node, Directory | Cgroup)
        return node

    def row(self, ino: Ino) -> CFType | None:
        """The row of a file; None for a directory."""
        node, slot = self.resolve(ino)
        return None if slot == DIRECTORY else node.rows[slot - 1]

    def alive(self, ino: Ino) -> bool:
        """Whether the file or directory is still there."""
        node = self.top if ino == ROOT else self._nodes.get(ino >> SLOT_BITS)
        return node is not None and node.online

    def sequence(self, ino: Ino) -> int:
        """How many events an events file has generated."""
        node, slot = self.resolve(ino)
        return node.sequence(slot)

    def path(self, ino: Ino) -> bytes | None:
        """Path of a cgroup's file or directory below the mount, for somebody who must name it.

        None when it is gone, also if nobody holds its number any more, or is no cgroup's.
        """
        if not self.alive(ino):
            return None
        node, slot = self.resolve(ino)
        cgrp = node if isinstance(node, Cgroup) else getattr(node, "cgrp", None)
        if not isinstance(cgrp, Cgroup):
            return None
        prefix = self._prefix(cgrp.hierarchy.root)
        if prefix is None:
            return None
        name = "" if slot == DIRECTORY else node.rows[slot - 1].name
        parts = [prefix, cgrp.path.strip("/"), name]
        return os.fsencode("/".join(part for part in parts if part))

    def _prefix(self, root: Cgroup) -> str | None:
        def search(directory: Node, path: str) -> str | None:
            if directory is root:
                return path
            if isinstance(directory, Directory):
                for name, entry in directory.entries.items():
                    found = search(entry, f"{path}/{name}" if path else name)
                    if found is not None:
                        return found
            return None

        return search(self.top, "")

    # -- looking -----------------------------------------------------------------------------

    def lookup(self, parent: Ino, name: bytes) -> Ino | None:
        """The inode of a name in a directory, or None.

        Raises:
            CgroupError: ENOENT in a removed directory, ENOTDIR below a file.
        """
        node = self._directory(parent)
        if not node.online:
            raise CgroupError(ENOENT)
        text = os.fsdecode(name)
        if isinstance(node, Directory):
            entry = node.entries.get(text)
            return None if entry is None else self._entry_ino(entry)
        child = node.children.get(text)
        if child is not None:
            return Ino(child.block << SLOT_BITS)
        found = node.hierarchy.file(node, text)
        return None if found is None else Ino(found[0].block << SLOT_BITS | found[1])

    def _entry_ino(self, entry: Node) -> Ino:
        return self.ino(entry, 1 if isinstance(entry, TextFile) else DIRECTORY)

    def readdir(self, ino: Ino) -> list[tuple[bytes, Ino]]:
        """Names and inodes of a directory, without "." and ".."; nothing in a removed one."""
        node = self._directory(ino)
        if not node.online:
            return []
        if isinstance(node, Directory):
            return [(os.fsencode(n), self._entry_ino(e)) for n, e in node.entries.items()]
        entries = [(name, Ino(number)) for name, number in self._files(node)]
        entries += [
            (os.fsencode(name), Ino(child.block << SLOT_BITS))
            for name, child in node.children.items()
        ]
        return entries

    def _files(self, cgrp: Cgroup) -> Iterator[tuple[bytes, int]]:
        root = cgrp.parent is None
        for node in (cgrp, *cgrp.css.values()):
            base = node.block << SLOT_BITS
            for name, slot in node.listing(root=root):
                yield name, base | slot

    def getattr(self, ino: Ino) -> Attr:
        """Attributes of a file or directory, also of a removed one that is still known.

        Raises:
            CgroupError: ENOENT for a number nobody holds.
        """
        node, slot = self.resolve(ino)
        mode, size, nlink = node.mode(slot), 0, 1
        created = mtime = node.created_ns + self.epoch_ns
        if slot == DIRECTORY:
            mode |= stat.S_IFDIR
            nlink = 2 + self._nr_subdirectories(node)
            if isinstance(node, Cgroup):
                mtime = node.mtime_ns + self.epoch_ns
        else:
            mode |= stat.S_IFREG
            row = node.rows[slot - 1]
            if row.kind is Kind.CONFIG and row.show is not None and node.online:
                size = len(_encode(row.show(node, KERNEL)))
        uid, gid = node.owner(slot)
        own = node.attributes(slot)
        if own is None:
            return Attr(ino, mode, nlink, uid, gid, size, created, mtime, created)
        return Attr(
            ino,
            mode,
            nlink,
            uid,
            gid,
            size,
            created if own.atime_ns is None else own.atime_ns,
            mtime if own.mtime_ns is None else own.mtime_ns,
            created if own.ctime_ns is None else own.ctime_ns,
        )

    @staticmethod
    def _nr_subdirectories(node: Node) -> int:
        if isinstance(node, Cgroup):
            return len(node.children)
        assert isinstance(node, Directory)
        return sum(not isinstance(entry, TextFile) for entry in node.entries.values())

    # -- reading and writing -------------------------------------------------------------------

    def read(self, ino: Ino, caller: Caller) -> bytes:
        """Generate the text of a file.

        Raises:
            CgroupError: ENODEV for a removed file, EINVAL without a read handler, EISDIR, or
                what the handler raises.
        """
        node, slot = self.resolve(ino)
        if slot == DIRECTORY:
            raise CgroupError(EISDIR)
        if not node.online:
            raise CgroupError(ENODEV)
        show = node.rows[slot - 1].show
        if show is None:
            raise CgroupError(EINVAL)
        return _encode(show(node, caller))

    def write(self, ino: Ino, data: bytes, opener: Caller, now_ns: int) -> None:
        """Carry out the command of one system call, all of it or nothing.

        Raises:
            CgroupError: E2BIG, ENODEV, EINVAL without a write handler, EISDIR, or what the
                handler raises.
        """
        node, slot = self.resolve(ino)
        if slot == DIRECTORY:
            raise CgroupError(EISDIR)
        row = node.rows[slot - 1]
        if len(data) > row.max_write:
            raise CgroupError(TOO_LONG)
        if not node.online:
            raise CgroupError(ENODEV)
        if not data:
            return
        if row.write is None:
            raise CgroupError(EINVAL)
        row.write(node, until_nul(data), opener, now_ns)

    # -- directories -----------------------------------------------------------------------------

    def mkdir(self, parent: Ino, name: bytes, mode: int, caller: Caller, now_ns: int) -> Ino:
        """Make a cgroup; returns its directory's inode.

        Raises:
            CgroupError: as Hierarchy.mkdir; EPERM outside a hierarchy.
        """
        node = self._directory(parent)
        if isinstance(node, Directory):
            raise CgroupError(EPERM)
        cgrp = node.hierarchy.mkdir(node, os.fsdecode(name), caller, mode & 0o7777, now_ns)
        return Ino(cgrp.block << SLOT_BITS)

    def rmdir(self, parent: Ino, name: bytes, caller: Caller, now_ns: int) -> Ino:
        """Remove a cgroup; returns the inode of the directory that went.

        Raises:
            CgroupError: ENOENT, ENOTDIR for a control file, EBUSY; EPERM outside a hierarchy.
        """
        child = self._child(parent, name)
        cgrp_ino = self.ino(child)
        child.hierarchy.rmdir(child, now_ns)
        return cgrp_ino

    def rows_changed_by_rmdir(self, ino: Ino) -> tuple[str, ...]:
        """Names of CONFIG files of other cgroups that a removal may change."""
        node, _ = self.resolve(ino)
        threaded = isinstance(node, Cgroup) and domain.is_threaded(node)
        return ("cgroup.type", "cgroup.controllers") if threaded else ()

    def _child(self, parent: Ino, name: bytes) -> Cgroup:
        node = self._directory(parent)
        ino = self.lookup(parent, name)
        if ino is None:
            raise CgroupError(ENOENT)
        child, slot = self.resolve(ino)
        if slot != DIRECTORY:
            raise CgroupError(ENOTDIR)
        if isinstance(node, Directory) or not isinstance(child, Cgroup):
            raise CgroupError(EBUSY if isinstance(child, Cgroup) else EPERM)
        return child

    def rename(
        self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, flags: int
    ) -> None:
        """Rename a directory, which only v1 allows.

        Raises:
            CgroupError: EINVAL with any renameat2 flag, EPERM on v2 and outside a hierarchy,
                ENOTDIR for a v1 control file, EIO, EEXIST, ENOENT.
        """
        if flags:
            raise CgroupError(EINVAL)
        node, new_node = self._directory(parent), self._directory(new_parent)
        if isinstance(node, Directory) or isinstance(new_node, Directory):
            raise CgroupError(EPERM)
        if node.hierarchy.version == 2:
            raise CgroupError(EPERM)
        node.hierarchy.rename(self._child(parent, name), new_node, os.fsdecode(new_name))

    # -- attributes --------------------------------------------------------------------------------

    def setattr(
        self,
        ino: Ino,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
    ) -> None:
        """Set what is given; a size cannot be set."""
        node, slot = self.resolve(ino)
        own = node.own_attributes(slot)
        if mode is not None:
            own.mode = mode & 0o7777
        if uid is not None:
            own.uid = uid
        if gid is not None:
            own.gid = gid
        if atime_ns is not None:
            own.atime_ns = atime_ns
        if mtime_ns is not None:
            own.mtime_ns = mtime_ns
        if ctime_ns is not None:
            own.ctime_ns = ctime_ns

    def setxattr(self, ino: Ino, name: bytes, value: bytes) -> None:
        """Set an extended attribute.

        Raises:
            CgroupError: EOPNOTSUPP for other prefixes, ENOSPC at the limits of kernfs.
        """
        node, slot = self.resolve(ino)
        xattrs.set(node.own_attributes(slot), name, value)

    def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """Its value.

        Raises:
            CgroupError: ENODATA, EOPNOTSUPP.
        """
        node, slot = self.resolve(ino)
        return xattrs.get(node.attributes(slot), name)

    def listxattr(self, ino: Ino) -> list[bytes]:
        """Names, the greatest first."""
        node, slot = self.resolve(ino)
        return xattrs.names(node.attributes(slot))

    def removexattr(self, ino: Ino, name: bytes) -> None:
        """Remove one.

        Raises:
            CgroupError: ENODATA, EOPNOTSUPP.
        """
        node, slot = self.resolve(ino)
        xattrs.remove(node.attributes(slot), name)

    # -- static parts ------------------------------------------------------------------------------

    def insert(self, directory: Directory, name: str, node: Directory | TextFile) -> None:
        """Put a directory or text file into a static directory."""
        directory.entries[name] = node
        self._register(node)
        self.listener.added(self.ino(directory), os.fsencode(name))

    def remove(self, directory: Directory, name: str) -> None:
        """Take it out again, with all that is below it."""
        node = directory.entries.pop(name)
        if isinstance(node, Directory):
            for below in list(node.entries):
                self.remove(node, below)
        node.online = False
        self.listener.removed(self.ino(directory), os.fsencode(name), self._entry_ino(node))
        self._drop_or_keep(node, held=self._is_held(node))

    def text_changed(self, file: TextFile) -> None:
        """The text of a static CONFIG file is another one now."""
        self.listener.changed(self.ino(file, 1))

    def _register(self, node: Node) -> None:
        self._nodes[node.block] = node
        if isinstance(node, Directory):
            for entry in node.entries.values():
                self._register(entry)

    # -- the model's listener ----------------------------------------------------------------------

    def modified(self, node: Node, slot: int) -> None:
        """ModelListener: an events file generated an event."""
        self.listener.modified(Ino(node.block << SLOT_BITS | slot))

    def changed(self, node: Node, slot: int) -> None:
        """ModelListener: a CONFIG file reads differently."""
        self.listener.changed(Ino(node.block << SLOT_BITS | slot))

    def appeared(self, cgrp: Cgroup, node: Node) -> None:
        """ModelListener: a cgroup, or a controller's files in one, appeared."""
        if node is cgrp:
            if cgrp.parent is not None:
                self.listener.added(self.ino(cgrp.parent), os.fsencode(cgrp.name))
            return
        parent = self.ino(cgrp)
        for name, _ in node.listing(root=cgrp.parent is None):
            self.listener.added(parent, name)

    def vanished(self, cgrp: Cgroup, node: Node) -> None:
        """ModelListener: a cgroup, or a controller's files in one, went."""
        parent, known, online = self.ino(cgrp), self.known, cgrp.online
        base = node.block << SLOT_BITS
        held = node is cgrp and known(Ino(base))
        for name, slot in node.listing(root=cgrp.parent is None):
            ino = Ino(base | slot)
            is_known = known(ino)
            held = held or is_known
            if online or is_known:
                self.listener.removed(parent, name, ino)
        if node is cgrp and cgrp.parent is not None:
            self.listener.removed(self.ino(cgrp.parent), os.fsencode(cgrp.name), parent)
        if not node.online:
            self._drop_or_keep(node, held=held)

    # -- removed nodes -----------------------------------------------------------------------------

    def _drop_or_keep(self, node: Node, *, held: bool) -> None:
        if held:
            self._removed.add(node.block)
        else:
            self._removed.discard(node.block)
            self._nodes.pop(node.block, None)

    def _is_held(self, node: Node) -> bool:
        base = node.block << SLOT_BITS
        return any(self.known(Ino(base | slot)) for slot in range(len(node.rows) + 1))

    def forget(self, ino: Ino) -> None:
        """The last outside reference to an inode is gone; call after ``known`` says so."""
        block = ino >> SLOT_BITS
        if block in self._removed:
            node = self._nodes[block]
            self._drop_or_keep(node, held=self._is_held(node))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
