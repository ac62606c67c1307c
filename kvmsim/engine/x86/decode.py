"""Instruction lengths, memory operands and the few instructions the engine must know.

Not a disassembler: an instruction is its prefixes, opcode, ModRM and immediates, enough to say how
long it is, which memory it addresses, whether it locks that, and whether it is *sensitive*, that
is, executed by the engine and not by the emulator below. Opcodes are numbers: one byte, ``0x0Fxx``,
``0x0F38xx`` or ``0x0F3Axx``; with a VEX prefix ``VEX`` and its fields, as far as to the operand.
EVEX and XOP instructions are not decoded further, for the guest gets #UD.

Source: Intel SDM volume 2, appendix A, opcode maps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

MAX_LENGTH = 15
REPNE, REP = 0xF2, 0xF3
SMSW = 4  # in the reg field of 0F 01

#: Set in opcodes behind a VEX prefix: pp << 16, the opcode map << 8, the opcode.
VEX = 1 << 24
#: An EVEX prefix, of which nothing else is known.
EVEX = 1 << 25
#: The VEX prefix names a second source.
VEX_SOURCE = 1 << 26

#: Registers a memory operand may have besides the 16 general ones.
NONE = -1
RIP = 16

# Segment registers, as ModRM.reg numbers them.
ES, CS, SS, DS, FS, GS = range(6)

_SEGMENT_PREFIXES = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}

#: (base, index) of the eight 16-bit addressing forms; 3 BX, 5 BP, 6 SI, 7 DI.
_FORMS_16 = ((3, 6), (3, 7), (5, 6), (5, 7), (6, NONE), (7, NONE), (5, NONE), (3, NONE))


class Branch(IntEnum):
    """What kind of branch an instruction is, as LBR_SELECT tells them apart."""

    CONDITIONAL = 2
    CALL = 3
    INDIRECT_CALL = 4
    RETURN = 5
    INDIRECT_JUMP = 6
    JUMP = 7
    FAR = 8


@dataclass(frozen=True, slots=True)
class Operand:
    """A memory operand.

    Attributes:
        base: number of the base register, ``RIP`` or ``NONE``.
        index: number of the index register or ``NONE``.
        scale: factor of the index.
        disp: displacement, signed.
        segment: which segment register applies.
        address_bits: the offset wraps at 16, 32 or 64 bits.
    """

    base: int
    index: int
    scale: int
    disp: int
    segment: int
    address_bits: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        code: its bytes.
        opcode: see the module.
        modrm: its ModRM byte; ``NONE`` without.
        operand: its memory operand; None: there is none.
        bits: operand size, 16, 32 or 64, from prefixes and mode; byte forms are told by opcode.
        rex: the REX prefix, 0 without.
        locked: has a LOCK prefix.
        repeat: 0xF2, 0xF3 or 0.
        segment: the segment override, ``NONE`` without.
        address_bits: address size.
        immediate: value of the last immediate, unsigned; 0 without.
    """

    code: bytes
    opcode: int
    modrm: int
    operand: Operand | None
    bits: int
    rex: int
    locked: bool
    repeat: int
    segment: int
    address_bits: int
    immediate: int

    @property
    def length(self) -> int:
        """Its bytes."""
        return len(self.code)

    @property
    def reg(self) -> int:
        """The reg field of ModRM with its REX bit."""
        return (self.modrm >> 3 & 7) | (self.rex & 4) << 1

    @property
    def rm(self) -> int:
        """The r/m field of a register form with its REX bit."""
        return (self.modrm & 7) | (self.rex & 1) << 3


def _has_modrm(opcode: int) -> bool:
    if opcode < 0x40:
        return opcode & 7 < 4
    return (
        opcode in {0x62, 0x63, 0x69, 0x6B, 0xC0, 0xC1, 0xC4, 0xC5, 0xC6, 0xC7, 0xF6, 0xF7, 0xFE}
        or opcode == 0xFF
        or 0x80 <= opcode <= 0x8F
        or 0xD0 <= opcode <= 0xD3
        or 0xD8 <= opcode <= 0xDF
    )


_VEX_IMM8 = frozenset({0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6})
_MODRM_1 = frozenset(op for op in range(256) if _has_modrm(op))
_NO_MODRM_2 = frozenset(
    (*range(0x05, 0x0A), 0x0B, 0x0E, *range(0x30, 0x38), 0x77, *range(0x80, 0x90))
) | {0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xAA, 0xB9, *range(0xC8, 0xD0), 0xFF}
_IMM8_1 = frozenset(
    (*range(0x70, 0x80), *range(0xB0, 0xB8), *range(0xE0, 0xE8), *range(0x04, 0x40, 8))
) | {0x6A, 0x6B, 0x80, 0x82, 0x83, 0xA8, 0xC0, 0xC1, 0xC6, 0xCD, 0xD4, 0xD5, 0xEB}
_IMMZ_1 = frozenset(range(0x05, 0x40, 8)) | {0x68, 0x69, 0x81, 0xA9, 0xC7, 0xE8, 0xE9}
_IMM8_2 = frozenset({0x0F, 0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6})


class _Reader:
    """Takes fields off code."""

    __slots__ = ("at", "code")

    def __init__(self, code: bytes, at: int) -> None:
        self.code = code[at : at + MAX_LENGTH]
        self.at = 0

    def take(self, size: int, *, signed: bool = False) -> int:
        end = self.at + size
        if end > len(self.code):
            raise _Truncated
        value = int.from_bytes(self.code[self.at : end], "little", signed=signed)
        self.at = end
        return value


class _Truncated(Exception):
    """The code ends, or 15 bytes are over, before the instruction does."""


@dataclass(slots=True)
class _Prefixes:
    rex: int = 0
    locked: bool = False
    repeat: int = 0
    segment: int = NONE
    operand_size: bool = False
    address_size: bool = False


def decode(code: bytes, at: int, mode: int) -> Instruction | None:
    """Decode one instruction.

    Args:
        code: machine code.
        at: where in it.
        mode: 16, 32 or 64, the mode of the code segment.

    Returns:
        The instruction; None: it is cut off or too long.
    """
    try:
        return _decode(_Reader(code, at), mode)
    except _Truncated:
        return None


def _decode(reader: _Reader, mode: int) -> Instruction | None:
    prefixes, opcode = _prefixes(reader, mode)
    if opcode == 0x0F:
        opcode = 0x0F00 | reader.take(1)
        if opcode in {0x0F38, 0x0F3A}:
            opcode = opcode << 8 | reader.take(1)
    bits = _operand_bits(prefixes, mode)
    wide_address = mode if not prefixes.address_size else {16: 32, 32: 16, 64: 32}[mode]
    modrm = NONE
    operand = None
    if _takes_modrm(opcode):
        modrm = reader.take(1)
        if opcode in {0xC4, 0xC5, 0x62} and (mode == 64 or modrm >= 0xC0):
            return _vex(reader, prefixes, opcode, modrm, mode)
        if modrm < 0xC0 and not 0x0F20 <= opcode <= 0x0F23:
            operand = _operand(reader, modrm, prefixes, wide_address, mode)
    immediate = _immediate(reader, opcode, modrm, prefixes, bits, wide_address, mode)
    return Instruction(
        reader.code[: reader.at],
        opcode,
        modrm,
        operand,
        bits,
        prefixes.rex,
        prefixes.locked,
        prefixes.repeat,
        prefixes.segment,
        wide_address,
        immediate,
    )


def _vex(reader: _Reader, prefixes: _Prefixes, first: int, second: int, mode: int) -> Instruction:
    """An instruction behind a VEX prefix of two or three bytes, or the start of an EVEX one."""
    opcode, bits = EVEX, 512
    address_bits = mode if not prefixes.address_size else {32: 16, 64: 32}.get(mode, 32)
    modrm, operand = NONE, None
    valid = not (prefixes.locked or prefixes.repeat or prefixes.operand_size or prefixes.rex)
    if first != 0x62 and valid:
        third = reader.take(1) if first == 0xC4 else second & 0x7F
        table = second & 0x1F if first == 0xC4 else 1
        rex = ~second >> 5 & (7 if first == 0xC4 else 4)
        prefixes.rex = rex | third >> 4 & 8
        # Only these read no second source, whose field is then all ones.
        code = reader.take(1)
        opcode = VEX | (third & 3) << 16 | table << 8 | code
        bits = 256 if third & 4 else 128
        if third >> 3 & 15 != 15:
            opcode |= VEX_SOURCE
        if (table, code) != (1, 0x77):
            modrm = reader.take(1)
            if modrm < 0xC0:
                operand = _operand(reader, modrm, prefixes, address_bits, mode)
        reader.take(1 if table == 3 or (table == 1 and code in _VEX_IMM8) else 0)
    return Instruction(
        *(reader.code[: reader.at], opcode, modrm, operand, bits, prefixes.rex),
        *(prefixes.locked, prefixes.repeat, prefixes.segment, address_bits, 0),
    )


def _prefixes(reader: _Reader, mode: int) -> tuple[_Prefixes, int]:
    found = _Prefixes()
    while True:
        byte = reader.take(1)
        if byte in _SEGMENT_PREFIXES:
            segment = _SEGMENT_PREFIXES[byte]
            if mode != 64 or segment in {FS, GS}:
                found.segment = segment
        elif byte == 0x66:
            found.operand_size = True
        elif byte == 0x67:
            found.address_size = True
        elif byte == 0xF0:
            found.locked = True
        elif byte in {0xF2, 0xF3}:
            found.repeat = byte
        elif mode == 64 and byte & 0xF0 == 0x40:
            # Only directly before the opcode does it count.
            following = reader.take(1)
            reader.at -= 1
            if not _is_prefix(following):
                found.rex = byte
                return found, reader.take(1)
        else:
            return found, byte


def _is_prefix(byte: int) -> bool:
    known = byte in _SEGMENT_PREFIXES or byte in {0x66, 0x67, 0xF0, 0xF2, 0xF3}
    return known or byte & 0xF0 == 0x40


def _operand_bits(prefixes: _Prefixes, mode: int) -> int:
    if prefixes.rex & 8:
        return 64
    if mode == 16:
        return 32 if prefixes.operand_size else 16
    return 16 if prefixes.operand_size else 32


def _takes_modrm(opcode: int) -> bool:
    if opcode < 0x100:
        return opcode in _MODRM_1
    return opcode > 0xFFFF or opcode & 0xFF not in _NO_MODRM_2


def _operand(
    reader: _Reader, modrm: int, prefixes: _Prefixes, address_bits: int, mode: int
) -> Operand:
    if address_bits == 16:
        return _operand_16(reader, modrm, prefixes)
    mod, rm = modrm >> 6, modrm & 7
    base, index, scale = rm | (prefixes.rex & 1) << 3, NONE, 1
    if rm == 4:
        sib = reader.take(1)
        index = (sib >> 3 & 7) | (prefixes.rex & 2) << 2
        index = NONE if index == 4 else index
        scale = 1 << (sib >> 6)
        rm = sib & 7
        base = rm | (prefixes.rex & 1) << 3
        if rm == 5 and mod == 0:
            base = NONE
    elif rm == 5 and mod == 0:
        base = RIP if mode == 64 else NONE
    disp = 0
    if mod == 1:
        disp = reader.take(1, signed=True)
    elif mod == 2 or (mod == 0 and rm == 5):
        disp = reader.take(4, signed=True)
    segment = prefixes.segment
    if segment == NONE:
        segment = SS if base in {4, 5} else DS
    return Operand(base, index, scale, disp, segment, address_bits)


def _operand_16(reader: _Reader, modrm: int, prefixes: _Prefixes) -> Operand:
    mod = modrm >> 6
    base, index = _FORMS_16[modrm & 7]
    disp = 0
    if mod == 0 and modrm & 7 == 6:
        base = NONE
        disp = reader.take(2)
    elif mod:
        disp = reader.take(mod, signed=True)
    segment = prefixes.segment
    if segment == NONE:
        segment = SS if base == 5 else DS
    return Operand(base, index, 1, disp, segment, 16)


def _immediate(
    reader: _Reader,
    opcode: int,
    modrm: int,
    prefixes: _Prefixes,
    bits: int,
    address_bits: int,
    mode: int,
) -> int:
    size = _immediate_bytes(opcode, modrm, bits, address_bits)
    if opcode == 0xC8:  # ENTER has two
        reader.take(2)
    elif opcode in {0x9A, 0xEA}:  # far pointer: offset and selector
        reader.take(2 if bits == 16 else 4)
    elif mode == 64 and (opcode in {0xE8, 0xE9} or 0x0F80 <= opcode <= 0x0F8F):
        # Near branches ignore the operand-size prefix (Intel).
        size = 4
    del prefixes
    return reader.take(size)


def _immediate_bytes(opcode: int, modrm: int, bits: int, address_bits: int) -> int:
    wide = 2 if bits == 16 else 4
    if opcode > 0xFF:
        return _immediate_bytes_2(opcode, wide)
    size = 0
    if opcode in _IMM8_1 or opcode == 0xC8 or (opcode == 0xF6 and modrm & 0x30 == 0):
        size = 1
    elif opcode in _IMMZ_1 or (opcode == 0xF7 and modrm & 0x30 == 0):
        size = wide
    elif opcode in {0xC2, 0xCA, 0x9A, 0xEA}:
        size = 2
    elif 0xB8 <= opcode <= 0xBF:
        size = 8 if bits == 64 else wide
    elif 0xA0 <= opcode <= 0xA3:
        size = address_bits // 8
    return size


def _immediate_bytes_2(opcode: int, wide: int) -> int:
    if 0x0F80 <= opcode <= 0x0F8F:
        return wide
    if opcode > 0xFFFF:
        return 1 if opcode >> 8 == 0x0F3A else 0
    return 1 if opcode & 0xFF in _IMM8_2 else 0


# -- what an instruction is --------------------------------------------------------------------

_LOCKABLE = frozenset(
    (*range(0x00, 0x38, 8), *range(0x01, 0x38, 8)),
) | {0x86, 0x87, 0x0FAB, 0x0FB3, 0x0FBB, 0x0FB0, 0x0FB1, 0x0FC0, 0x0FC1}
_LOCKABLE_GROUPS = {
    **dict.fromkeys((0x80, 0x81, 0x82, 0x83), frozenset(range(7))),
    **dict.fromkeys((0xF6, 0xF7), frozenset({2, 3})),
    **dict.fromkeys((0xFE, 0xFF), frozenset({0, 1})),
    0x0FBA: frozenset({5, 6, 7}),
    0x0FC7: frozenset({1}),
}
_BYTE_FORMS = frozenset(range(0x00, 0x38, 8)) | {0x80, 0x82, 0x86, 0xF6, 0xFE, 0x0FB0, 0x0FC0}
BIT_STRINGS = frozenset({0x0FAB, 0x0FB3, 0x0FBB})

SENSITIVE = frozenset(
    {
        *(0x6C, 0x6D, 0x6E, 0x6F),  # INS, OUTS
        *(0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF),  # IN, OUT
        *(0xF1, 0xF4),  # INT1, HLT
        *(0x0F05, 0x0F07, 0x0F34),  # SYSCALL, SYSRET, SYSENTER
        *(0x0F08, 0x0F09),  # INVD, WBINVD
        *(0x0F20, 0x0F21, 0x0F22, 0x0F23),  # MOV of control and debug registers
        *(0x0F30, 0x0F31, 0x0F32, 0x0F33),  # WRMSR, RDTSC, RDMSR, RDPMC
        0x0FA2,  # CPUID
    }
)
#: 0F 01 /r with a register form: VMCALL, MONITOR, MWAIT, XGETBV, XSETBV, VMMCALL, RDTSCP.
SENSITIVE_0F01 = frozenset({0xC1, 0xC8, 0xC9, 0xD0, 0xD1, 0xD9, 0xF9})

#: Code without any of these bytes holds no instruction the engine must know (POPF, IRET and STI
#: among them, and forms that do not exist).
INTERESTING = re.compile(
    rb"[\xf0\x86\x87\x8e\x6c-\x6f\xe4-\xe7\xec-\xef\xf1\xf4\x9d\xcf\xfb]|"
    rb"\xf3\x90|"
    rb"\x0f[\x00\x01\x05\x07-\x09\x20-\x23\x30-\x34\xa2\xae]|"
    rb"\x0f[\x50\x71-\x73\xd6][\x00-\xbf]|"
    rb"\x0f\xc7[\x08-\x0f\x48-\x4f\x88-\x8f]|"
    rb"[\x8f\xc6\xc7][\x08-\x3f\x48-\x7f\x88-\xbf\xc8-\xff]|"
    rb"\x0f\x38[\xf0\xf1][\xc0-\xff]|"
    rb"\xc5|\x62|\xc4[\x01-\x03\x21-\x23\x41-\x43\x61-\x63\x81-\x83\xa1-\xa3\xc1-\xc3\xe1-\xe3]"
)
#: MOVMSKPS, the shifts by an immediate, MOVQ2DQ and MOVDQ2Q (0F D6 with 0xF3 or 0xF2): the emulator
#: takes a memory operand for a register, and its displacement for code (Unicorn 2.1.4, gen_sse).
_MOVQ = 0x0FD6
_OF_REGISTERS = frozenset({0x0F50, 0x0F71, 0x0F72, 0x0F73, _MOVQ})
LTR_GROUP, _LTR, _MOV_SEGMENT = 0x0F00, 3, 0x8E
_CONTROL_REGISTERS = frozenset({0, 2, 3, 4, 8})


def is_locked_access(found: Instruction) -> bool:
    """Whether it reads, changes and writes memory as one locked access."""
    if found.operand is None:
        return False
    if found.opcode in {0x86, 0x87}:
        return True
    return found.locked and is_lockable(found)


def is_lockable(found: Instruction) -> bool:
    """Whether it may have a LOCK prefix; with one, any other instruction is #UD."""
    return has_operand_and_is_in(found, _LOCKABLE, _LOCKABLE_GROUPS)


def has_operand_and_is_in(
    found: Instruction, opcodes: Container[int], groups: Mapping[int, Container[int]]
) -> bool:
    """Whether it has a memory operand, and its opcode is in a table.

    Args:
        found: the instruction.
        opcodes: of whole opcodes.
        groups: of opcodes whose ModRM tells them apart: which of their eight.
    """
    if found.operand is None:
        return False
    group = groups.get(found.opcode)
    if group is not None:
        return (found.modrm >> 3 & 7) in group
    return found.opcode in opcodes


def is_undefined(found: Instruction) -> bool:
    """Whether it is a form that does not exist, which the emulator below executes nevertheless."""
    opcode = found.opcode
    if opcode in {0xC6, 0xC7, 0x8F}:
        return bool(found.modrm & 0x38)
    if opcode in {0x0F20, 0x0F22}:
        return found.reg not in _CONTROL_REGISTERS
    if opcode == 0x0FAE:
        return _is_fence_of_later_processors(found)
    if opcode in _OF_REGISTERS and found.operand is not None:
        return opcode != _MOVQ or found.repeat != 0
    # MOVBE between registers; with 0xF2 it is CRC32.
    return opcode in {0x0F38F0, 0x0F38F1} and found.operand is None and found.repeat != REPNE


def _is_fence_of_later_processors(found: Instruction) -> bool:
    """Whether it is INCSSP, UMONITOR, UMWAIT or TPAUSE: LFENCE or MFENCE but for a prefix."""
    if found.operand is not None:
        return False
    reg = found.modrm >> 3 & 7
    return (reg == 5 and found.repeat == REP) or (
        reg == 6 and (found.repeat != 0 or 0x66 in found.code[:-3])
    )


def shows_system_state(found: Instruction) -> bool:
    """Whether it is SLDT, STR, SGDT, SIDT or SMSW, which CR4.UMIP keeps to ring 0."""
    reg = found.modrm >> 3 & 7
    if found.opcode == 0x0F00:
        return reg in {0, 1}
    return found.opcode == 0x0F01 and (reg == SMSW or (reg in {0, 1} and found.operand is not None))


def loads_descriptor(found: Instruction) -> bool:
    """Whether it may set a bit in the descriptor it loads: MOV to a segment register, LTR."""
    if found.opcode == LTR_GROUP:
        return found.modrm >> 3 & 7 == _LTR
    return found.opcode == _MOV_SEGMENT


def locked_bytes(found: Instruction) -> int:
    """Size of a locked access."""
    if found.opcode == 0x0FC7:
        return 16 if found.bits == 64 else 8
    return 1 if found.opcode in _BYTE_FORMS else found.bits // 8


def is_sensitive(found: Instruction) -> bool:
    """Whether the engine executes it."""
    if found.opcode == 0x0F01:
        return found.modrm in SENSITIVE_0F01
    return found.opcode in SENSITIVE


def branch_of(found: Instruction) -> Branch | None:
    """What kind of branch it is; None: it goes straight on, or is not known to branch."""
    opcode = found.opcode
    if 0x70 <= opcode <= 0x7F or 0x0F80 <= opcode <= 0x0F8F or 0xE0 <= opcode <= 0xE3:
        return Branch.CONDITIONAL
    if opcode == 0xFF:
        return _INDIRECT.get(found.modrm >> 3 & 7)
    return _BRANCHES.get(opcode)


_INDIRECT = {2: Branch.INDIRECT_CALL, 3: Branch.FAR, 4: Branch.INDIRECT_JUMP, 5: Branch.FAR}
_BRANCHES = {
    0xE8: Branch.CALL,
    **dict.fromkeys((0xC2, 0xC3), Branch.RETURN),
    **dict.fromkeys((0xE9, 0xEB), Branch.JUMP),
    **dict.fromkeys((0x9A, 0xEA, 0xCA, 0xCB, 0xCC, 0xCD, 0xCE, 0xCF, 0xF1), Branch.FAR),
    **dict.fromkeys((0x0F05, 0x0F07, 0x0F34, 0x0F35), Branch.FAR),
}
