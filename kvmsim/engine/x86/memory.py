"""Guest-physical memory of a VM of this engine: host buffers at guest addresses, and holes."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


@dataclass(slots=True)
class Slot:
    """One piece of memory.

    Attributes:
        gpa: where the guest sees it, on a page boundary.
        memory: its bytes, writable and on a page boundary; whole pages.
        read_only: guest writes go to user space instead.
        written: logged memory: a byte for each page, and one more, which becomes 1 when the guest
            writes there; whoever reads it clears it while no vCPU executes. None: not logged.
    """

    gpa: int
    memory: memoryview
    read_only: bool = False
    written: bytearray | memoryview | None = None
    _anchor: Any = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """First address beyond it."""
        return self.gpa + len(self.memory)

    @property
    def key(self) -> tuple[int, int, int, bool, int]:
        """What tells one slot from another: guest address, size, host address, kind, log."""
        log = 0
        if self.written is not None:
            log = ctypes.addressof(ctypes.c_char.from_buffer(self.written))
        return self.gpa, len(self.memory), self.address, self.read_only, log

    def wrote(self, gpa: int, size_bytes: int) -> None:
        """The guest wrote there."""
        if self.written is None:
            return
        for at in (gpa, gpa + size_bytes - 1):
            self.written[at - self.gpa >> 12] = 1

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

    __slots__ = ("_starts", "slots")

    def __init__(self, slots: list[Slot]) -> None:
        self.replace(slots)

    def replace(self, slots: list[Slot]) -> None:
        """Have other slots."""
        self.slots = sorted(slots, key=lambda slot: slot.gpa)
        self._starts = [slot.gpa for slot in self.slots]

    def find(self, gpa: int) -> Slot | None:
        """The slot behind an address."""
        at = bisect_right(self._starts, gpa) - 1
        if at >= 0 and gpa < self.slots[at].end:
            return self.slots[at]
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
        if slot.written is not None and data:
            slot.wrote(gpa, len(data))

    def read_word(self, gpa: int, size_bytes: int) -> int:
        """A little-endian number; zero in a hole, as an unanswered bus reads here."""
        try:
            return int.from_bytes(self.read(gpa, size_bytes), "little")
        except NoMemory:
            return 0
