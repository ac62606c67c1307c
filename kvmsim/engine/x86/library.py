"""The C library of Unicorn as it is loaded: its functions, and through what it calls them.

A shared library calls its own exported functions, and those of others, through a table of
addresses, one slot a function (``.got.plt``, entries of ``.rela.plt``). What is written into a slot
is called instead, by everyone in the library.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL_BYTES, _RELOCATION = 24, struct.Struct("<QQq")
_SHT_DYNSYM, _SHT_RELA, _SHF_ALLOC = 11, 4, 2
_R_X86_64_JUMP_SLOT = 7
_ELF_64 = b"\x7fELF\x02\x01"


class _Section(NamedTuple):
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int


class Library:
    """Symbols and slots of a loaded library.

    Args:
        cdll: the library.
        known: a function of it, by which it is found in memory.

    Raises:
        LookupError: it has no such symbols: not an ELF file for a 64-bit machine.
    """

    def __init__(self, cdll: ctypes.CDLL, known: str) -> None:
        with Path(cdll._name).open("rb") as file:  # noqa: SLF001 - CDLL's own name of its file
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._file[: len(_ELF_64)] != _ELF_64:
            raise LookupError(known)
        self._sections = list(self._read_sections())
        self._symbols = next(s for s in self._sections if s.kind == _SHT_DYNSYM)
        here = ctypes.cast(getattr(cdll, known), ctypes.c_void_p).value or 0
        self._base = here - self._value(self._index(known))
        self._bytes = max(s.address + s.size for s in self._sections if s.flags & _SHF_ALLOC)
        self._slots: dict[int, int] = {}

    def symbol(self, name: str) -> int:
        """Address of an exported function; LookupError: there is none."""
        return self._base + self._value(self._index(name))

    def size(self, name: str) -> int:
        """Bytes of an exported function; LookupError: there is none."""
        at = self._symbols.offset + self._index(name) * _SYMBOL_BYTES + 16
        return int.from_bytes(self._file[at : at + 8], "little")

    def slot(self, name: str) -> ctypes.c_uint64:
        """Where the library keeps the address of a function it calls; LookupError: nowhere."""
        if not self._slots:
            self._slots = dict(self._read_slots())
        return ctypes.c_uint64.from_address(self._base + self._slots[self._index(name)])

    def holds(self, address: int) -> bool:
        """Whether an address is within the library."""
        return self._base <= address < self._base + self._bytes

    def _read_sections(self) -> list[_Section]:
        at, entry_bytes, count = struct.unpack_from("<Q", self._file, 0x28) + struct.unpack_from(
            "<HH", self._file, 0x3A
        )
        rows = (_SECTION.unpack_from(self._file, at + n * entry_bytes) for n in range(count))
        return [_Section(*row[1:7]) for row in rows]

    def _index(self, name: str) -> int:
        """Number of a symbol. Its name may be the end of a longer one."""
        names = self._sections[self._symbols.link]
        wanted, end = name.encode() + b"\0", names.offset + names.size
        at = self._file.find(wanted, names.offset, end)
        while at >= 0:
            found = self._named(at - names.offset)
            if found is not None:
                return found
            at = self._file.find(wanted, at + 1, end)
        raise LookupError(name)

    def _named(self, name_at: int) -> int | None:
        """Number of the symbol whose name is at an offset."""
        pattern = name_at.to_bytes(4, "little")
        begin, end = self._symbols.offset, self._symbols.offset + self._symbols.size
        found = self._file.find(pattern, begin, end)
        while found >= 0 and (found - begin) % _SYMBOL_BYTES:
            found = self._file.find(pattern, found + 1, end)
        return None if found < 0 else (found - begin) // _SYMBOL_BYTES

    def _value(self, index: int) -> int:
        at = self._symbols.offset + index * _SYMBOL_BYTES + 8
        return int.from_bytes(self._file[at : at + 8], "little")

    def _read_slots(self) -> list[tuple[int, int]]:
        found = []
        for section in self._sections:
            if section.kind != _SHT_RELA:
                continue
            rows = self._file[section.offset : section.offset + section.size]
            for offset, info, _addend in _RELOCATION.iter_unpack(rows):
                if info & 0xFFFF_FFFF == _R_X86_64_JUMP_SLOT:
                    found.append((info >> 32, offset))
        return found
