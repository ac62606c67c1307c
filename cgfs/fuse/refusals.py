"""Requests that a cgroup file system does not know.

The errno are those of cgroupfs (spec C.4, F.1). What is refused with ENOSYS the kernel does by
itself from then on, or leaves undone.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from pyfuse3 import FUSEError

from cgfs.fuse.answers import answers

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, FileInfo, RequestContext


class Refusals:
    """Handlers that refuse (same methods as ``pyfuse3.Operations``)."""

    @answers
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """CREATE of a name that is not there."""
        raise FUSEError(errno.EACCES)

    @answers
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """MKNOD: cgroupfs has no such operation, but creates regular files (in vain)."""
        raise FUSEError(errno.EACCES if stat.S_ISREG(mode) else errno.EPERM)

    @answers
    def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """SYMLINK."""
        raise FUSEError(errno.EPERM)

    @answers
    def link(
        self, ino: int, new_parent: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """LINK."""
        raise FUSEError(errno.EPERM)

    @answers
    def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        """UNLINK."""
        raise FUSEError(errno.EPERM)

    @answers
    def flush(self, fh: int) -> None:
        """FLUSH: never asked again after this answer."""
        raise FUSEError(errno.ENOSYS)

    @answers
    def fsync(self, fh: int, datasync: bool) -> None:
        """FSYNC."""
        raise FUSEError(errno.ENOSYS)

    @answers
    def readlink(self, ino: int, ctx: RequestContext) -> bytes:
        """READLINK; there are no links."""
        raise FUSEError(errno.ENOSYS)

    @answers
    def access(self, ino: int, mode: int, ctx: RequestContext) -> bool:
        """ACCESS; the kernel checks by itself (default_permissions)."""
        raise FUSEError(errno.ENOSYS)

    @answers
    def fsyncdir(self, fh: int, datasync: bool) -> None:
        """FSYNCDIR: cgroupfs has no such thing; without an answer it would succeed."""
        raise FUSEError(errno.EINVAL)
