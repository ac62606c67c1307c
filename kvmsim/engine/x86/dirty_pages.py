"""Which pages of logged memory the guest writes: a byte for each, set by its stores.

While any slot is logged every store of the guest takes the emulator's slow way, and sets the byte
of its page in machine code. What the engine writes on the guest's behalf, frames of exceptions and
strings of INS, goes by ``Memory.write``. Accessed and dirty bits the emulator itself sets in page
tables are not seen, nor is the second page of a store across two pages that are not neighbours.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsim.engine.x86.backend import Callback, Unicorn
    from kvmsim.engine.x86.memory import Slot

#: (uc: rdi, kind: esi, gpa: rdx, size: ecx, value: r8, data: r9); data: first gpa, bytes.
_STUB = bytes.fromhex(
    "49 2b 11"  # sub rdx, [r9]
    "4d 8b 51 08"  # mov r10, [r9+8]
    "89 c9"  # mov ecx, ecx
    "48 8d 44 0a ff"  # lea rax, [rdx+rcx-1]
    "48 c1 ea 0c"  # shr rdx, 12
    "48 c1 e8 0c"  # shr rax, 12
    "41 c6 04 12 01"  # mov byte [r10+rdx], 1
    "41 c6 04 02 01"  # mov byte [r10+rax], 1
    "c3"  # ret
)


class DirtyPages:
    """Hooks on the stores to logged slots.

    Args:
        unicorn: the emulator.
    """

    def __init__(self, unicorn: Unicorn) -> None:
        self._unicorn = unicorn
        self._hooks: dict[int, tuple[int, ctypes.Array[ctypes.c_uint64]]] = {}
        self._stub = 0
        if unicorn.native is not None:
            self._stub = unicorn.native.code.place(_STUB)

    def watch(self, slots: list[Slot]) -> bool:
        """Watch the logged ones of these slots, and no others; whether that was another set."""
        wanted = {id(slot): slot for slot in slots if slot.written is not None}
        gone = self._hooks.keys() - wanted.keys()
        added = wanted.keys() - self._hooks.keys()
        for key in gone:
            self._unicorn.unhook(self._hooks.pop(key)[0])
        for key in added:
            self._hooks[key] = self._hook(wanted[key])
        return bool(gone or added)

    def _hook(self, slot: Slot) -> tuple[int, ctypes.Array[ctypes.c_uint64]]:
        assert slot.written is not None
        words = (ctypes.c_uint64 * 2)(slot.gpa, 0)
        callback: Callback
        if self._stub:
            words[1] = ctypes.addressof(ctypes.c_char.from_buffer(slot.written))
            callback = ctypes.c_void_p(self._stub)
        else:
            callback = self._unicorn.write_callback(slot.wrote)
        data = ctypes.addressof(words)
        return self._unicorn.hook_writes(callback, slot.gpa, slot.end - 1, data), words
