"""What memory a guest accesses while it executes instruction by instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86.backend import ACCESS_READ
from kvmsim.engine.x86.memory import NoMemory

if TYPE_CHECKING:
    from kvmsim.engine.x86.backend import Unicorn
    from kvmsim.engine.x86.breakpoints import Place
    from kvmsim.engine.x86.memory import Memory

#: An access that touches a place begins at most so far before it.
_REACH = 63
_ALL = ((1, 0),)


class Accesses:
    """Takes notes by hooks of the emulator.

    Args:
        unicorn: the emulator.
        memory: guest memory.

    Attributes:
        active: accesses are noted.
        hits: bits of the data breakpoints that were touched.
        misaligned: an access was not on a multiple of its size.
    """

    def __init__(self, unicorn: Unicorn, memory: Memory) -> None:
        self._unicorn = unicorn
        self._memory = memory
        self._places: tuple[Place, ...] = ()
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._handles: list[int] = []
        self._undo: list[tuple[int, bytes]] = []
        self._aligned = False
        self.active = False
        self.hits = 0
        self.misaligned = False

    def watch(self, places: tuple[Place, ...], *, aligned: bool = False) -> None:
        """Note accesses to these places from now on; with ``aligned`` also those that are not."""
        ranges = tuple((place.gpa - _REACH, place.gpa + place.size - 1) for place in places)
        ranges = _ALL if aligned else ranges
        self._places, self._aligned = places, aligned
        self.hits, self.misaligned = 0, False
        self._undo.clear()
        if ranges == self._ranges:
            return
        for handle in self._handles:
            self._unicorn.unhook(handle)
        self._handles = [
            self._unicorn.hook_accesses(self._on_access, max(begin, 0), end)
            for begin, end in ranges
        ]
        self._ranges = ranges
        self.active = bool(ranges)
        # Blocks translated before do not call.
        self._unicorn.flush_code()

    def rest(self) -> None:
        """Note nothing: hooks of accesses make all of them slow, and RETF in real mode stray."""
        if self._ranges:
            self.watch(())

    def undo(self) -> None:
        """Take back what was written since :meth:`watch`."""
        while self._undo:
            gpa, data = self._undo.pop()
            self._memory.write(gpa, data)

    def _on_access(self, kind: int, gpa: int, size: int) -> None:
        for place in self._places:
            touched = gpa < place.gpa + place.size and place.gpa < gpa + size
            if touched and (place.reads or kind != ACCESS_READ):
                self.hits |= place.bit
        if self._aligned:
            self.misaligned |= bool(gpa & (size - 1))
            if kind != ACCESS_READ:
                self._remember(gpa, size)

    def _remember(self, gpa: int, size: int) -> None:
        try:
            self._undo.append((gpa, self._memory.read(gpa, size)))
        except NoMemory:
            return
