"""Shared memory of a client: the file behind one of its mappings, mapped here too."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsim.interpose.maps import Mapping


def map_shared(pid: int, mapping: Mapping, address: int, size_bytes: int) -> mmap.mmap | None:
    """Map part of what a client has mapped as shared.

    What the client may only read is mapped so that writes stay here.

    Args:
        pid: the client.
        mapping: where it is in the client.
        address: of the part; page aligned.
        size_bytes: of the part; whole pages.

    Returns:
        The pages; None when there is no way to them.
    """
    offset = mapping.offset + address - mapping.start
    paths = [f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", *_open_files(pid, mapping)]
    mode, access = os.O_RDONLY, mmap.ACCESS_COPY
    if mapping.writable:
        mode, access = os.O_RDWR, mmap.ACCESS_WRITE
    for path in paths:
        try:
            fd = os.open(path, mode | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return mmap.mmap(fd, size_bytes, offset=offset, access=access)
        except (OSError, ValueError):
            continue
        finally:
            os.close(fd)
    return None


def _open_files(pid: int, mapping: Mapping) -> Iterator[str]:
    """The client's own descriptors of a mapped file, for when its mappings may not be opened."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return
    for name in names:
        path = f"{directory}/{name}"
        try:
            if os.stat(path).st_ino == mapping.inode and os.readlink(path) == mapping.name:  # noqa: PTH115, PTH116
                yield path
        except OSError:
            continue
