"""Machine code in front of locked instructions, and behind those that took a bus lock.

It computes the linear address of the operand, and returns where the operand stays within a cache
line of a page known to be write-back memory, and no bus lock is expected to have been taken just
before. Everything else is for Python to look at.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86.machine_code import u64
from kvmsim.engine.x86.registers import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsim.engine.x86.machine_code import Code
    from kvmsim.engine.x86.sites import Site

PAGES = 1024
_NO_PAGE = (1 << 64) - 1
_SHIFTS = {1: 0, 2: 1, 4: 2, 8: 3}


class CalmPages:
    """Numbers of pages known to be write-back memory, by their lowest bits."""

    def __init__(self) -> None:
        self._table = (ctypes.c_uint64 * PAGES)()
        self.clear()

    @property
    def address(self) -> int:
        """Where the table is."""
        return ctypes.addressof(self._table)

    def add(self, page: int) -> None:
        """A page is known."""
        self._table[page % PAGES] = page

    def clear(self) -> None:
        """None is known."""
        ctypes.memset(self._table, 0xFF, PAGES * 8)


class LockCode:
    """Makes callbacks of code for one emulator.

    Args:
        code: where the code goes.
        env: address of the emulator's CPU state.
        calm: known pages.
    """

    def __init__(self, code: Code, env: int, calm: CalmPages) -> None:
        self._code = code
        self._env = env
        self._calm = calm
        self._none = CalmPages()
        self._expecting = ctypes.c_uint32(0)
        self._tables: dict[int, ctypes.c_uint64] = {}

    def expect(self, *, lock: bool) -> None:
        """Whether a bus lock may be taken just now, which everybody is to look for."""
        self._expecting.value = lock

    def behind(self, callback: int) -> int:
        """A callback that calls another where a bus lock is expected to have been taken."""
        return self._code.place(self._unless_expecting(callback) + b"\xc3")

    def in_front(self, site: Site, callback: int) -> int | None:
        """A callback that calls another where a bus lock may be; None: the operand is beyond it."""
        found = site.found
        if found is None or found.operand is None or found.opcode in d.BIT_STRINGS:
            return None
        table = self._tables.setdefault(site.address, ctypes.c_uint64())
        table.value = self._calm.address
        here = ctypes.addressof(table)
        body = b"".join(self._address(site, found.operand))
        tail = (
            b"\x48\xc1\xea\x0c"  # shr rdx, 12
            + b"\x48\xb9"
            + u64(here)
            + b"\x48\x8b\x09"  # mov rcx, table; mov rcx, [rcx]
            + b"\x89\xd6\x81\xe6"
            + (PAGES - 1).to_bytes(4, "little")  # mov esi, edx; and esi, PAGES - 1
            + b"\x48\x39\x14\xf1"  # cmp [rcx + rsi*8], rdx
            + b"\x75\x01\xc3"  # jne +1; ret
        )
        line = (
            b"\x89\xd1\x83\xe1\x3f"  # mov ecx, edx; and ecx, 63
            + bytes([0x83, 0xF9, site.room, 0x77, len(tail)])  # cmp ecx, room; ja behind the tail
        )
        return self._code.place(
            self._unless_expecting(callback) + body + line + tail + _jump(callback)
        )

    def never_calm(self, address: int) -> None:
        """Have Python look at every execution of a site."""
        if address in self._tables:
            self._tables[address].value = self._none.address

    def _unless_expecting(self, callback: int) -> bytes:
        there = _jump(callback)
        return (
            b"\x48\xb9"
            + u64(ctypes.addressof(self._expecting))
            + b"\x83\x39\x00\x74"  # mov rcx, flag; cmp dword [rcx], 0; je behind the jump
            + bytes([len(there)])
            + there
        )

    def _address(self, site: Site, operand: d.Operand) -> Iterable[bytes]:
        """RDX: linear address of an operand; RAX: the CPU's state."""
        yield b"\x48\xb8" + u64(self._env)  # mov rax, env
        disp = operand.disp
        if operand.base == d.RIP:
            yield b"\x48\xba" + u64((site.following + disp) & _NO_PAGE)  # mov rdx, ...
            disp = 0
        elif operand.base == d.NONE:
            yield b"\x31\xd2"  # xor edx, edx
        else:
            yield b"\x48\x8b\x90" + _offset(8 * operand.base)  # mov rdx, [rax + ...]
        if operand.index != d.NONE:
            yield b"\x48\x8b\xb0" + _offset(8 * operand.index)  # mov rsi, [rax + ...]
            yield bytes([0x48, 0x8D, 0x14, _SHIFTS[operand.scale] << 6 | 6 << 3 | 2])  # lea rdx
        if disp:
            yield b"\x48\xb9" + u64(disp & _NO_PAGE) + b"\x48\x01\xca"  # mov rcx, ...; add rdx, rcx
        yield {16: b"\x0f\xb7\xd2", 32: b"\x89\xd2", 64: b""}[operand.address_bits]  # wrap
        base = _offset(SEGMENTS + 24 * operand.segment + 8)
        if site.mode != 64:
            yield b"\x48\x03\x90" + base + b"\x89\xd2"  # add rdx, [rax + ...]; mov edx, edx
        elif operand.segment in {d.FS, d.GS}:
            yield b"\x48\x03\x90" + base


def _jump(address: int) -> bytes:
    return b"\x48\xb8" + u64(address) + b"\xff\xe0"  # mov rax, address; jmp rax


def _offset(value: int) -> bytes:
    return value.to_bytes(4, "little")
