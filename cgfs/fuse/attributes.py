"""Attributes in the form pyfuse3 sends them."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, cast

from pyfuse3 import EntryAttributes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cgfs.views.tree import Ino, Tree

FOREVER_S = 1e9
_KEEP = 32768


class Owner:
    """Who plays root in the mount of an ordinary user.

    The model's root is uid 0. In a user's own mount the kernel checks permissions against the
    attributes it is given, so uid 0 of the model is shown as the user and the user's requests
    arrive as uid 0; likewise the group. Other ids pass unchanged.

    Args:
        uid: the mounting user.
        gid: the mounting user's group.
    """

    def __init__(self, uid: int = 0, gid: int = 0) -> None:
        self.uid = uid
        self.gid = gid

    def model_uid(self, uid: int) -> int:
        """The model's number for a user the kernel names."""
        return 0 if uid == self.uid else uid

    def model_gid(self, gid: int) -> int:
        """The model's number for a group the kernel names."""
        return 0 if gid == self.gid else gid

    def shown_mode(self, mode: int, uid: int) -> int:
        """The mode to show for a file or directory of a user of the model.

        Mode bits do not keep root from making entries in its directories; the kernel holds
        them against the user who plays root.
        """
        plays_root = self.uid != 0 and uid == 0
        return mode | stat.S_IWUSR if plays_root and stat.S_ISDIR(mode) else mode

    def shown_uid(self, uid: int) -> int:
        """The number to show for a user of the model."""
        return uid or self.uid

    def shown_gid(self, gid: int) -> int:
        """The number to show for a group of the model."""
        return gid or self.gid


class EntryCache:
    """Attributes of files, made once and kept until they change.

    To make them costs as much as a whole request, for the size of a CONFIG file is the length
    of its text. A listing of a tree asks for each of them every time.
    """

    def __init__(self, tree: Tree, owner: Owner, keep: int = _KEEP) -> None:
        self._tree = tree
        self._owner = owner
        self._keep = keep
        self._entries: dict[int, EntryAttributes] = {}

    def get(self, ino: int) -> EntryAttributes:
        """The attributes of an inode; the object is shared and must not be changed.

        Raises:
            CgroupError: the inode is gone.
        """
        entry = self._entries.get(ino)
        if entry is None:
            if len(self._entries) >= self._keep:
                self._entries.clear()
            entry = self._entries[ino] = self._make(ino)
        return entry

    def drop(self, ino: int) -> None:
        """Attributes changed."""
        self._entries.pop(ino, None)

    def drop_all(self, inodes: Sequence[int]) -> None:
        """The kernel let go of these."""
        for ino in inodes:
            self._entries.pop(ino, None)

    def _make(self, ino: int) -> EntryAttributes:
        attr = self._tree.getattr(cast("Ino", ino))
        entry = EntryAttributes()
        entry.entry_timeout = entry.attr_timeout = FOREVER_S
        entry.st_ino = attr.ino
        entry.st_mode = self._owner.shown_mode(attr.mode, attr.uid)
        entry.st_nlink = attr.nlink
        entry.st_uid = self._owner.shown_uid(attr.uid)
        entry.st_gid = self._owner.shown_gid(attr.gid)
        entry.st_size = attr.size
        entry.st_atime_ns = attr.atime_ns
        entry.st_mtime_ns = attr.mtime_ns
        entry.st_ctime_ns = attr.ctime_ns
        return entry


def missing_entry() -> EntryAttributes:
    """The answer that lets the kernel remember a name as missing."""
    entry = EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = FOREVER_S
    return entry
