"""What the model did that the kernel must hear of.

The model calls this listener from inside its own calls; it only takes notes. Whoever made the
model call hands the notes on afterwards (`cgfs.fuse.notify`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.fuse.attributes import EntryCache
    from cgfs.fuse.gate import Gate
    from cgfs.fuse.handles import OpenFiles
    from cgfs.fuse.inodes import Inodes

Entry = tuple[int, bytes, int]
"""Parent inode, name, and the inode that has gone; 0 for a name that appeared."""


class Changes:
    """A `cgfs.views.tree.Listener` that takes notes.

    Attributes:
        modified_inos: events files with a new event.
        stale: inodes whose cached text and attributes are wrong.
        resized: directories whose attributes are wrong.
        entries: names whose cached meaning is wrong.
        in_request: a request's handler is making the model call and will hand the notes on
            itself; otherwise ``wake`` is called.
        wake: called with the first note that no handler takes care of.
    """

    def __init__(
        self, inodes: Inodes, entry_cache: EntryCache, gate: Gate, files: OpenFiles
    ) -> None:
        self._inodes = inodes
        self._entry_cache = entry_cache
        self._gate = gate
        self._files = files
        self.in_request = False
        self.wake: Callable[[], object] = lambda: None
        self.clear()

    @property
    def pending(self) -> bool:
        """Whether there is anything to hand on."""
        return bool(self.modified_inos or self.stale or self.resized or self.entries)

    def clear(self) -> None:
        """Starts a new sheet."""
        self.modified_inos: list[int] = []
        self.stale: list[int] = []
        self.resized: list[int] = []
        self.entries: list[Entry] = []

    def modified(self, ino: int) -> None:
        """An events file generated an event."""
        self.modified_inos.append(ino)
        self._noted()

    def changed(self, ino: int) -> None:
        """The text of a CONFIG file changed by something else than a write to itself."""
        self._entry_cache.drop(ino)
        if self._inodes.known(ino):
            self._gate.touch(ino)
            self.stale.append(ino)
            self._noted()

    def added(self, parent: int, name: bytes) -> None:
        """A file or directory appeared."""
        self._entry_cache.drop(parent)
        if self._inodes.known(parent):
            self.resized.append(parent)
            if self._inodes.appeared(parent, name):
                self.entries.append((parent, name, 0))
            self._noted()

    def removed(self, parent: int, name: bytes, ino: int) -> None:
        """A file or directory went."""
        self._entry_cache.drop(parent)
        self._entry_cache.drop(ino)
        if self._inodes.known(parent):
            self.resized.append(parent)
        if self._inodes.known(ino):
            self.entries.append((parent, name, ino))
        if self._files.is_open(ino):
            self.stale.append(ino)
            if self._files.is_polled(ino):
                self.modified_inos.append(ino)
        self._noted()

    def _noted(self) -> None:
        if not self.in_request:
            self.wake()
