"""Open files: what each descriptor has read so far, and who polls it.

The kernel's control files generate their text at a descriptor's first read and keep it until the
reader jumps, so that reading byte by byte gives one consistent text (spec 0.4, G.4).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyfuse3 import PollHandle

    from cgfs.core.caller import Caller
    from cgfs.core.cftype import CFType
    from cgfs.core.node import Node


class Handle:
    """One open file description.

    Attributes:
        ino: the file.
        node: what owns it.
        row: its row.
        caller: who opened it.
        cached: reads come from the kernel's page cache.
        writer: opened for writing, so the gate counts it as a writer.
        text: what the last generation gave; empty before the first.
        next: where the previous read ended.
        seen: the file's event count at the last generation; -1 before the first.
        poll: wakes whoever polls this descriptor; None if nobody does.
    """

    __slots__ = (
        "cached",
        "caller",
        "ino",
        "next",
        "node",
        "poll",
        "row",
        "seen",
        "text",
        "writer",
    )

    def __init__(self, ino: int, node: Node, row: CFType, caller: Caller) -> None:
        self.ino = ino
        self.node = node
        self.row = row
        self.caller = caller
        self.cached = False
        self.writer = False
        self.text = b""
        self.next = 0
        self.seen = -1
        self.poll: PollHandle | None = None


class Directory:
    """One open directory: the listing that its readdir calls walk along.

    Attributes:
        ino: the directory.
        entries: names and inodes as they were at offset 0; None before the first readdir.
    """

    __slots__ = ("entries", "ino")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.entries: list[tuple[bytes, int]] | None = None


class OpenFiles:
    """All open files, by handle number; numbers are not used twice.

    Attributes:
        files: handle number -> file.
        directories: handle number -> directory.
    """

    def __init__(self) -> None:
        self.files: dict[int, Handle] = {}
        self.directories: dict[int, Directory] = {}
        self._count: dict[int, int] = {}
        self._polled: dict[int, dict[int, Handle]] = {}
        self._last = 0

    def add(self, handle: Handle) -> int:
        """The number of a newly opened file."""
        self._last = fh = self._last + 1
        self.files[fh] = handle
        self._count[handle.ino] = self._count.get(handle.ino, 0) + 1
        return fh

    def add_directory(self, ino: int) -> int:
        """The number of a newly opened directory."""
        self._last = fh = self._last + 1
        self.directories[fh] = Directory(ino)
        return fh

    def release(self, fh: int) -> Handle | None:
        """Takes a file out; None if there is no such number."""
        handle = self.files.pop(fh, None)
        if handle is None:
            return None
        left = self._count[handle.ino] - 1
        if left:
            self._count[handle.ino] = left
        else:
            del self._count[handle.ino]
        if handle.poll is not None:
            self._unpoll(fh, handle)
        return handle

    def is_open(self, ino: int) -> bool:
        """Whether any descriptor is open on a file."""
        return ino in self._count

    def is_cached(self, ino: int) -> bool:
        """Whether a page-cache descriptor is open on a file; asked of removed files only."""
        return any(handle.ino == ino and handle.cached for handle in self.files.values())

    def poll(self, fh: int, handle: Handle, waker: PollHandle) -> None:
        """Remembers who to wake; a newer waker of a descriptor replaces the one before."""
        handle.poll = waker
        self._polled.setdefault(handle.ino, {})[fh] = handle

    def is_polled(self, ino: int) -> bool:
        """Whether somebody waits for events of a file."""
        return ino in self._polled

    def wake(self, ino: int) -> None:
        """Lets everybody who polls a file look again."""
        for handle in self._polled.pop(ino, {}).values():
            waker, handle.poll = handle.poll, None
            if waker is not None:
                # The descriptor may have been closed in the meantime.
                with contextlib.suppress(OSError):
                    waker.notify()

    def clear_polls(self) -> None:
        """Drops every waker: they are part of the session and must go before it does."""
        for handles in self._polled.values():
            for handle in handles.values():
                handle.poll = None
        self._polled.clear()

    def _unpoll(self, fh: int, handle: Handle) -> None:
        handle.poll = None
        handles = self._polled.get(handle.ino)
        if handles is not None:
            handles.pop(fh, None)
            if not handles:
                del self._polled[handle.ino]
