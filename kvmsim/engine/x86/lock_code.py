"""Machine code in front of locked instructions, and behind those that took a bus lock.

It computes the linear address of the operand, and returns where the operand stays within a cache
line of a page known to be write-back memory, and no bus lock is expected to have been taken just
before. Where it crosses a line between such pages, a bus lock is expected from then on, if somebody
is there to look behind the instruction; but fault-like ones stop the emulator, unless admitted.
Everything else is for Python to look at.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86.machine_code import ABOVE, EQUAL, NOT_EQUAL, Jump, Label, assemble, u64
from kvmsim.engine.x86.registers import CC_SRC, RIP, SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsim.engine.x86.native import Native
    from kvmsim.engine.x86.sites import Site

PAGES = 1024
_NO_PAGE = (1 << 64) - 1
_SHIFTS = {1: 0, 2: 1, 4: 2, 8: 3}
#: Operands of this size fault where they are not aligned.
_ALIGNED = 16
_PYTHON, _CROSSES, _QUIET, _STOPS, _ADMITTED = "python", "crosses", "quiet", "stops", "admitted"
TRAP_LIKE, FAULT_LIKE = 1, 2


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


class Expected(ctypes.Structure):
    """The bus lock that is being taken.

    Attributes:
        lock: whether there is one.
        open: what machine code may do by itself: nothing, ``TRAP_LIKE`` or ``FAULT_LIKE``.
        rip: of the instruction.
        met_rip: of the instruction with a callback that came last.
        met_source: the emulator's operand of lazily computed flags then.
        admitted: linear address of the instruction that may take its bus lock; -1: none.
        passed: bus locks that were admitted and taken.
        stopped: linear address of the one that was not.
    """

    _fields_ = (
        ("lock", ctypes.c_uint32),
        ("open", ctypes.c_uint32),
        ("rip", ctypes.c_uint64),
        ("met_rip", ctypes.c_uint64),
        ("met_source", ctypes.c_uint64),
        ("admitted", ctypes.c_int64),
        ("passed", ctypes.c_uint64),
        ("stopped", ctypes.c_uint64),
    )


class _Cells(ctypes.Structure):
    """What machine code asks of one site: the table of its pages, and whether to expect locks."""

    _fields_ = (("table", ctypes.c_uint64), ("armed", ctypes.c_uint64))


class LockCode:
    """Makes callbacks of code for one emulator.

    Args:
        native: the emulator's machine code.
        env: address of the emulator's CPU state.
        calm: known pages.
        expected: the bus lock that is being taken.
    """

    def __init__(self, native: Native, env: int, calm: CalmPages, expected: Expected) -> None:
        self._native = native
        self._env = env
        self._calm = calm
        self._none = CalmPages()
        self._expected = expected
        self._cells: dict[int, _Cells] = {}

    def behind(self, callback: int) -> int:
        """A callback where a bus lock may just have been taken: it stops, or notes what it was."""
        return self._native.code.place(
            assemble(
                self._load_expected(),
                self._met(),
                b"\x83\x39\x00",  # cmp dword [rcx], 0
                Jump(_QUIET, EQUAL),
                b"\x83\x79\x04\x00",  # cmp dword [rcx+4], 0
                Jump(_PYTHON, EQUAL),
                b"\x83\x79\x04" + bytes([FAULT_LIKE]),  # cmp dword [rcx+4], FAULT_LIKE
                Jump(_ADMITTED, EQUAL),
                b"\x48\xbf" + u64(self._native.handle) + _jump(self._native.emu_stop),  # mov rdi
                Label(_ADMITTED),
                b"\xc7\x01\x00\x00\x00\x00"  # mov dword [rcx], 0
                b"\x48\xc7\x41\x20\xff\xff\xff\xff"  # mov qword [rcx+32], -1
                b"\x48\xff\x41\x28\xc3",  # inc qword [rcx+40]; ret
                Label(_PYTHON),
                _jump(callback),
                Label(_QUIET),
                b"\xc3",
            )
        )

    def in_front(self, site: Site, callback: int) -> int | None:
        """A callback that calls another where there is more to see; None: it is beyond it."""
        found = site.found
        if found is None or found.operand is None or found.opcode in d.BIT_STRINGS:
            return None
        cells = self._cells.setdefault(site.address, _Cells())
        cells.table = self._calm.address
        return self._native.code.place(
            assemble(
                self._load_expected(),
                self._met(),
                b"\x83\x39\x00",  # cmp dword [rcx], 0
                Jump(_PYTHON, NOT_EQUAL),
                b"".join(self._address(site, found.operand)),
                b"\x49\xba" + u64(ctypes.addressof(cells)),  # mov r10, cells
                b"\x4d\x8b\x1a",  # mov r11, [r10]
                b"\x89\xd1\x83\xe1\x3f\x83\xf9",  # mov ecx, edx; and ecx, 63; cmp ecx, room
                bytes([site.room]),
                Jump(_CROSSES, ABOVE),
                *_unless_calm(b"\x49\x89\xd0"),  # mov r8, rdx
                b"\xc3",
                *self._crosses(site),
                Label(_PYTHON),
                _jump(callback),
            )
        )

    def _crosses(self, site: Site) -> Iterator[bytes | Label | Jump]:
        """RDX: address of an operand beyond the end of a line; R10 and R11: cells and table."""
        yield Label(_CROSSES)
        yield b"\x49\x83\x7a\x08\x00"  # cmp qword [r10+8], 0
        yield Jump(_PYTHON, EQUAL)
        yield self._load_expected()
        yield b"\x83\x79\x04\x00"  # cmp dword [rcx+4], 0
        yield Jump(_PYTHON, EQUAL)
        yield from _unless_calm(b"\x49\x89\xd0")  # mov r8, rdx
        yield from _unless_calm(b"\x4c\x8d\x42" + bytes([site.size - 1]))  # lea r8, [rdx+size-1]
        yield b"\x83\x79\x04" + bytes([FAULT_LIKE])  # cmp dword [rcx+4], FAULT_LIKE
        yield Jump(_STOPS, EQUAL)
        yield Label(_ADMITTED)
        yield b"\xc7\x01\x01\x00\x00\x00"  # mov dword [rcx], 1
        yield b"\x48\x8b\x90" + _offset(RIP) + b"\x48\x89\x51\x08"  # mov rdx, rip; mov [rcx+8]
        yield b"\xc3"
        yield Label(_STOPS)
        yield b"\x48\xba" + u64(site.address)  # mov rdx, address
        yield b"\x48\x39\x51\x20"  # cmp [rcx+32], rdx
        yield Jump(_ADMITTED, EQUAL)
        yield b"\x48\x89\x51\x30"  # mov [rcx+48], rdx
        yield b"\x48\xbf" + u64(self._native.handle) + _jump(self._native.emu_stop)  # mov rdi

    def arm(self, site: Site) -> None:
        """Somebody looks behind a site: its locks may be expected without asking."""
        cells = self._cells.get(site.address)
        # Address 0 stands for none in what is stopped.
        if cells is not None and site.address and not site.ambiguous and site.size < _ALIGNED:
            cells.armed = 1

    def never_calm(self, address: int) -> None:
        """Have Python look at every execution of a site."""
        cells = self._cells.get(address)
        if cells is not None:
            cells.table = self._none.address

    def _load_expected(self) -> bytes:
        return b"\x48\xb9" + u64(ctypes.addressof(self._expected))  # mov rcx, expected

    def _met(self) -> bytes:
        """Note where execution is, and the operand of flags; RCX: the structure."""
        return (
            (b"\x48\xb8" + u64(self._env))  # mov rax, env
            + (b"\x48\x8b\x90" + _offset(RIP) + b"\x48\x89\x51\x10")  # mov rdx, rip; mov [rcx+16]
            + (b"\x48\x8b\x90" + _offset(CC_SRC) + b"\x48\x89\x51\x18")  # mov [rcx+24], rdx
        )

    def _address(self, site: Site, operand: d.Operand) -> Iterator[bytes]:
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


def _unless_calm(load: bytes) -> Iterator[bytes | Jump]:
    """Python's turn unless the page of the address that is loaded into R8 is in the table R11."""
    yield load
    yield b"\x49\xc1\xe8\x0c"  # shr r8, 12
    yield b"\x44\x89\xc6\x81\xe6"  # mov esi, r8d; and esi, PAGES - 1
    yield (PAGES - 1).to_bytes(4, "little")
    yield b"\x4d\x39\x04\xf3"  # cmp [r11 + rsi*8], r8
    yield Jump(_PYTHON, NOT_EQUAL)


def _jump(address: int) -> bytes:
    return b"\x48\xb8" + u64(address) + b"\xff\xe0"  # mov rax, address; jmp rax


def _offset(value: int) -> bytes:
    return value.to_bytes(4, "little")
