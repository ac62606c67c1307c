"""Branches of a guest without code: a seeded walk through functions that call each other.

The walk is a program's as far as branch records can tell: a call comes back to where it was made,
a system call goes to ring 0 and returns, conditional jumps stay within their function, and every
address is the same whenever it is met again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86.decode import Branch

if TYPE_CHECKING:
    from kvmsim.engine.synthetic import Stream
    from kvmsim.engine.x86.lbr import LastBranches

TEXT = 0x40_1000
KERNEL_TEXT = 0xFFFF_FFFF_8100_0000
FUNCTIONS, FUNCTION_BYTES = 64, 1024
MAX_CALLS = 48
MOST_AT_ONCE = 256
"""Branches made for one stretch of guest time; the records hold 32."""

CYCLES_PER_NS = 3
_U64 = (1 << 64) - 1

#: Share of each kind; what a call or a system call leaves open is a return of its own.
_SHARES = (
    (0.55, Branch.CONDITIONAL),
    (0.68, Branch.JUMP),
    (0.72, Branch.INDIRECT_JUMP),
    (0.82, Branch.CALL),
    (0.86, Branch.INDIRECT_CALL),
    (0.97, Branch.RETURN),
    (1.00, Branch.FAR),
)
_LENGTHS = {
    Branch.CONDITIONAL: 2,
    Branch.JUMP: 2,
    Branch.INDIRECT_JUMP: 2,
    Branch.CALL: 5,
    Branch.INDIRECT_CALL: 2,
    Branch.RETURN: 1,
    Branch.FAR: 2,
}


class BranchStream:
    """The walk of one vCPU.

    Args:
        rate: branches per second of guest time.
        stream: its chance.
        cpl: privilege level it walks at, but for system calls.
    """

    __slots__ = ("_at", "_calls", "_cpl", "_gap_ns", "_owed_ns", "_state", "_user")

    def __init__(self, rate: float, stream: Stream, cpl: int) -> None:
        self._gap_ns = 1e9 / rate
        self._owed_ns = 0.0
        # Chance of its own: whether somebody records does not change what else the guest does.
        self._state = int(stream.random() * (1 << 53))
        self._user = self._cpl = cpl
        self._calls: list[int] = []
        self._at = TEXT

    def feed(self, records: LastBranches, guest_ns: int) -> None:
        """Take the branches of some guest time; of very many the last ones count."""
        self._owed_ns += guest_ns
        count = int(self._owed_ns / self._gap_ns)
        self._owed_ns -= count * self._gap_ns
        cycles = int(self._gap_ns * CYCLES_PER_NS)
        for _ in range(min(count, MOST_AT_ONCE)):
            source, target, kind = self._branch()
            records.branch(source, target, kind, self._cpl, cycles=cycles)

    def _random(self) -> float:
        """Knuth's multiplicative generator of 64 bits; the upper ones are good."""
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & _U64
        return (self._state >> 11) / (1 << 53)

    def _branch(self) -> tuple[int, int, Branch]:
        kind = self._kind()
        source = self._at + 4 * int(self._random() * 8)
        following = source + _LENGTHS[kind]
        target = self._target(kind, following)
        self._at = target
        return source, target, kind

    def _kind(self) -> Branch:
        draw = self._random()
        kind = next(kind for upto, kind in _SHARES if draw < upto)
        if kind in {Branch.CALL, Branch.INDIRECT_CALL} and len(self._calls) >= MAX_CALLS:
            kind = Branch.RETURN
        if kind is not Branch.RETURN:
            return kind
        if self._cpl != self._user:
            return Branch.FAR
        return kind if self._calls else Branch.JUMP

    def _target(self, kind: Branch, following: int) -> int:
        if kind is Branch.RETURN:
            return self._calls.pop()
        if kind is Branch.FAR:
            return self._cross(following)
        base = self._text() + FUNCTION_BYTES * int(self._random() * FUNCTIONS)
        if kind in {Branch.CALL, Branch.INDIRECT_CALL} and self._cpl == self._user:
            self._calls.append(following)
            return base
        function = following - (following - self._text()) % FUNCTION_BYTES
        return function + 16 * int(self._random() * FUNCTION_BYTES / 32)

    def _cross(self, following: int) -> int:
        """Into a system call, or out of it."""
        if self._cpl == self._user and self._user:
            self._calls.append(following)
            self._cpl = 0
            return KERNEL_TEXT
        self._cpl = self._user
        return self._calls.pop() if self._calls else TEXT

    def _text(self) -> int:
        return TEXT if self._cpl == self._user else KERNEL_TEXT
