"""Guest-physical memory of a VM of this engine: host buffers at guest addresses, and holes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PHYSICAL_END = 1 << 52


@dataclass(slots=True)
class Slot:
    """One piece of memory.

    Attributes:
        gpa: where the guest sees it, on a page boundary.
        memory: its bytes, writable and on a page boundary; whole pages.
        read_only: guest writes go to user space instead.
    """

    gpa: int
    memory: memoryview
    read_only: bool = False
    _anchor: Any = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """First address beyond it."""
        return self.gpa + len(self.memory)

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """What tells one slot from another: guest address, size, host address, kind."""
        return self.gpa, len(self.memory), self.address, self.read_only

    @property
    def address(self) -> int:
        """Where it is in this process."""
        if self._anchor is None:
            self._anchor = ctypes.c_char.from_buffer(self.memory)
        return ctypes.addressof(self._anchor)


class NoMemory(Exception):
    """There is no slot behind an address; the address is the argument."""


class Memory:
    """All slots of one VM.

    Args:
        slots: they must not overlap.
    """

    __slots__ = ("slots",)

    def __init__(self, slots: list[Slot]) -> None:
        self.replace(slots)

    def replace(self, slots: list[Slot]) -> None:
        """Have other slots."""
        self.slots = sorted(slots, key=lambda slot: slot.gpa)

    def find(self, gpa: int) -> Slot | None:
        """The slot behind an address."""
        for slot in self.slots:
            if slot.gpa <= gpa < slot.end:
                return slot
        return None

    def holes(self) -> Iterator[tuple[int, int]]:
        """First and last address of each stretch that no slot covers."""
        at = 0
        for slot in self.slots:
            if slot.gpa > at:
                yield at, slot.gpa - 1
            at = slot.end
        yield at, (1 << 64) - 1

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy out.

        Raises:
            NoMemory: some of it is in a hole.
        """
        slot = self.find(gpa)
        if slot is not None and gpa + size_bytes <= slot.end:
            return bytes(slot.memory[gpa - slot.gpa : gpa - slot.gpa + size_bytes])
        return b"".join(self.read_byte(gpa + at) for at in range(size_bytes))

    def read_byte(self, gpa: int) -> bytes:
        """One byte; NoMemory in a hole."""
        slot = self.find(gpa)
        if slot is None:
            raise NoMemory(gpa)
        return bytes(slot.memory[gpa - slot.gpa : gpa - slot.gpa + 1])

    def write(self, gpa: int, data: bytes) -> None:
        """Copy in.

        Raises:
            NoMemory: some of it is in a hole or read-only; nothing was written.
        """
        slot = self.find(gpa)
        if slot is None or slot.read_only or gpa + len(data) > slot.end:
            raise NoMemory(gpa)
        slot.memory[gpa - slot.gpa : gpa - slot.gpa + len(data)] = data

    def read_word(self, gpa: int, size_bytes: int) -> int:
        """A little-endian number; zero in a hole, as an unanswered bus reads here."""
        try:
            return int.from_bytes(self.read(gpa, size_bytes), "little")
        except NoMemory:
            return 0
