"""Whether a conditional jump is taken, from the flags and the counter behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86.registers import RCX

if TYPE_CHECKING:
    from kvmsim.engine.x86.decode import Instruction

CF, PF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 6, 1 << 7, 1 << 11
LOOPNE, LOOPE, LOOP, JCXZ = 0xE0, 0xE1, 0xE2, 0xE3


def taken(found: Instruction, flags: int, q: memoryview) -> bool:
    """Whether a conditional jump has just been taken, wherever it leads.

    Args:
        found: Jcc, JCXZ or LOOP.
        flags: RFLAGS, which it does not change.
        q: the registers behind it.
    """
    opcode = found.opcode
    if LOOPNE <= opcode <= JCXZ:
        count = q[RCX] & (1 << found.address_bits) - 1
        if opcode == JCXZ:
            return count == 0
        zero = bool(flags & ZF)
        return count != 0 and (opcode == LOOP or zero == (opcode == LOOPE))
    met = _TESTS[(opcode & 0xF) >> 1](flags)
    return met != bool(opcode & 1)


def _less(flags: int) -> bool:
    return bool(flags & SF) != bool(flags & OF)


#: By the upper three bits of the condition; the lowest one negates.
_TESTS = (
    lambda flags: bool(flags & OF),
    lambda flags: bool(flags & CF),
    lambda flags: bool(flags & ZF),
    lambda flags: bool(flags & (CF | ZF)),
    lambda flags: bool(flags & SF),
    lambda flags: bool(flags & PF),
    _less,
    lambda flags: bool(flags & ZF) or _less(flags),
)
