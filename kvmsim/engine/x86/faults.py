"""Faults the emulator reports otherwise than a processor does, put right.

It reads before it writes, so that a page fault of an instruction that does both says "read"; and
it raises #GP where the stack segment's #SS is due for addresses that are not canonical.

Source: Intel SDM volume 3, 4.7 and 6.15.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import GP, PF, SS
from kvmsim.engine.x86.paging import PF_FETCH, PF_USER, PF_WRITE

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu

#: PUSH, POP, PUSHA, POPA, PUSHF, POPF, CALL, RET, ENTER, LEAVE, RETF, IRET.
_IMPLICIT_STACK = frozenset(
    (*range(0x50, 0x62), 0x68, 0x6A, 0x8F, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCF),
) | {0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0xE8, 0x0FA0, 0x0FA1, 0x0FA8, 0x0FA9}
_BOTH = frozenset(
    (
        *(base + low for base in range(0, 0x38, 8) for low in (0, 1)),
        *(0x86, 0x87, 0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3),
        *(0x0FAB, 0x0FB3, 0x0FBB, 0x0FB0, 0x0FB1, 0x0FC0, 0x0FC1),
        *(0x0FA4, 0x0FA5, 0x0FAC, 0x0FAD),
    )
)
#: RETF, IRET, and the most they take from a stack but for what they are told to drop.
_FAR_RETURNS, _FRAME_BYTES = frozenset({0xCA, 0xCB, 0xCF}), 40
USER_RING = 3
_PRIVILEGED = {0x0F00: frozenset({2, 3}), 0x0F01: frozenset({2, 3, 6, 7})}
ARPL = 0x63
SETCC = 0x0F9  # 0F 90 to 0F 9F
_ROTATES = frozenset({0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3})
#: Conditions by their number without negation: O and P; BE, L and LE, but for comparisons.
_ALWAYS_COMPUTED, _ELSE_COMPUTED = frozenset({0, 5}), frozenset({3, 6, 7})
#: The emulator's cc_op of SUB and CMP of 1, 2, 4 and 8 bytes.
_SUBTRACTIONS = range(14, 18)
_BOTH_IN_GROUP = {
    **dict.fromkeys((0x80, 0x81, 0x82, 0x83), frozenset(range(7))),
    **dict.fromkeys((0xF6, 0xF7), frozenset({2, 3})),
    **dict.fromkeys((0xFE, 0xFF), frozenset({0, 1})),
    0x0FBA: frozenset({5, 6, 7}),
    0x0FC7: frozenset({1}),
}


def corrected(cpu: Cpu, vector: int, code: int, found: d.Instruction | None) -> tuple[int, int]:
    """The vector and error code a processor would have given.

    Args:
        cpu: whose fault.
        vector: the emulator's.
        code: its error code.
        found: the instruction at RIP; None: it cannot be read.
    """
    if found is None or code & PF_FETCH:
        return vector, code
    arpl = found.opcode == ARPL and found.operand is not None and cpu.registers.mode != 64
    if vector == PF and not code & PF_WRITE and (arpl or reads_and_writes(found)):
        return vector, code | PF_WRITE
    if vector == PF and _returns_from(cpu, found):
        return vector, code | PF_USER
    if vector != GP or code or _is_refused(cpu, found):
        return vector, code
    if cpu.registers.mode == 64 and _lost_its_stack(cpu, found):
        return SS, 0
    return vector, code


def reads_and_writes(found: d.Instruction) -> bool:
    """Whether it changes a memory operand in place: its page must be writable to begin with."""
    return d.has_operand_and_is_in(found, _BOTH, _BOTH_IN_GROUP)


def computes_flags(found: d.Instruction, operation: int) -> bool:
    """Whether the emulator computes lazy flags for an instruction before its memory access.

    Args:
        found: the instruction.
        operation: what the flags were to be computed of (``cc_op``).
    """
    if found.operand is None:
        return False
    if found.opcode in _ROTATES:
        return found.modrm & 0x30 == 0x10  # RCL, RCR
    if found.opcode >> 4 != SETCC:
        return False
    condition = found.opcode >> 1 & 7
    compared = operation in _SUBTRACTIONS
    return condition in _ALWAYS_COMPUTED or (condition in _ELSE_COMPUTED and not compared)


def _returns_from(cpu: Cpu, found: d.Instruction) -> bool:
    """Whether a far return of ring 3 faulted on its own stack, which the emulator reads as ring 0.

    Its other accesses, of descriptors, are those of ring 0.
    """
    registers = cpu.registers
    if found.opcode not in _FAR_RETURNS or registers.cpl != USER_RING:
        return False
    base = 0 if registers.mode == 64 else registers.segment(r.SS).base
    return 0 <= registers.cr2 - base - registers.q[r.RSP] < _FRAME_BYTES


def _is_refused(cpu: Cpu, found: d.Instruction) -> bool:
    """Whether it is #GP outside ring 0, before its operand is looked at.

    LLDT, LTR; LGDT, LIDT, LMSW, INVLPG.
    """
    return bool(cpu.registers.cpl) and (found.modrm >> 3 & 7) in _PRIVILEGED.get(
        found.opcode, frozenset()
    )


def _lost_its_stack(cpu: Cpu, found: d.Instruction) -> bool:
    """Whether a stack access of 64-bit code is not canonical."""
    q, operand = cpu.registers.q, found.operand
    if operand is not None and operand.segment == d.SS and operand.base in {r.RSP, r.RBP}:
        index = 0 if operand.index == d.NONE else q[operand.index] * operand.scale
        if not _canonical(q[operand.base] + index + operand.disp):
            return True
    indirect = found.opcode == 0xFF and found.modrm >> 3 & 7 in {2, 3, 6}
    if found.opcode not in _IMPLICIT_STACK and not indirect:
        return False
    pointer = r.RBP if found.opcode == 0xC9 else r.RSP
    return not (_canonical(q[pointer]) and _canonical(q[pointer] - 8))


def _canonical(address: int) -> bool:
    return (address & r.U64) >> 47 in {0, (1 << 17) - 1}
