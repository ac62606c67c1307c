"""How far a vCPU may execute: a native counter at the start of every block.

A callback in Python at every block would cost far more than most blocks. On x86-64 hosts the
callback is machine code; elsewhere, or where no memory may be executable, it is a Python function.
It costs some 40 % of the tightest loops, so where nobody counts and ``native`` makes it safe to
stop from another thread, there is no callback at all.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from kvmsim.engine.x86.backend import CODE_CALLBACK

if TYPE_CHECKING:
    from kvmsim.engine.x86.backend import Callback, Unicorn

#: (uc: rdi, address: rsi, size: edx, data: rcx); data: bytes left, kick flag, address of stop.
_STUB = bytes.fromhex(
    "89 d0"  # mov eax, edx
    "48 29 01"  # sub [rcx], rax
    "78 07"  # js stop
    "83 79 08 00"  # cmp dword [rcx+8], 0
    "75 01"  # jne stop
    "c3"  # ret
    "ff 61 10"  # stop: jmp [rcx+16]
)


class Meter:
    """Counts bytes of code, and stops at the start of a block when they are used up.

    Args:
        unicorn: whose blocks.
        counts: whether it has to count. Without, :meth:`used` is what was charged, and only a kick
            stops.
        native: use machine code; by default where the host can.
    """

    def __init__(
        self, unicorn: Unicorn, *, counts: bool = True, native: bool | None = None
    ) -> None:
        self._unicorn = unicorn
        self._words = (ctypes.c_int64 * 3)(0, 0, unicorn.stop_address)
        self._given = self._charged = 0
        machine = None if native is False else unicorn.native
        self._kicks = None if counts else machine
        #: Where somebody called at the start of every block looks whom to call next.
        self._next: ctypes.c_uint64 | None = None
        if self._kicks is None:
            callback: Callback = CODE_CALLBACK(self._on_block)
            if machine is not None:
                callback = ctypes.c_void_p(machine.code.place(_STUB))
            self._callback = callback
            self._hook = unicorn.hook_block(callback, ctypes.addressof(self._words))

    @property
    def counts(self) -> bool:
        """Whether it is called at the start of every block."""
        return self._kicks is None

    def give_way(self, function: ctypes.c_uint64, data: ctypes.c_uint64) -> None:
        """Somebody else is called at the start of every block, and calls another function last.

        Two callbacks take several times as long as one that calls another. Where this one does not
        count, a kick makes the other's function the one that stops: from outside it would come in
        front of the callback or behind those of instructions, and nobody could tell which.

        Args:
            function: where the other takes the address of that function from, 0 for none.
            data: its last argument.
        """
        self._next = function
        function.value = 0
        if self._kicks is None:
            self._unicorn.unhook(self._hook)
            function.value = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
            data.value = ctypes.addressof(self._words)

    def take_back(self) -> None:
        """Be called directly again."""
        self._next = None
        if self._kicks is None:
            self._hook = self._unicorn.hook_block(self._callback, ctypes.addressof(self._words))

    def _on_block(self, _uc: int, _address: int, size: int, _data: int) -> None:
        self._words[0] -= size
        if self._words[0] < 0 or self._words[1]:
            self._unicorn.stop()

    def start(self, size_bytes: int) -> None:
        """Allow so many bytes of code."""
        if self._kicks is not None:
            self._charged = 0
            self._kicks.rearm()
            if self._next is not None:
                self._next.value = 0
            return
        self._given = self._words[0] = size_bytes
        self._words[1] = 0

    def lend(self, size_bytes: int) -> None:
        """Allow so many bytes more, and forget kicks; less than 0: take them back."""
        if self._kicks is not None:
            self._kicks.rearm()
            if self._next is not None:
                self._next.value = 0
            return
        self._given += size_bytes
        self._words[0] += size_bytes
        self._words[1] = 0

    def charge(self, size_bytes: int) -> None:
        """Count work that is not code."""
        if self._kicks is not None:
            self._charged += size_bytes
        else:
            self._words[0] -= size_bytes

    def kick(self) -> None:
        """Stop at the start of the next block; from any thread."""
        called_next = self._next  # which may become None in the thread that executes
        if self._kicks is None:
            self._words[1] = 1
        elif called_next is not None:
            called_next.value = self._unicorn.stop_address
        else:
            self._kicks.kick()

    def used(self) -> int:
        """Bytes of code entered since the start."""
        if self._kicks is not None:
            return self._charged
        return self._given - int(self._words[0])

    def expired(self) -> bool:
        """Whether the allowance is used up, or somebody kicked."""
        if self._kicks is not None:
            return self._kicks.kicked or (self._next is not None and bool(self._next.value))
        return self._words[0] < 0 or bool(self._words[1])
