"""What owns files: a cgroup with its core files, or a controller's state with that controller's.

A node's files are numbered by slot: slot ``i + 1`` is the node's row ``i``; slot 0 is the
directory of a cgroup. Together with the node's block number, which is never used twice, a slot
is a file's identity for as long as the host lives. A controller that is disabled and enabled
again gets a new block, hence new inodes with default attributes, as in kernfs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cgfs.core.caller import Caller
    from cgfs.core.cftype import CFType, Listing

DIRECTORY = 0
# Room for the files of the largest node.
SLOT_BITS = 6
SLOT_MASK = (1 << SLOT_BITS) - 1
MAY_WRITE = 0o2


class Attributes:
    """What somebody set on one file: None where the default still holds.

    Times are nanoseconds of the epoch; once set they stay (kernfs does not touch them again).
    """

    __slots__ = ("atime_ns", "ctime_ns", "gid", "mode", "mtime_ns", "uid", "xattrs")

    def __init__(self) -> None:
        self.mode: int | None = None
        self.uid: int | None = None
        self.gid: int | None = None
        self.atime_ns: int | None = None
        self.mtime_ns: int | None = None
        self.ctime_ns: int | None = None
        self.xattrs: dict[bytes, bytes] | None = None


class Node:
    """Identity, owner and attributes of a group of files.

    Attributes:
        block: number of this node, unique for the life of the host.
        uid: owner of every file on which no chown was done: who made the node appear.
        gid: likewise.
        created_ns: model time at which it appeared.
        online: False once removed; reads and writes of its files then give ENODEV.
    """

    __slots__ = ("_attributes", "_sequences", "block", "created_ns", "gid", "online", "uid")

    def __init__(self, block: int, owner: Caller, now_ns: int) -> None:
        self.block = block
        self.uid = owner.uid
        self.gid = owner.gid
        self.created_ns = now_ns
        self.online = True
        self._attributes: dict[int, Attributes] | None = None
        self._sequences: dict[int, int] | None = None

    def ino(self, slot: int) -> int:
        """Inode number of a file of this node."""
        return self.block << SLOT_BITS | slot

    @property
    def rows(self) -> Sequence[CFType]:
        """The rows of this node's files; slot ``i + 1`` is row ``i``."""
        raise NotImplementedError

    def listing(self, *, root: bool) -> Listing:
        """Name and slot of the files this node has in a root, or in another cgroup."""
        raise NotImplementedError

    def attributes(self, slot: int) -> Attributes | None:
        """What was set on a file, or None."""
        return self._attributes.get(slot) if self._attributes else None

    def own_attributes(self, slot: int) -> Attributes:
        """The same, made when missing, to be changed by the caller."""
        if self._attributes is None:
            self._attributes = {}
        return self._attributes.setdefault(slot, Attributes())

    def owner(self, slot: int) -> tuple[int, int]:
        """(uid, gid) of a file."""
        own = self.attributes(slot)
        if own is None:
            return self.uid, self.gid
        return (
            self.uid if own.uid is None else own.uid,
            self.gid if own.gid is None else own.gid,
        )

    def default_mode(self, slot: int) -> int:
        """Permission bits of a fresh file."""
        return self.rows[slot - 1].mode

    def mode(self, slot: int) -> int:
        """Permission bits of a file as they are."""
        own = self.attributes(slot)
        return self.default_mode(slot) if own is None or own.mode is None else own.mode

    def sequence(self, slot: int) -> int:
        """How many events a file has generated."""
        return self._sequences.get(slot, 0) if self._sequences else 0

    def bump(self, slot: int) -> None:
        """Count one event of a file."""
        if self._sequences is None:
            self._sequences = {}
        self._sequences[slot] = self._sequences.get(slot, 0) + 1

    def may_write(self, slot: int, caller: Caller) -> bool:
        """Whether mode bits let ``caller`` write a file (Linux generic_permission())."""
        if caller.uid == 0:
            return True
        uid, gid = self.owner(slot)
        mode = self.mode(slot)
        if caller.uid == uid:
            return bool(mode >> 6 & MAY_WRITE)
        if caller.gid == gid or gid in caller.groups:
            return bool(mode >> 3 & MAY_WRITE)
        return bool(mode & MAY_WRITE)
