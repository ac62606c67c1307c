"""FUSE request -> one call into the tree -> answer or errno."""

from __future__ import annotations

import copy
import errno
import logging
import os
import select
import stat
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from cgfs.core.caller import Caller
from cgfs.core.cftype import Kind
from cgfs.fuse.answers import answers
from cgfs.fuse.attributes import EntryCache, Owner, missing_entry
from cgfs.fuse.changes import Changes
from cgfs.fuse.gate import Gate, Ticket
from cgfs.fuse.handles import Handle, OpenFiles
from cgfs.fuse.inodes import Inodes
from cgfs.fuse.notify import Notifier
from cgfs.fuse.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from pyfuse3 import PollHandle, ReaddirToken, RequestContext, SetattrFields, StatvfsData

    from cgfs.core.cftype import CFType
    from cgfs.fuse.driver import Driver
    from cgfs.views.tree import Tree

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Looked up once: an enumeration's members are found through a descriptor each time.
_CONFIG = Kind.CONFIG
_WRITES = os.O_ACCMODE | os.O_TRUNC
_ALWAYS = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
_EVENT = select.POLLPRI | select.POLLERR
_KNOWN_CALLERS = 1024

# A removed file has no size, and past the end a page-cache reader would not ask any more.
_SIZE_OF_REMOVED = 4096
_CAPABILITY = b"security.capability"


class Operations(Refusals):
    """The handlers pyfuse3 calls (same methods as ``pyfuse3.Operations``).

    Args:
        tree: what is served.
        driver: the loop that runs the handlers.
        owner: who plays root.
        gate: decides who may be cached.
        now_ns: the model's time.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        tree: Tree,
        driver: Driver,
        *,
        owner: Owner | None = None,
        gate: Gate | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        # The kernel's inode numbers are the tree's; pyfuse3 has them as plain ints.
        self._tree = cast("Any", tree)
        self._driver = driver
        self._owner = owner or Owner()
        self._now_ns = now_ns
        self._inodes = Inodes()
        self._files = OpenFiles()
        self._entries = EntryCache(tree, self._owner)
        self.gate = gate or Gate(time.monotonic_ns)
        self.changes = Changes(self._inodes, self._entries, self.gate, self._files)
        tree.listener = cast("Any", self.changes)
        # A bound method of the dictionary itself: a removal asks once per file.
        tree.known = self._inodes.lookups.__contains__
        self.notifier = Notifier(self.changes, self._inodes, self._files, driver, self._path)
        self._callers: dict[tuple[int, int, int], Caller] = {}
        self._capable: set[int] = set()
        self._asked_again: set[tuple[int, int]] = set()
        self._missing = missing_entry()
        # pyfuse3 copies what open returns before anything else can run.
        self._direct = FileInfo(direct_io=True, keep_cache=True)
        self._cached = FileInfo(direct_io=False, keep_cache=True)

    def init(self) -> None:
        """The mount begins."""

    def stacktrace(self) -> None:
        """Logs where every thread is (setfattr -n fuse_stacktrace on the mount point)."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():  # noqa: SLF001 - the documented way
            text = "".join(traceback.format_stack(frame))
            log.error("thread %s:\n%s", names.get(ident, ident), text)

    def close(self) -> None:
        """Drops what belongs to the session, before the session goes."""
        self._files.clear_polls()

    async def change(self, rows: Sequence[str], act: Callable[[], _Result]) -> _Result:
        """Changes CONFIG texts from inside the process as strictly as a write would.

        Args:
            rows: names of the files whose text may change.
            act: makes the change.

        Returns:
            What ``act`` returned, when no reader can see an older text any more.
        """
        await self._park(self.gate.begin_change(rows))
        try:
            self.changes.in_request = True
            try:
                result = act()
            finally:
                self.changes.in_request = False
                await self.notifier.settle()
        finally:
            self.gate.end_change(rows)
        return result

    # Names and attributes

    @answers
    def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """LOOKUP; a missing name is remembered by the kernel."""
        ino = self._tree.lookup(parent, name)
        if ino is None:
            if self._inodes.remember_missing(parent, name):
                return self._missing
            raise FUSEError(errno.ENOENT)
        entry = self._entries.get(ino)
        self._inodes.looked_up(ino)
        return entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """FORGET has no answer, so nothing may be raised."""
        gone = self._inodes.forget(inode_list)
        self._entries.drop_all(gone)
        for ino in gone:
            try:
                self._tree.forget(ino)
            except Exception:
                log.exception("forget of inode %d", ino)

    @answers
    def getattr(self, ino: int, ctx: RequestContext) -> EntryAttributes:
        """GETATTR; removed nodes that are still referenced have attributes too."""
        entry = self._entries.get(ino)
        if not self._tree.alive(ino) and self._files.is_cached(ino):
            entry = copy.copy(entry)
            entry.st_size = _SIZE_OF_REMOVED
        return entry

    @answers
    def setattr(
        self,
        ino: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """SETATTR: chmod, chown, utimes; a new size is accepted and ignored."""
        if self.notifier.is_poke(ctx.pid):
            return self._entries.get(ino)
        values: dict[str, int] = {}
        if fields.update_mode:
            values["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            values["uid"] = self._owner.model_uid(attr.st_uid)
        if fields.update_gid:
            values["gid"] = self._owner.model_gid(attr.st_gid)
        if fields.update_atime:
            values["atime_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            values["mtime_ns"] = attr.st_mtime_ns
        if values:
            self._tree.setattr(ino, **values, ctime_ns=time.time_ns())
            self._entries.drop(ino)
        return self._entries.get(ino)

    @answers
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        """STATFS as cgroupfs answers it, as far as FUSE passes it on (spec C.1)."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data

    @answers
    def setxattr(self, ino: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """SETXATTR; pyfuse3 sees to CREATE and REPLACE by `getxattr`."""
        if name == _CAPABILITY:
            self._capable.add(ino)
        self._tree.setxattr(ino, name, value)

    @answers
    def getxattr(self, ino: int, name: bytes, ctx: RequestContext) -> bytes:
        """GETXATTR; the kernel asks for one of them at every open with O_TRUNC."""
        if name == _CAPABILITY and ino not in self._capable:
            raise FUSEError(errno.ENODATA)
        return cast("bytes", self._tree.getxattr(ino, name))

    @answers
    def listxattr(self, ino: int, ctx: RequestContext) -> Sequence[bytes]:
        """LISTXATTR, in order of creation."""
        return cast("Sequence[bytes]", self._tree.listxattr(ino))

    @answers
    def removexattr(self, ino: int, name: bytes, ctx: RequestContext) -> None:
        """REMOVEXATTR."""
        self._tree.removexattr(ino, name)

    # Directories

    @answers
    def opendir(self, ino: int, ctx: RequestContext) -> int:
        """OPENDIR."""
        return self._files.add_directory(ino)

    @answers
    def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """READDIRPLUS: every entry comes with its attributes and counts as a lookup."""
        directory = self._files.directories[fh]
        entries = directory.entries
        if entries is None or start_id == 0:
            ino = directory.ino
            entries = [(b".", ino), (b"..", ino), *self._tree.readdir(ino)]
            directory.entries = entries
        looked_up = self._inodes.looked_up
        for index in range(start_id, len(entries)):
            name, ino = entries[index]
            dots = index < 2
            if not dots and not self._tree.alive(ino):
                continue
            if not pyfuse3.readdir_reply(token, name, self._entries.get(ino), index + 1):
                break
            if not dots:
                looked_up(ino)

    @answers
    def releasedir(self, fh: int) -> None:
        """RELEASEDIR."""
        self._files.directories.pop(fh, None)

    @answers
    def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes | Coroutine[Any, Any, EntryAttributes]:
        """MKDIR."""
        tree = self._tree
        tree.before_access()
        self._inodes.appeared(parent, name)
        self.changes.in_request = True
        try:
            ino = tree.mkdir(parent, name, stat.S_IMODE(mode), self._caller(ctx), self._now_ns())
        finally:
            self.changes.in_request = False
        self._entries.drop(parent)
        entry = self._entries.get(ino)
        self._inodes.looked_up(ino)
        # The kernel knows that its own mkdir changes the parent.
        self.changes.resized.clear()
        if self.changes.pending and not self.notifier.settle_events():
            return self._then(entry, entries_too=False)
        return entry

    @answers
    def rmdir(
        self, parent: int, name: bytes, ctx: RequestContext
    ) -> Coroutine[Any, Any, None] | None:
        """RMDIR; descriptors below it give ENODEV from here on."""
        if self.gate.has_readers_at_all:
            ino = self._tree.lookup(parent, name)
            rows = () if ino is None else self._tree.rows_changed_by_rmdir(ino)
            if rows:
                return self._rmdir_widely(rows, parent, name, ctx)
        return self._rmdir(parent, name, ctx)

    async def _rmdir_widely(
        self, rows: Sequence[str], parent: int, name: bytes, ctx: RequestContext
    ) -> None:
        await self._park(self.gate.begin_change(rows))
        try:
            rest = self._rmdir(parent, name, ctx)
            if rest is not None:
                await rest
        finally:
            self.gate.end_change(rows)

    def _rmdir(
        self, parent: int, name: bytes, ctx: RequestContext
    ) -> Coroutine[Any, Any, None] | None:
        tree = self._tree
        tree.before_access()
        self.changes.in_request = True
        try:
            ino = tree.rmdir(parent, name, self._caller(ctx), self._now_ns())
        finally:
            self.changes.in_request = False
        self._entries.drop(parent)
        self._entries.drop(ino)
        # Names inside the directory that nobody has open go with it; the directory's own name
        # is the kernel's business.
        changes = self.changes
        changes.resized.clear()
        changes.entries = [
            entry
            for entry in changes.entries
            if entry[:2] != (parent, name) and self._files.is_open(entry[2])
        ]
        if changes.pending and not self.notifier.settle_events():
            return self._then(None, entries_too=False)
        return None

    @answers
    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> Coroutine[Any, Any, None] | None:
        """RENAME."""
        if flags:
            raise FUSEError(errno.EINVAL)
        tree = self._tree
        tree.before_access()
        self.changes.in_request = True
        try:
            tree.rename(parent, name, new_parent, new_name, flags)
        finally:
            self.changes.in_request = False
        self._inodes.appeared(new_parent, new_name)
        # The kernel moves its own entry; the model's notes about the names are about that one.
        self.changes.entries = []
        if self.changes.pending and not self.notifier.settle_events():
            return self._then(None, entries_too=False)
        return None

    # Files

    @answers
    def open(
        self, ino: int, flags: int, ctx: RequestContext
    ) -> FileInfo | Coroutine[Any, Any, FileInfo]:
        """OPEN: cached or direct, as the gate says."""
        if flags & os.O_DIRECT:
            raise FUSEError(errno.EINVAL)
        node, slot = self._tree.resolve(ino)
        if not node.online:
            raise FUSEError(self._error_of_removed(ino, ctx.pid))
        row: CFType = node.rows[slot - 1]
        writes = flags & _WRITES
        caller = self._opener(ctx) if writes else self._caller(ctx)
        handle = Handle(ino, node, row, caller)
        if row.kind is _CONFIG and row.show is not None:
            if writes:
                handle.writer = True
                ticket = self.gate.open_writer(ino, row.name)
                if ticket is not None:
                    return self._open_parked(handle, ticket)
            elif self.gate.open_reader(ino, row.name):
                handle.cached = True
                info = self._cached
                info.fh = self._files.add(handle)
                return info
        info = self._direct
        info.fh = self._files.add(handle)
        return info

    async def _open_parked(self, handle: Handle, ticket: Ticket) -> FileInfo:
        try:
            await self._park(ticket)
        except BaseException:
            self.gate.close_writer(handle.ino)
            raise
        self._direct.fh = self._files.add(handle)
        return self._direct

    def _error_of_removed(self, ino: int, pid: int) -> int:
        """Opening by name is ENOENT, opening again through /proc/PID/fd is ENODEV (spec C.8).

        After ESTALE the kernel walks the path once more without trusting what it remembers, and
        finds that the name has gone. Only a path without a name ends here a second time.
        """
        asked = ino, pid
        if asked in self._asked_again:
            self._asked_again.remove(asked)
            return errno.ENODEV
        if len(self._asked_again) >= _KNOWN_CALLERS:
            self._asked_again.clear()
        self._asked_again.add(asked)
        return errno.ESTALE

    @answers
    def read(self, fh: int, off: int, size: int) -> bytes | Coroutine[Any, Any, bytes]:
        """READ: text is generated at offset 0 and wherever the previous read did not end."""
        handle = self._files.files[fh]
        # The page cache asks by pages, and may have those before from another descriptor.
        if off and off == handle.next and not handle.cached:
            text = handle.text
            if off >= len(text):
                if not handle.node.online:
                    raise FUSEError(errno.ENODEV)
                return b""
        else:
            if handle.row.kind is not _CONFIG and (settling := self._tree.settle(handle.row)):
                return self._read_settled(settling, handle, off, size)
            text = self._generate(handle)
            if not off and size >= len(text):
                handle.next = len(text)
                return text
        return self._chunk(handle, text, off, size)

    async def _read_settled(
        self, settling: Coroutine[Any, Any, None], handle: Handle, off: int, size: int
    ) -> bytes:
        await settling
        return self._chunk(handle, self._generate(handle), off, size)

    def _chunk(self, handle: Handle, text: bytes, off: int, size: int) -> bytes:
        chunk = text[off : off + size]
        handle.next = off + len(chunk)
        return chunk

    def _generate(self, handle: Handle) -> bytes:
        tree = self._tree
        row = handle.row
        if row.kind is not _CONFIG:
            tree.before_access()
        text: bytes = tree.read(handle.ino, handle.caller)
        if row.notify:
            handle.seen = tree.sequence(handle.ino)
        elif text or row.kind is _CONFIG:
            # An empty list of processes has not been shown (kernfs_seq_show() did not run).
            handle.seen = 0
        handle.text = text
        return text

    @answers
    def write(self, fh: int, off: int, buf: bytes) -> int | Coroutine[Any, Any, int]:
        """WRITE: one command, wherever in the file it is written."""
        handle = self._files.files[fh]
        if handle.row.changes and buf:
            return self._write_widely(handle, buf)
        self._write(handle, buf)
        if self.gate.is_held(handle.ino):
            self.changes.stale.append(handle.ino)
        if self.changes.pending and not self.notifier.settle_events():
            return self._then(len(buf))
        return len(buf)

    async def _write_widely(self, handle: Handle, buf: bytes) -> int:
        rows = handle.row.changes
        await self._park(self.gate.begin_change(rows))
        try:
            try:
                self._write(handle, buf)
            finally:
                # A refused write may have changed something before it was refused.
                await self.notifier.settle()
        finally:
            self.gate.end_change(rows)
        return len(buf)

    def _write(self, handle: Handle, buf: bytes) -> None:
        tree = self._tree
        tree.before_access()
        self.changes.in_request = True
        try:
            tree.write(handle.ino, buf, handle.caller, self._now_ns())
        finally:
            self.changes.in_request = False
            self._entries.drop(handle.ino)

    @answers
    def poll(self, ino: int, fh: int, poll_handle: PollHandle | None, ctx: RequestContext) -> int:
        """POLL: an event since this descriptor's last generation of text is urgent data."""
        handle = self._files.files[fh]
        if poll_handle is not None:
            self._files.poll(fh, handle, poll_handle)
        if not handle.node.online:
            return _ALWAYS | _EVENT
        # What a cached descriptor has read, it read in the kernel.
        if handle.cached:
            return _ALWAYS
        now = self._tree.sequence(ino) if handle.row.notify else 0
        return _ALWAYS if handle.seen == now else _ALWAYS | _EVENT

    @answers
    def release(self, fh: int) -> None:
        """RELEASE; nobody waits for its answer."""
        handle = self._files.release(fh)
        if handle is None:
            return
        if handle.cached:
            self.gate.close_reader(handle.ino, handle.row.name)
        elif handle.writer:
            self.gate.close_writer(handle.ino)

    # Waiting

    async def _then(self, result: _Result, *, entries_too: bool = True) -> _Result:
        await self.notifier.settle(entries_too=entries_too)
        return result

    async def _park(self, ticket: Ticket | None) -> None:
        """Waits until page-cache readers have closed, or the grace is over."""
        if ticket is None:
            return
        event = trio.Event()
        ticket.on_clear = event.set
        with self._driver.waiting(), trio.move_on_after(self.gate.grace_left_s(ticket)):
            await event.wait()
        if not ticket.clear:
            self.gate.expire(ticket)

    # Who asks

    def _caller(self, ctx: RequestContext) -> Caller:
        key = ctx.uid, ctx.gid, ctx.pid
        caller = self._callers.get(key)
        if caller is None:
            if len(self._callers) >= _KNOWN_CALLERS:
                self._callers.clear()
            uid, gid = self._owner.model_uid(ctx.uid), self._owner.model_gid(ctx.gid)
            caller = self._callers[key] = Caller(uid, gid, ctx.pid)
        return caller

    def _opener(self, ctx: RequestContext) -> Caller:
        """The caller with supplementary groups, which the model asks of writers only."""
        caller = self._caller(ctx)
        if caller.uid == 0:
            return caller
        try:
            groups = pyfuse3.get_sup_groups(ctx.pid)
        except (OSError, RuntimeError):
            return caller  # it has ended, or lives in a pid namespace we cannot see
        shown = frozenset(self._owner.model_gid(gid) for gid in groups)
        return Caller(caller.uid, caller.gid, caller.pid, shown)

    def _path(self, ino: int) -> bytes | None:
        return cast("bytes | None", self._tree.path(ino))
