"""Last-branch records of one vCPU: the stack, its filter, its registers (kvm.md E.1, E.2).

A pure model, fed with taken branches. LBR_SELECT tells what is *not* recorded::

    bit 0 CPL 0             bit 4 near indirect calls    bit 8 far branches, interrupts, exceptions
    bit 1 CPL > 0           bit 5 near returns           bit 9 call-stack mode: calls push,
    bit 2 conditional jumps bit 6 near indirect jumps          returns pop
    bit 3 relative calls    bit 7 near relative jumps
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvmsim.engine.x86.decode import Branch

if TYPE_CHECKING:
    from collections.abc import Iterator

LBR_SELECT, LBR_TOS = 0x1C8, 0x1C9
FROM, TO, INFO = 0x680, 0x6C0, 0xDC0
SELECT_VALID = 0x3FF
SELECT_CPL_0, SELECT_CPL_OVER_0, SELECT_CALL_STACK = 1, 2, 1 << 9

_U64 = (1 << 64) - 1
_CYCLES_MAX = 0xFFFF
_ALL_KINDS = sum(1 << kind for kind in Branch)
_CALLS = 1 << Branch.CALL | 1 << Branch.INDIRECT_CALL
#: Room for records of each sort, whatever the depth.
ROOM = 32
#: Where in :meth:`LastBranches.actions` the kinds begin that take a record away.
POPS = 16


class LastBranches:
    """The records of one vCPU.

    Args:
        depth: how many there are: 4, 8, 16 or 32.
        from_base: number of the first FROM register.
        to_base: number of the first TO register.
        info_base: number of the first INFO register; 0: there are none.

    Attributes:
        enabled: DEBUGCTL bit 0: branches are recorded.
        select: LBR_SELECT.
    """

    __slots__ = ("_bases", "_words", "depth", "enabled", "select")

    def __init__(
        self, depth: int = 32, *, from_base: int = FROM, to_base: int = TO, info_base: int = INFO
    ) -> None:
        self.depth = depth
        self._bases = (from_base, to_base, info_base)
        self._words = array("Q", bytes(8 * (1 + 3 * ROOM)))
        self.enabled = False
        self.reset()

    @property
    def address(self) -> int:
        """Where the records are, for native code: TOS, then 32 each of FROM, TO and INFO."""
        return self._words.buffer_info()[0]

    @property
    def tos(self) -> int:
        """LBR_TOS."""
        return self._words[0]

    def reset(self) -> None:
        """Forget everything."""
        self.select = 0
        for at in range(len(self._words)):
            self._words[at] = 0

    def actions(self, *, user: bool) -> int:
        """What LBR_SELECT makes of branches that end in a privilege level.

        Args:
            user: in one above 0.

        Returns:
            One bit per kind of branch: below bit 16 those to record, from there on those that take
            the newest record away.
        """
        select = self.select
        if select & (SELECT_CPL_OVER_0 if user else SELECT_CPL_0):
            return 0
        shown = _ALL_KINDS & ~select
        if not select & SELECT_CALL_STACK:
            return shown
        return shown & _CALLS | (shown & 1 << Branch.RETURN) << POPS

    def branch(
        self, source: int, target: int, kind: Branch, cpl: int = 0, *, cycles: int = 0
    ) -> bool:
        """A branch was taken; whether it is recorded.

        Args:
            source: linear address of the branch.
            target: linear address it went to.
            kind: what it is.
            cpl: privilege level it ended in (SDM volume 3, table "MSR_LBR_SELECT": branches ending
                in ring 0).
            cycles: since the previous record.
        """
        actions = self.actions(user=cpl > 0) if self.enabled else 0
        words = self._words
        if actions >> POPS & 1 << kind:
            words[0] = (words[0] - 1) % self.depth
        if not actions & 1 << kind:
            return False
        tos = words[0] = (words[0] + 1) % self.depth
        words[1 + tos] = source
        words[1 + ROOM + tos] = target
        words[1 + 2 * ROOM + tos] = min(cycles, _CYCLES_MAX)
        return True

    def newest(self) -> Iterator[tuple[int, int]]:
        """(from, to) of all records, the newest first."""
        for back in range(self.depth):
            at = 1 + (self.tos - back) % self.depth
            yield self._words[at], self._words[at + ROOM]

    def read(self, index: int) -> int | None:
        """Read a register; None: it is not one of these (#GP)."""
        if index == LBR_SELECT:
            return self.select
        if index == LBR_TOS:
            return self.tos
        place = self._place(index)
        return None if place is None else self._words[place]

    def write(self, index: int, value: int) -> bool:
        """Write a register; False: #GP, for a register or a value that does not exist."""
        if index == LBR_SELECT:
            valid = not value & ~SELECT_VALID
            self.select = value if valid else self.select
            return valid
        if index == LBR_TOS:
            valid = value < self.depth
            self._words[0] = value if valid else self.tos
            return valid
        place = self._place(index)
        if place is None or (place <= 2 * ROOM and not _canonical(value)):
            return False
        self._words[place] = value & _U64
        return True

    def _place(self, index: int) -> int | None:
        for number, base in enumerate(self._bases):
            if base and base <= index < base + self.depth:
                return 1 + number * ROOM + index - base
        return None


def _canonical(value: int) -> bool:
    return value < 1 << 47 or value >> 47 == (1 << 17) - 1
