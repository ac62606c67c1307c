"""What a row of a C structure is, and how values get in and out of its bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

#: C type -> format of one little-endian element without padding.
FORMATS = {"u8": "<B", "u16": "<H", "s16": "<h", "u32": "<I", "u64": "<Q"}


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a structure.

    Attributes:
        offset: bytes from the start of the structure.
        ctype: ``u8``, ``u16``, ``s16``, ``u32`` or ``u64``.
        count: elements of an array; 1 for a scalar.
    """

    offset: int
    ctype: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """A structure of the ABI.

    Attributes:
        name: the C name without ``struct``.
        size_bytes: size of the whole structure.
        fields: member name -> where it is.
    """

    name: str
    size_bytes: int
    fields: Mapping[str, Field] = field(default_factory=dict)

    def pack(self, **values: int) -> bytearray:
        """Build the bytes of a structure; members not named are 0."""
        data = bytearray(self.size_bytes)
        for name, value in values.items():
            self.put(data, name, value)
        return data

    def get(self, data: bytes | bytearray, name: str, index: int = 0) -> int:
        """Read one element of a member."""
        member = self.fields[name]
        fmt = FORMATS[member.ctype]
        value: int = struct.unpack_from(fmt, data, member.offset + index * struct.calcsize(fmt))[0]
        return value

    def put(self, data: bytearray, name: str, value: int, index: int = 0) -> None:
        """Write one element of a member."""
        member = self.fields[name]
        fmt = FORMATS[member.ctype]
        struct.pack_into(fmt, data, member.offset + index * struct.calcsize(fmt), value)
