"""What is mapped in a process, from the text of /proc/PID/maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line.

    Attributes:
        start: first address.
        end: first address behind it.
        readable: pages may be read.
        writable: pages may be written.
        executable: pages hold code.
        shared: MAP_SHARED.
        offset: of ``start`` in the file.
        inode: of the file; 0 for anonymous memory.
        name: path of the file, or ``[heap]`` and the like, or empty.
    """

    start: int
    end: int
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    offset: int
    inode: int
    name: str


def parse(text: str) -> Iterator[Mapping]:
    """The mappings of a process, by ascending address (proc(5))."""
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, _, end = fields[0].partition("-")
        modes = fields[1]
        yield Mapping(
            start=int(start, 16),
            end=int(end, 16),
            readable=modes[0] == "r",
            writable=modes[1] == "w",
            executable=modes[2] == "x",
            shared=modes[3] == "s",
            offset=int(fields[2], 16),
            inode=int(fields[4]),
            name=fields[5] if len(fields) > 5 else "",
        )


def covering(text: str, address: int, size_bytes: int) -> list[Mapping] | None:
    """The mappings that hold a range, by address; None if some of it is not mapped."""
    found: list[Mapping] = []
    reached = address
    for mapping in parse(text):
        if mapping.end <= reached:
            continue
        if mapping.start > reached:
            return None
        found.append(mapping)
        reached = mapping.end
        if reached >= address + size_bytes:
            return found
    return None
