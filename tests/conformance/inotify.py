"""Reading inotify events."""

from __future__ import annotations

import contextlib
import os
import select
import struct
from typing import TYPE_CHECKING

from conformance import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator

ALL_EVENTS = 0xFFF
ISDIR = 0x40000000
_NAMES = {
    0x1: "ACCESS", 0x2: "MODIFY", 0x4: "ATTRIB", 0x8: "CLOSE_WRITE", 0x10: "CLOSE_NOWRITE",
    0x20: "OPEN", 0x40: "MOVED_FROM", 0x80: "MOVED_TO", 0x100: "CREATE", 0x200: "DELETE",
    0x400: "DELETE_SELF", 0x800: "MOVE_SELF", 0x2000: "UNMOUNT", 0x4000: "OVERFLOW",
    0x8000: "IGNORED", ISDIR: "ISDIR",
}  # fmt: skip


class Watcher:
    """An inotify descriptor with named watches."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._watched: dict[int, str] = {}

    def watch(self, path: os.PathLike[str], label: str, mask: int = ALL_EVENTS) -> None:
        """Adds a watch; its events carry the label."""
        self._watched[syscalls.inotify_add(self._fd, path, mask)] = label

    def events(self, settle_s: float = 0.05, wait_s: float = 0.5) -> list[str]:
        """Events as "label FLAGS name" in order, until none comes for a while."""
        found = []
        while select.select([self._fd], [], [], settle_s if found else wait_s)[0]:
            found += self._decode(os.read(self._fd, 65536))
        return found

    def _decode(self, data: bytes) -> Iterator[str]:
        while data:
            watch, mask, _, length = struct.unpack_from("iIII", data)
            name = data[16 : 16 + length].rstrip(b"\0").decode()
            flags = "|".join(text for bit, text in _NAMES.items() if mask & bit)
            yield " ".join(filter(None, (self._watched[watch], flags, name)))
            data = data[16 + length :]


@contextlib.contextmanager
def watching() -> Iterator[Watcher]:
    """Gives a watcher for a block."""
    fd = syscalls.inotify_init()
    try:
        yield Watcher(fd)
    finally:
        os.close(fd)
