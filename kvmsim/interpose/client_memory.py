"""A range of a client's memory, as a guest engine reaches it: what is behind a memory slot.

Three ways, the best that works is taken (:func:`share`):

==========  =====================================================================================
shared      the client mapped shared memory: its pages are mapped here too
remapped    the client's private pages are replaced by shared ones (``kvmsim.interpose.remap``)
copied      bytes are copied at each access; other threads' writes are seen when they are looked at
==========  =====================================================================================
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final, Protocol

from kvmsim.interpose import maps, memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.interpose.maps import Mapping

    Remap = Callable[[int, int, Mapping], "mmap.mmap | None"]

SHARED: Final = "shared"
REMAPPED: Final = "remapped"
COPIED: Final = "copied"


class ClientMemory(Protocol):
    """One range of a client's memory.

    Attributes:
        how: ``shared``, ``remapped`` or ``copied``.
        view: the pages themselves, where they are reachable; None when copied.
        size_bytes: of the range.
    """

    @property
    def how(self) -> str:
        """See the class."""

    @property
    def view(self) -> memoryview | None:
        """See the class."""

    @property
    def size_bytes(self) -> int:
        """See the class."""

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Copy bytes of the range out; KvmError EFAULT when they are not there."""

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes into the range; KvmError EFAULT when they cannot be written."""

    def close(self) -> None:
        """Let go of it."""


class MappedMemory:
    """The client's pages, mapped here.

    Args:
        pages: a mapping that holds them.
        offset: of the range in it.
        size_bytes: of the range.
        how: which way they were come by.
    """

    def __init__(self, pages: mmap.mmap, offset: int, size_bytes: int, how: str) -> None:
        self.how = how
        self.size_bytes = size_bytes
        self._pages = pages
        self.view: memoryview | None = memoryview(pages)[offset : offset + size_bytes]

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See :meth:`ClientMemory.read`."""
        return bytes(self._part(offset, size_bytes))

    def write(self, offset: int, data: bytes) -> None:
        """See :meth:`ClientMemory.write`."""
        self._part(offset, len(data))[:] = data

    def close(self) -> None:
        """See :meth:`ClientMemory.close`."""
        if self.view is not None:
            self.view.release()
            self.view = None
            self._pages.close()

    def _part(self, offset: int, size_bytes: int) -> memoryview:
        assert self.view is not None
        _check(offset, size_bytes, self.size_bytes)
        return self.view[offset : offset + size_bytes]


class CopiedMemory:
    """The client's pages, copied at each access.

    Args:
        pid: the client.
        address: of the range in its memory.
        size_bytes: of the range.
    """

    how = COPIED
    view: memoryview | None = None

    def __init__(self, pid: int, address: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._pid = pid
        self._address = address

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See :meth:`ClientMemory.read`."""
        _check(offset, size_bytes, self.size_bytes)
        return memory.read(self._pid, self._address + offset, size_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """See :meth:`ClientMemory.write`."""
        _check(offset, len(data), self.size_bytes)
        memory.write(self._pid, self._address + offset, data)

    def close(self) -> None:
        """Nothing is held."""


def share(pid: int, address: int, size_bytes: int, remap: Remap | None = None) -> ClientMemory:
    """Get hold of a range of a client's memory.

    Args:
        pid: the client.
        address: of the range; page aligned.
        size_bytes: of the range; whole pages.
        remap: replaces private pages, given (address, bytes, the mapping they are in); None
            when it could not. Without it they are copied.
    """
    mapping = _mapping(pid, address, size_bytes)
    if mapping is not None and mapping.shared:
        pages = _map_shared(pid, mapping, address, size_bytes)
        if pages is not None:
            return MappedMemory(pages, 0, size_bytes, SHARED)
    elif mapping is not None and remap is not None and not mapping.inode:
        pages = remap(address, size_bytes, mapping)
        if pages is not None:
            return MappedMemory(pages, 0, size_bytes, REMAPPED)
    return CopiedMemory(pid, address, size_bytes)


def _mapping(pid: int, address: int, size_bytes: int) -> Mapping | None:
    """The one mapping that holds a range and can be written."""
    try:
        fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        found = maps.covering(file.read(), address, size_bytes)
    if found is None or len(found) != 1 or not found[0].writable:
        return None
    return found[0]


def _map_shared(pid: int, mapping: Mapping, address: int, size_bytes: int) -> mmap.mmap | None:
    """Map the file behind a shared mapping."""
    offset = mapping.offset + address - mapping.start
    paths = [f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", *_open_files(pid, mapping)]
    for path in paths:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return mmap.mmap(fd, size_bytes, offset=offset)
        except (OSError, ValueError):
            continue
        finally:
            os.close(fd)
    return None


def _open_files(pid: int, mapping: Mapping) -> list[str]:
    """The client's own descriptors of a mapped file, for when its mappings may not be opened."""
    directory = f"/proc/{pid}/fd"
    found: list[str] = []
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return found
    for name in names:
        path = f"{directory}/{name}"
        try:
            if os.stat(path).st_ino == mapping.inode and os.readlink(path) == mapping.name:  # noqa: PTH115, PTH116
                found.append(path)
        except OSError:
            continue
    return found


def _check(offset: int, size_bytes: int, limit: int) -> None:
    if offset < 0 or size_bytes < 0 or offset + size_bytes > limit:
        msg = f"{size_bytes} bytes at {offset} are not within {limit}"
        raise ValueError(msg)
