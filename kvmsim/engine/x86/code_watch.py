"""Code that was translated, and whether the host has changed it since.

User space writes guest memory without telling: a debugger its breakpoints, a disk the page of a
program. The emulator sees only what the guest writes. So the bytes of every translated block are
kept, and compared when a vCPU comes back from user space: by machine code, for a guest may have
tens of thousands of blocks.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import TYPE_CHECKING

from kvmsim.engine.x86.machine_code import ABOVE, EQUAL, NOT_EQUAL, Jump, Label, assemble, u64

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.x86.memory import Slot
    from kvmsim.engine.x86.native import Native

_ARENA_BYTES = 1 << 18
_WORDS = 3
_NEXT, _EIGHT, _TAIL, _SAME, _DIFFER = "next", "eight", "tail", "same", "differ"
#: (entries: rdi, how many: rsi) -> whether any differs; an entry: address, copy, bytes. In front of
#: it goes what loads both from a table: arguments take longer than the call.
_COMPARE = assemble(
    Label(_NEXT),
    b"\x48\x85\xf6",  # test rsi, rsi
    Jump(_SAME, EQUAL),
    b"\x4c\x8b\x07\x4c\x8b\x4f\x08\x48\x8b\x4f\x10",  # mov r8, [rdi]; r9, [rdi+8]; rcx, [rdi+16]
    b"\x48\x83\xc7\x18\x48\xff\xce",  # add rdi, 24; dec rsi
    Label(_EIGHT),
    b"\x48\x83\xf9\x07",  # cmp rcx, 7
    Jump(_TAIL + "?", ABOVE),
    Label(_TAIL),
    b"\x48\x85\xc9",  # test rcx, rcx
    Jump(_NEXT, EQUAL),
    b"\x41\x8a\x00\x41\x3a\x01",  # mov al, [r8]; cmp al, [r9]
    Jump(_DIFFER, NOT_EQUAL),
    b"\x49\xff\xc0\x49\xff\xc1\x48\xff\xc9",  # inc r8; inc r9; dec rcx
    Jump(_TAIL),
    Label(_TAIL + "?"),
    b"\x49\x8b\x00\x49\x3b\x01",  # mov rax, [r8]; cmp rax, [r9]
    Jump(_DIFFER, NOT_EQUAL),
    b"\x49\x83\xc0\x08\x49\x83\xc1\x08\x48\x83\xe9\x08",  # add r8, 8; add r9, 8; sub rcx, 8
    Jump(_EIGHT),
    Label(_SAME),
    b"\x31\xc0\xc3",  # xor eax, eax; ret
    Label(_DIFFER),
    b"\xb8\x01\x00\x00\x00\xc3",  # mov eax, 1; ret
)


class CodeWatch:
    """The bytes of one emulator's translated blocks.

    Args:
        native: the emulator's machine code; None: Python compares.
    """

    def __init__(self, native: Native | None) -> None:
        self._compare: Callable[[], int] | None = None
        self._table = (ctypes.c_uint64 * 2)()
        if native is not None:
            load = b"\x48\xb8" + u64(ctypes.addressof(self._table))  # mov rax, table
            load += b"\x48\x8b\x38\x48\x8b\x70\x08"  # mov rdi, [rax]; mov rsi, [rax+8]
            self._compare = ctypes.CFUNCTYPE(ctypes.c_int)(native.code.place(load + _COMPARE))
        self.clear()

    def clear(self) -> None:
        """All translations are gone."""
        self._entries = array("Q")
        self._table[:] = [0, 0]
        self._arenas: list[bytearray] = []
        self._used = _ARENA_BYTES
        self._views: list[tuple[memoryview, bytes]] = []
        self._known: set[tuple[int, bytes]] = set()

    def add(self, slot: Slot, gpa: int, code: bytes) -> None:
        """Code at a guest-physical address, within one page, was translated."""
        at = gpa - slot.gpa
        if (gpa, code) in self._known:
            return
        self._known.add((gpa, code))
        if self._compare is None:
            self._views.append((slot.memory[at : at + len(code)], code))
            return
        if self._used + len(code) > _ARENA_BYTES:
            self._arenas.append(bytearray(_ARENA_BYTES))
            self._used = 0
        arena = self._arenas[-1]
        arena[self._used : self._used + len(code)] = code
        copy = ctypes.addressof(ctypes.c_char.from_buffer(arena)) + self._used
        self._entries.extend((slot.address + at, copy, len(code)))
        entries, words = self._entries.buffer_info()
        self._table[:] = [entries, words // _WORDS]
        self._used += len(code)

    def changed(self) -> bool:
        """Whether some of it is not what it was."""
        if self._compare is None:
            return any(bytes(view) != code for view, code in self._views)
        return bool(self._compare())
