"""Last-branch records of one vCPU: the stack, its filter, its registers (kvm.md E.1, E.2).

A pure model, fed with taken branches. LBR_SELECT tells what is *not* recorded::

    bit 0 CPL 0             bit 4 near indirect calls    bit 8 far branches, interrupts, exceptions
    bit 1 CPL > 0           bit 5 near returns           bit 9 call-stack mode: calls push,
    bit 2 conditional jumps bit 6 near indirect jumps          returns pop
    bit 3 relative calls    bit 7 near relative jumps
"""

from __future__ import annotations

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
_CALLS = frozenset({Branch.CALL, Branch.INDIRECT_CALL})


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
        tos: index of the newest record.
    """

    __slots__ = (*("_bases", "_from", "_info", "_to", "depth", "enabled", "select", "tos"),)

    def __init__(
        self, depth: int = 32, *, from_base: int = FROM, to_base: int = TO, info_base: int = INFO
    ) -> None:
        self.depth = depth
        self._bases = (from_base, to_base, info_base)
        self.enabled = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.select = 0
        self.tos = 0
        self._from = [0] * self.depth
        self._to = [0] * self.depth
        self._info = [0] * self.depth

    def branch(
        self, source: int, target: int, kind: Branch, cpl: int = 0, *, cycles: int = 0
    ) -> None:
        """A branch was taken.

        Args:
            source: linear address of the branch.
            target: linear address it went to.
            kind: what it is.
            cpl: privilege level it was executed at.
            cycles: since the previous record.
        """
        if not self.enabled:
            return
        select = self.select
        if select & SELECT_CALL_STACK and kind is Branch.RETURN and not self._hidden(kind, cpl):
            self.tos = (self.tos - 1) % self.depth
            return
        if select & SELECT_CALL_STACK and kind not in _CALLS:
            return
        if self._hidden(kind, cpl):
            return
        tos = self.tos = (self.tos + 1) % self.depth
        self._from[tos] = source
        self._to[tos] = target
        self._info[tos] = min(cycles, _CYCLES_MAX)

    def _hidden(self, kind: Branch, cpl: int) -> bool:
        level = SELECT_CPL_OVER_0 if cpl else SELECT_CPL_0
        return bool(self.select & (level | 1 << kind))

    def newest(self) -> Iterator[tuple[int, int]]:
        """(from, to) of all records, the newest first."""
        for back in range(self.depth):
            at = (self.tos - back) % self.depth
            yield self._from[at], self._to[at]

    def read(self, index: int) -> int | None:
        """Read a register; None: it is not one of these (#GP)."""
        if index == LBR_SELECT:
            return self.select
        if index == LBR_TOS:
            return self.tos
        found = self._record(index)
        return None if found is None else found[0][found[1]]

    def write(self, index: int, value: int) -> bool:
        """Write a register; False: #GP, for a register or a value that does not exist."""
        if index == LBR_SELECT:
            valid = not value & ~SELECT_VALID
            self.select = value if valid else self.select
            return valid
        if index == LBR_TOS:
            valid = value < self.depth
            self.tos = value if valid else self.tos
            return valid
        found = self._record(index)
        if found is None or (found[0] is not self._info and not _canonical(value)):
            return False
        records, at = found
        records[at] = value & _U64
        return True

    def _record(self, index: int) -> tuple[list[int], int] | None:
        for base, records in zip(self._bases, (self._from, self._to, self._info), strict=True):
            if base and base <= index < base + self.depth:
                return records, index - base
        return None


def _canonical(value: int) -> bool:
    return value < 1 << 47 or value >> 47 == (1 << 17) - 1
