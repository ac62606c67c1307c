"""Telling the kernel and its users what changed, off the request path.

A handler that changed the model calls `Notifier.settle` before it answers: then no reader can see
anything older than the change once it is acknowledged. Changes that come from elsewhere in the
process are handed on by `Notifier.run`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from cgfs.core.node import DIRECTORY, SLOT_MASK
from cgfs.fuse.event_rate import EventRate
from cgfs.fuse.threads import KernelThread

if TYPE_CHECKING:
    from cgfs.fuse.changes import Changes, Entry
    from cgfs.fuse.driver import Driver
    from cgfs.fuse.handles import OpenFiles
    from cgfs.fuse.inodes import Inodes

log = logging.getLogger(__name__)

Path = Callable[[int], bytes | None]
"""Inode -> path below the mount point; None if it has none any more."""

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2

# Between a LOOKUP's answer and the kernel's making of the inode, an invalidation finds nothing.
_RETRIES = 20
_RETRY_S = 0.0005

# Longest time an answer is kept back for the kernel to take note.
_SETTLE_S = 2.0
_JOIN_S = 2.0


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_MTIME_ONLY = (_Timespec * 2)(_Timespec(0, _UTIME_OMIT), _Timespec(0, _UTIME_NOW))
_libc: Any = ctypes.CDLL(None, use_errno=True)


class Notifier:
    """Hands the notes of `Changes` on.

    Args:
        changes: the notes.
        inodes: what the kernel knows.
        files: who polls.
        driver: the loop that serves requests.
        path: where an events file is.
    """

    def __init__(
        self, changes: Changes, inodes: Inodes, files: OpenFiles, driver: Driver, path: Path
    ) -> None:
        self._changes = changes
        self._inodes = inodes
        self._files = files
        self._driver = driver
        self._path = path
        self._mountpoint = b""
        self._rate = EventRate()
        self._kick = trio.Event()
        self._token: trio.lowlevel.TrioToken
        self._stopped = False
        self._inode_thread = KernelThread("inodes", self._invalidate_inode)
        self._entry_thread = KernelThread("entries", _invalidate_entry)
        self._poke_thread = KernelThread("pokes", _poke)
        changes.wake = self._wake

    def start(self, mountpoint: bytes) -> None:
        """Starts the threads; the mount is there."""
        self._mountpoint = mountpoint
        self._token = trio.lowlevel.current_trio_token()
        for thread in self._threads:
            thread.start()

    async def stop(self) -> bool:
        """Ends the threads while requests are still served; whether all have ended."""
        self._stopped = True
        for thread in self._threads:
            thread.close()
        with self._driver.waiting(), trio.move_on_after(_JOIN_S):
            while not self.join(0):  # noqa: ASYNC110 - a thread's end sets no event
                await trio.sleep(0.001)
        return self.join(0)

    def join(self, timeout_s: float) -> bool:
        """Whether all threads have ended, each in this time."""
        return all(thread.join(timeout_s) for thread in self._threads)

    def is_poke(self, pid: int) -> bool:
        """Whether a request comes from our own pokes."""
        return pid == self._poke_thread.native_id

    async def run(self) -> None:
        """Hands on what no handler takes care of; never returns."""
        while True:
            due_ns = self._rate.next_due_ns()
            wait_s = float("inf") if due_ns is None else (due_ns - time.monotonic_ns()) / 1e9
            with trio.move_on_after(max(0.0, wait_s)):
                await self._kick.wait()
            self._kick = trio.Event()
            for ino in self._rate.due(time.monotonic_ns()):
                self._tell(ino)
            self.hand_on()

    def hand_on(self) -> None:
        """Passes every note on without waiting."""
        changes = self._changes
        stale, entries = changes.stale, changes.entries
        self._inline()
        if stale:
            self._inode_thread.submit(stale, _nothing)
        if entries:
            self._entry_thread.submit(entries, _nothing)

    async def settle(self, *, entries_too: bool = True) -> None:
        """Passes every note on and waits until the kernel has dropped what it must not use.

        Args:
            entries_too: wait for names as well. False where the request itself holds a lock of a
                directory concerned (mkdir, rmdir, rename).
        """
        changes = self._changes
        stale, entries = changes.stale, changes.entries
        self._inline()
        waits = []
        if stale:
            waits.append(self._submit(self._inode_thread, stale))
        if entries and entries_too:
            waits.append(self._submit(self._entry_thread, entries))
        elif entries:
            self._entry_thread.submit(entries, _nothing)
        if waits:
            await self._wait(waits)

    def settle_events(self) -> bool:
        """Passes notes on that need no waiting; whether others are left for `settle`."""
        changes = self._changes
        if changes.stale or changes.entries:
            return False
        self._inline()
        return True

    async def _wait(self, waits: list[trio.Event]) -> None:
        with self._driver.waiting(), trio.move_on_after(_SETTLE_S) as scope:
            for event in waits:
                await event.wait()
        if scope.cancelled_caught:
            log.error("the kernel took longer than %g s to drop cached data", _SETTLE_S)

    def _inline(self) -> None:
        changes = self._changes
        modified, resized = changes.modified_inos, changes.resized
        changes.clear()
        for ino in set(resized):
            self._drop_attributes(ino)
        for ino in modified:
            self._event(ino)

    def _event(self, ino: int) -> None:
        idle = self._rate.next_due_ns() is None
        if self._rate.event(ino, time.monotonic_ns()):
            self._tell(ino)
        if idle:
            self._wake()

    def _tell(self, ino: int) -> None:
        self._files.wake(ino)
        path = None if self._stopped else self._path(ino)
        if path is not None:
            self._poke_thread.submit([self._mountpoint + b"/" + path], _nothing)

    def _wake(self) -> None:
        self._kick.set()
        self._driver.yield_turn()

    def _submit(self, thread: KernelThread[Any], items: list[Any]) -> trio.Event:
        event = trio.Event()
        token = self._token
        thread.submit(items, lambda: token.run_sync_soon(event.set))
        return event

    def _drop_attributes(self, ino: int) -> None:
        try:
            pyfuse3.invalidate_inode(ino, attr_only=True)
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.debug("attributes of inode %d: %s", ino, error)

    def _invalidate_inode(self, ino: int) -> None:
        for _ in range(_RETRIES):
            try:
                pyfuse3.invalidate_inode(ino)
            except FileNotFoundError:
                if not self._inodes.known(ino):
                    return
                time.sleep(_RETRY_S)
            else:
                return

    @property
    def _threads(self) -> tuple[KernelThread[Any], ...]:
        return self._poke_thread, self._entry_thread, self._inode_thread


def _nothing() -> None:
    return None


def _invalidate_entry(entry: Entry) -> None:
    """Drops a name; whoever watches a removed directory hears of it.

    Of control files that go nobody hears, as in kernfs. A directory with open files below it is
    no empty one to the kernel, so that it can only be dropped silently.
    """
    parent, name, gone = entry
    if gone and gone & SLOT_MASK == DIRECTORY:
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_entry(parent, name, gone)
            return
    pyfuse3.invalidate_entry(parent, name)


def _poke(path: bytes) -> None:
    """Makes the kernel raise IN_MODIFY: a change of the modification time alone does.

    Raises:
        OSError: the file has gone, or its owner does not let us.
    """
    if _libc.utimensat(_AT_FDCWD, path, _MTIME_ONLY, _AT_SYMLINK_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
