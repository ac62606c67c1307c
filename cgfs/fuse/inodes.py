"""What the kernel knows: inodes it holds, and names it remembers as missing.

Entries and attributes are handed out for good, so every later change must reach the kernel. What
it does not know costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = 1
_MISSING_LIMIT = 65536


class Inodes:
    """Lookup counts and negative entries.

    Attributes:
        lookups: inode -> how many times it was handed out and not yet forgotten.

    Args:
        missing_limit: how many missing names may be remembered by the kernel at once; beyond it
            they are not cached, so that stat calls on random names cannot fill our memory.
    """

    def __init__(self, missing_limit: int = _MISSING_LIMIT) -> None:
        self.lookups: dict[int, int] = {}
        self._missing: dict[int, set[bytes]] = {}
        self._missing_left = missing_limit

    def known(self, ino: int) -> bool:
        """Whether the kernel may hold this inode."""
        return ino in self.lookups or ino == ROOT

    def looked_up(self, ino: int) -> None:
        """The kernel got one more reference."""
        self.lookups[ino] = self.lookups.get(ino, 0) + 1

    def forget(self, inodes: Iterable[tuple[int, int]]) -> list[int]:
        """The kernel gives references back; which inodes it has let go of altogether."""
        gone = []
        for ino, count in inodes:
            left = self.lookups.get(ino, 0) - count
            if left > 0:
                self.lookups[ino] = left
                continue
            self.lookups.pop(ino, None)
            self._missing_left += len(self._missing.pop(ino, ()))
            gone.append(ino)
        return gone

    def remember_missing(self, parent: int, name: bytes) -> bool:
        """Whether the kernel may remember that there is no such name."""
        names = self._missing.get(parent)
        if names is not None and name in names:
            return True
        if self._missing_left <= 0 or not self.known(parent):
            return False
        self._missing_left -= 1
        self._missing.setdefault(parent, set()).add(name)
        return True

    def appeared(self, parent: int, name: bytes) -> bool:
        """A name came to be; whether the kernel remembers it as missing."""
        names = self._missing.get(parent)
        if names is None or name not in names:
            return False
        names.remove(name)
        self._missing_left += 1
        if not names:
            del self._missing[parent]
        return True
