"""Machine code of the engine's own, for x86-64 hosts.

A callback in Python costs a hundred times what most guest instructions do. The few that run often
are machine code, written into executable pages. On other hosts, and where no memory may be
executable, there is none of it and Python does the work.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from dataclasses import dataclass

_CHUNK_BYTES = 16 * mmap.PAGESIZE
_ALIGN = 16


class Code:
    """Executable memory that only grows.

    Raises:
        OSError: the host refuses it.
    """

    def __init__(self) -> None:
        self._chunks: list[mmap.mmap] = []
        self._used = 0
        self._grow()

    def _grow(self) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        self._chunks.append(mmap.mmap(-1, _CHUNK_BYTES, prot=protection))
        self._used = 0

    def place(self, code: bytes) -> int:
        """Put a function there; its address."""
        if self._used + len(code) > _CHUNK_BYTES:
            self._grow()
        chunk, at = self._chunks[-1], self._used
        chunk[at : at + len(code)] = code
        self._used = -(-(at + len(code)) // _ALIGN) * _ALIGN
        return ctypes.addressof(ctypes.c_char.from_buffer(chunk)) + at


def new() -> Code | None:
    """Executable memory, where the host is an x86-64 that gives it."""
    if platform.machine() != "x86_64":
        return None
    try:
        return Code()
    except OSError:
        return None


def u64(value: int) -> bytes:
    """A number as an 8-byte immediate."""
    return value.to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Label:
    """A place in a function."""

    name: str


@dataclass(frozen=True, slots=True)
class Jump:
    """A jump to a place, on a condition: the processor's condition code, None for always."""

    to: str
    condition: int | None = None


EQUAL, NOT_EQUAL, ABOVE = 4, 5, 7


def assemble(*parts: bytes | Label | Jump) -> bytes:
    """A function out of instructions and jumps with 32-bit offsets."""
    places: dict[str, int] = {}
    at = 0
    for part in parts:
        if isinstance(part, Label):
            places[part.name] = at
        else:
            at += _size(part)
    code = b""
    for part in parts:
        if isinstance(part, Jump):
            offset = places[part.to] - len(code) - _size(part)
            start = b"\xe9" if part.condition is None else bytes([0x0F, 0x80 | part.condition])
            code += start + offset.to_bytes(4, "little", signed=True)
        elif isinstance(part, bytes):
            code += part
    return code


def _size(part: bytes | Jump) -> int:
    if isinstance(part, bytes):
        return len(part)
    return 5 if part.condition is None else 6
