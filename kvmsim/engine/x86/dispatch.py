"""Which callback belongs to an instruction, found in a table instead of a list.

The emulator walks the list of all its code callbacks at every instruction that has one, and a guest
with an operating system has thousands. The function that does so, ``helper_uc_tracecode``, gets
another beginning in this process's copy of the library: it looks an instruction up by emulator and
address, and calls its callback. Everything it does not know goes the old way.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsim.engine.x86.machine_code import EQUAL, NOT_EQUAL, Jump, Label, assemble, u64

if TYPE_CHECKING:
    from kvmsim.engine.x86.library import Library
    from kvmsim.engine.x86.machine_code import Code

WALK = "helper_uc_tracecode"
#: push r13; mov eax, esi; and esi, 0x3f; mov r13d, edi; push r12. As long as what replaces it.
_BEGINNING = bytes.fromhex("41 55 89 f0 83 e6 3f 41 89 fd 41 54")
ENTRIES = 1 << 17
#: So many entries at most, or looking for one takes long.
MOST = ENTRIES * 3 // 4
_WORDS = 3
_FACTOR = 0x61C8_8647
_FACTOR_SHIFT = 12
#: Of ``uc_hook_idx``, without flags.
_CODE = 2
_GONE = 1
_OLD, _NEXT, _PROBE = "old", "next", "probe"


class Dispatch:
    """The code callbacks of all emulators of this process.

    Args:
        library: the library.
        code: where machine code goes.

    Raises:
        LookupError: the function is not the one this module knows.
        OSError: the library's code cannot be changed.
    """

    def __init__(self, library: Library, code: Code) -> None:
        walk = library.symbol(WALK)
        if ctypes.string_at(walk, len(_BEGINNING)) != _BEGINNING:
            raise LookupError(WALK)
        #: Three words an entry: address + 1, emulator, callback; 0: the old way.
        self._table = (ctypes.c_uint64 * (_WORDS * ENTRIES))()
        self._owned: dict[int, list[int]] = {}
        self._used = 0
        #: Guests of several VMs come to new code in threads of their own.
        self._changes = threading.Lock()
        old = code.place(
            _BEGINNING + b"\x49\xbb" + u64(walk + len(_BEGINNING)) + b"\x41\xff\xe3"  # jmp r11
        )
        new = code.place(self._lookup(old))
        jump = b"\x48\xb8" + u64(new) + b"\xff\xe0"  # mov rax, ...; jmp rax
        # Also where the mapping is not writable; the page becomes this process's own.
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(walk)
            memory.write(jump)

    def _lookup(self, old: int) -> bytes:
        """(size, kind, emulator, address): call the callback, or go the old way."""
        mask = (ENTRIES - 1).to_bytes(4, "little")
        return assemble(
            b"\x89\xf0\x83\xe0\x3f\x83\xf8" + bytes([_CODE]),  # eax = esi & 0x3f; cmp eax, CODE
            Jump(_OLD, NOT_EQUAL),
            b"\x4c\x8d\x41\x01",  # lea r8, [rcx+1]
            b"\x48\x8d\x04\x11",  # lea rax, [rcx+rdx]
            b"\x48\x69\xc0" + _FACTOR.to_bytes(4, "little"),  # imul rax, rax, FACTOR
            b"\x48\xc1\xe8" + bytes([_FACTOR_SHIFT]),  # shr rax, SHIFT
            Label(_PROBE),
            b"\x25" + mask,  # and eax, ENTRIES - 1
            b"\x4c\x8d\x14\x40",  # lea r10, [rax+rax*2]
            b"\x49\xbb" + u64(ctypes.addressof(self._table)),  # mov r11, table
            b"\x4f\x8d\x14\xd3",  # lea r10, [r11+r10*8]
            b"\x49\x83\x3a\x00",  # cmp qword [r10], 0
            Jump(_OLD, EQUAL),
            b"\x4d\x39\x02",  # cmp [r10], r8
            Jump(_NEXT, NOT_EQUAL),
            b"\x49\x39\x52\x08",  # cmp [r10+8], rdx
            Jump(_NEXT, NOT_EQUAL),
            b"\x49\x8b\x42\x10\x48\x85\xc0",  # mov rax, [r10+16]; test rax, rax
            Jump(_OLD, EQUAL),
            b"\x48\x89\xce\x41\x89\xf8",  # mov rsi, rcx; mov r8d, edi
            b"\x48\x89\xd7\x44\x89\xc2\x31\xc9",  # mov rdi, rdx; mov edx, r8d; xor ecx, ecx
            b"\xff\xe0",  # jmp rax
            Label(_NEXT),
            b"\xff\xc0",  # inc eax
            Jump(_PROBE),
            Label(_OLD),
            b"\x49\xbb" + u64(old) + b"\x41\xff\xe3",  # mov r11, ...; jmp r11
        )

    def add(self, handle: int, address: int, callback: int) -> None:
        """An emulator has a callback at an address."""
        with self._changes:
            self._add(handle, address, callback)

    def _add(self, handle: int, address: int, callback: int) -> None:
        table, free = self._table, -1
        at = _place(handle, address)
        while table[at]:
            if table[at] == address + 1 and table[at + 1] == handle:
                table[at + 2] = 0  # two at one address
                return
            if table[at + 1] == _GONE and free < 0:
                free = at
            at = (at + _WORDS) % len(table)
        if free < 0:
            if self._used >= MOST:
                return  # looked for in vain, it is found the old way
            self._used += 1
            free = at
        # In this order: others may be searching.
        table[free + 2] = callback
        table[free + 1] = _GONE
        table[free] = address + 1
        table[free + 1] = handle
        self._owned.setdefault(handle, []).append(free)

    def forget(self, handle: int) -> None:
        """An emulator is gone. Its entries stay taken: others may be behind them."""
        with self._changes:
            for at in self._owned.pop(handle, ()):
                self._table[at + 1] = _GONE
            if not self._owned:
                self._used = 0
                ctypes.memset(self._table, 0, ctypes.sizeof(self._table))


def _place(handle: int, address: int) -> int:
    """Where the search begins."""
    product = (handle + address) * _FACTOR & (1 << 64) - 1
    return _WORDS * (product >> _FACTOR_SHIFT & ENTRIES - 1)
