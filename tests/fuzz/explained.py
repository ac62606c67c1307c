"""Where the two engines part, and why that is known.

A guest that executes one of these instructions in one of these ways is not held against either
engine: in some of them only a register or flags are left out, in others what comes after may be
different altogether. Each says what a processor does, as far as that is known.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fuzz.opcodes import STATUS

from kvmsim.engine.x86 import decode as d

if TYPE_CHECKING:
    from collections.abc import Callable

SSE = frozenset(
    (*range(0x0F10, 0x0F18), *range(0x0F28, 0x0F30), *range(0x0F50, 0x0F80), 0x0FC2, 0x0FC6)
) | frozenset(range(0x0FD0, 0x1000))
#: MOVUPS, MOVUPD, MOVDQU, LDDQU take any address, but for an alignment check.
MOVBE = frozenset({0x0F38F0, 0x0F38F1})
SAVES_SEGMENT = frozenset({0x06, 0x0E, 0x16, 0x1E, 0x0FA0, 0x0FA8})
LOADS_SEGMENT = frozenset({0x07, 0x17, 0x1F, 0x0FA1, 0x0FA9})
#: By opcode, the reg fields with a memory operand of x87 instructions that store numbers or status,
#: or may load a control word that unmasks exceptions. All others show nothing of what they do.
_X87_SHOWS = {
    0xD9: frozenset({2, 3, 4, 5, 6}),
    0xDB: frozenset({1, 2, 3, 7}),
    0xDD: frozenset({1, 2, 3, 4, 6, 7}),
    0xDF: frozenset({1, 2, 3, 6, 7}),
}
STRINGS = frozenset({0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF})
STRING_PORTS = frozenset({0x6C, 0x6D, 0x6E, 0x6F})
STACK = frozenset(
    (*range(0x50, 0x62), 0x68, 0x6A, 0x8F, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCF)
) | {0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0xE8, 0x9A, 0xFF, 0x0FA0, 0x0FA1, 0x0FA8, 0x0FA9}
BRANCHES = frozenset((*range(0x70, 0x80), *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB, 0xC2, 0xC3, 0xFF))
NEAR = BRANCHES | frozenset(range(0x0F80, 0x0F90))
AC = 1 << 18
TF_AND_AC = 1 << 8 | AC
#: More than any instruction or exception puts on a stack, but for ENTER with levels.
FRAME = 64


@dataclass
class Seen:
    """An instruction the second engine is about to execute.

    Attributes:
        found: the instruction.
        mode: 16, 32 or 64.
        general: the general registers.
        segments: (selector, base, limit, rights) of ES CS SS DS FS GS.
        rip: where it is.
        flags: RFLAGS, but for status.
        cr0: CR0.
    """

    found: d.Instruction
    mode: int
    general: list[int]
    segments: list[tuple[int, int, int, int]]
    rip: int
    flags: int
    cr0: int

    def offset(self):
        """Offset of the memory operand in its segment."""
        operand = self.found.operand
        value = operand.disp
        if operand.base == d.RIP:
            value += self.rip + self.found.length
        elif operand.base != d.NONE:
            value += self.general[operand.base]
        if operand.index != d.NONE:
            value += self.general[operand.index] * operand.scale
        return value & (1 << operand.address_bits) - 1

    def may_access(self, number, offset, size):
        """Whether a segment allows an access, whichever it is."""
        selector, _base, limit, rights = self.segments[number]
        usable = self.mode == 16 or (selector & ~3 and rights & 0x8000 and rights & 0xA00 == 0x200)
        expands_down = rights & 0xC00 == 0x400
        return bool(usable) and not expands_down and offset + size - 1 <= limit


def _outside_segment(seen):
    if seen.mode == 64:
        return False
    wide = seen.segments[2][3] & 0x40_0000 and seen.mode != 16
    # The engine checks the frame of an exception as a whole, a processor word by word.
    no_room = seen.general[4] & (0xFFFF_FFFF if wide else 0xFFFF) < FRAME
    return no_room or _operand_outside(seen) or _implied_outside(seen)


def _operand_outside(seen):
    found = seen.found
    if 0xA0 <= found.opcode <= 0xA3:
        number = d.DS if found.segment == d.NONE else found.segment
        return not seen.may_access(number, found.immediate, 4)
    if found.operand is None or found.opcode in {0x8D, 0x0F1F}:
        return False
    if found.opcode in d.BIT_STRINGS or found.opcode == 0x0FA3:
        return True
    size = 108 if 0xD8 <= found.opcode <= 0xDF else 16
    return not seen.may_access(found.operand.segment, seen.offset(), size)


def _implied_outside(seen):
    """Operands that the opcode implies: of strings, and on the stack."""
    found, general = seen.found, seen.general
    if found.opcode in STRINGS | STRING_PORTS | {0xD7}:
        mask = (1 << found.address_bits) - 1
        source = d.DS if found.segment == d.NONE else found.segment
        places = ((source, general[6] & mask), (d.ES, general[7] & mask))
        return not all(seen.may_access(number, at, FRAME) for number, at in places)
    if found.opcode in STACK:
        wide = seen.segments[2][3] & 0x40_0000 and seen.mode != 16
        pointers = [general[n] & (0xFFFF_FFFF if wide else 0xFFFF) for n in _stack_pointers(found)]
        return any(not seen.may_access(2, at, FRAME) or at < FRAME for at in pointers)
    return False


def _stack_pointers(found):
    """Numbers of the registers whose stack it uses: RSP, and RBP of LEAVE."""
    return (4, 5) if found.opcode == 0xC9 else (4,)


def _branches_out(seen):
    """A near branch of 32 bits in a segment of 64 KiB; those of 16 bits cannot leave it."""
    limit = seen.segments[1][2]
    wide = seen.found.bits == 32
    return seen.mode != 64 and seen.found.opcode in NEAR and limit == 0xFFFF and wide


def _x87_shows(seen):
    """x87 instructions that show what is on the register stack, or may unmask exceptions."""
    opcode, reg = seen.found.opcode, seen.found.modrm >> 3 & 7
    if seen.found.operand is not None:
        return reg in _X87_SHOWS.get(opcode, frozenset())
    # FUCOMI and FCOMI, with and without POP; FNSTSW AX.
    return (opcode in {0xDB, 0xDF} and reg in {5, 6}) or (opcode == 0xDF and reg == 4)


def _zero_source(seen):
    """BSF or BSR of a register that is 0, or of memory, which may be."""
    found = seen.found
    if found.opcode not in {0x0FBC, 0x0FBD}:
        return False
    return found.operand is not None or not seen.general[found.rm] & (1 << found.bits) - 1


def _misaligned_sse(seen):
    found = seen.found
    vector = found.opcode in SSE or (found.opcode > 0xFFFF and found.opcode not in MOVBE)
    return vector and found.operand is not None and bool(seen.offset() & 15)


def _not_canonical_target(seen):
    """RET and indirect branches of 64-bit code."""
    return seen.mode == 64 and seen.found.opcode in {0xC2, 0xC3, 0xFF, 0xCF, 0xCA, 0xCB}


@dataclass(frozen=True)
class Explanation:
    """One known difference.

    Attributes:
        name: what it is about.
        reason: who is right, and why it stays.
        applies: whether an instruction meets it.
        flags: status flags that are not compared; the rest of the guest is.
        spares: names of differences that do not count; others do.
    """

    name: str
    reason: str
    applies: "Callable[[Seen], bool]"
    flags: int = 0
    spares: frozenset[str] = frozenset()


EXPLAINED = (
    Explanation(
        "segment",
        "Unicorn checks neither the limit nor the type of a segment in 16- and 32-bit code: an"
        " access a processor refuses with #GP or #SS happens. docs/differences.md says so.",
        _outside_segment,
    ),
    Explanation(
        "code limit",
        "For the same reason a branch may leave its code segment.",
        _branches_out,
    ),
    Explanation(
        "SSE alignment",
        "Unicorn does not check that 16-byte operands of SSE instructions are aligned (#GP).",
        _misaligned_sse,
    ),
    Explanation(
        "x87",
        "Unicorn does not notice an empty or full register stack.",
        _x87_shows,
    ),
    Explanation(
        "LAR",
        "Bits 16 to 19 of what LAR loads are undefined (SDM volume 2A).",
        lambda seen: seen.found.opcode == 0x0F02,
    ),
    Explanation(
        "LAHF with REX",
        "Unicorn writes SPL instead of AH.",
        lambda seen: seen.found.opcode in {0x9E, 0x9F} and bool(seen.found.rex),
    ),
    Explanation(
        "TEST /1",
        "F6 /1 and F7 /1 are TEST on processors, undocumented, and #UD in Unicorn.",
        lambda seen: seen.found.opcode in {0xF6, 0xF7} and seen.found.modrm & 0x38 == 8,
    ),
    Explanation(
        "far pointer with REX.W",
        "LSS, LFS and LGS load 64-bit offsets on Intel's processors, and 32-bit ones on AMD's, as"
        " Unicorn does.",
        lambda seen: seen.found.opcode in {0x0FB2, 0x0FB4, 0x0FB5} and bool(seen.found.rex & 8),
    ),
    Explanation(
        "segment register with REX.R",
        "Bochs raises #UD; Unicorn and AMD's manual ignore the bit.",
        lambda seen: seen.found.opcode in {0x8C, 0x8E} and bool(seen.found.rex & 4),
    ),
    Explanation(
        "MOVBE of 16 bits",
        "Unicorn takes 32 bits in 16-bit code.",
        lambda seen: seen.found.opcode in {0x0F38F0, 0x0F38F1} and seen.mode == 16,
    ),
    Explanation(
        "near branch with 0x66",
        "In 64-bit code Intel's processors and Bochs ignore the prefix, AMD's and Unicorn do not.",
        lambda seen: (
            seen.mode == 64 and seen.found.opcode in NEAR | {0x9A} and b"\x66" in seen.found.code
        ),
    ),
    Explanation(
        "branch to where no address is",
        "Unicorn takes the branch and faults at its target, Bochs faults at the branch.",
        _not_canonical_target,
    ),
    Explanation(
        "order of accesses",
        "Which half of a far pointer, which word of a frame, which operand of CMPS, which register"
        " of PUSHA and POPA comes first is seen in CR2 only.",
        lambda seen: (
            seen.found.opcode
            in {0x60, 0x61, 0xC4, 0xC5, 0x0FB2, 0x0FB4, 0x0FB5, 0xCA, 0xCB, 0xCF, 0xA6, 0xA7}
            or (seen.found.opcode == 0xFF and seen.found.modrm & 0x38 in {0x18, 0x28})
        ),
        spares=frozenset({"cr2"}),
    ),
    Explanation(
        "CMPS with two faults",
        "For the same reason one engine may see #PF of one operand and the other #GP or #AC of the"
        " other.",
        lambda seen: (
            seen.found.opcode in {0xA6, 0xA7}
            and (
                bool(seen.flags & AC)
                or (
                    seen.mode == 64
                    and any((seen.general[n] >> 47) not in {0, (1 << 17) - 1} for n in (6, 7))
                )
            )
        ),
    ),
    Explanation(
        "SGDT and SIDT that fault half-way",
        "Unicorn has stored the limit when the base turns out not to be aligned.",
        lambda seen: (
            seen.found.opcode == 0x0F01
            and seen.found.operand is not None
            and seen.found.modrm & 0x30 == 0
            and bool(seen.flags & AC)
        ),
    ),
    Explanation(
        "RET that drops more than 32767 bytes",
        "Unicorn takes the number as signed.",
        lambda seen: seen.found.opcode in {0xC2, 0xCA} and seen.found.immediate > 0x7FFF,
    ),
    Explanation(
        "ENTER with levels",
        "Unicorn and Bochs check its accesses in another order.",
        lambda seen: seen.found.opcode == 0xC8,
    ),
    Explanation(
        "SMSW of 32 bits",
        "The upper half is undefined (SDM volume 2B).",
        lambda seen: seen.found.opcode == 0x0F01 and seen.found.modrm & 0xF8 == 0xE0,
    ),
    Explanation(
        "BSF and BSR of zero",
        "The destination is undefined (SDM volume 2A).",
        _zero_source,
    ),
    Explanation(
        "two mandatory prefixes",
        "The manuals do not say which of 0x66, 0xF2 and 0xF3 counts before an SSE opcode, MOVBE or"
        " CRC32.",
        lambda seen: (
            seen.found.opcode in SSE | MOVBE
            and len({0x66, 0xF2, 0xF3}.intersection(seen.found.code.partition(b"\x0f")[0])) > 1
        ),
    ),
    Explanation(
        "MOV of an immediate with REX.R",
        "Unicorn takes the bit for part of the opcode: #UD.",
        lambda seen: seen.found.opcode in {0xC6, 0xC7, 0x8F} and bool(seen.found.rex & 4),
    ),
    Explanation(
        "INT n with a prefix",
        "If its gate faults, the frame has the address behind the prefix: Unicorn does not tell"
        " where the instruction began.",
        lambda seen: (
            seen.found.opcode in {0xCC, 0xCD, 0xCE}
            and seen.found.length > (2 if seen.found.opcode == 0xCD else 1)
        ),
    ),
    Explanation(
        "segment registers on the stack",
        "Processors read and write 16 bits of the slot (SDM volume 2B, PUSH), Unicorn all of it.",
        lambda seen: (
            (seen.found.opcode in SAVES_SEGMENT and seen.found.bits > 16 and seen.mode != 64)
            or (seen.found.opcode in LOADS_SEGMENT and bool(seen.flags & AC))
        ),
    ),
    Explanation(
        "null SS of another ring",
        "Unicorn does not look at the RPL of a null selector (``helper_load_seg``); processors"
        " raise #GP unless it is CPL.",
        lambda seen: (
            seen.mode == 64
            and seen.found.opcode == 0x8E
            and seen.found.modrm & 0x38 == 0x10
            and (seen.found.operand is not None or not seen.general[seen.found.rm] & 0xFFFC)
        ),
    ),
    Explanation(
        "CR0.EM and CR0.TS at once",
        "SSE instructions are #UD on processors, #NM in Unicorn, which looks at TS first.",
        lambda seen: seen.found.opcode > 0xFF and seen.cr0 & 0xC == 0xC,
    ),
    Explanation(
        "LTR of a null selector",
        "Unicorn takes it (``helper_ltr``), processors raise #GP.",
        lambda seen: (
            seen.found.opcode == 0x0F00
            and seen.found.modrm & 0x38 == 0x18
            and (seen.found.operand is not None or not seen.general[seen.found.rm] & 0xFFFC)
        ),
    ),
    Explanation(
        "tables at no address",
        "LGDT and LIDT refuse a base that is not canonical; Unicorn takes it.",
        lambda seen: seen.found.opcode == 0x0F01 and seen.found.modrm & 0x38 in {0x10, 0x18},
    ),
    Explanation(
        "groups without a meaning",
        "0F BA /0 to /3, FE /2 to /7 and FF /7 are #UD before their operand is read; Unicorn reads"
        " first.",
        lambda seen: (
            (seen.found.opcode == 0x0FBA and seen.found.modrm & 0x38 < 0x20)
            or (seen.found.opcode == 0xFE and seen.found.modrm & 0x38 > 8)
            or (seen.found.opcode == 0xFF and seen.found.modrm & 0x38 == 0x38)
        ),
    ),
    Explanation(
        "LEAVE of 16 bits in 64-bit code",
        "Bochs has none.",
        lambda seen: seen.found.opcode == 0xC9 and seen.mode == 64 and seen.found.bits == 16,
    ),
    Explanation(
        "page tables where no memory is",
        "As KVM says, they map nothing; the second engine stops at them.",
        lambda seen: seen.found.opcode == 0x0F22 and seen.found.reg == 3,
    ),
    Explanation(
        "TF and AC at once",
        "The instruction behind a POPF that sets both is not checked for alignment.",
        lambda seen: seen.flags & TF_AND_AC == TF_AND_AC,
    ),
    Explanation(
        "prefetch of a register",
        "0F 0D and 0F 18 with a register are no-ops in Bochs and on processors, #UD in Unicorn.",
        lambda seen: seen.found.opcode in {0x0F0D, 0x0F18} and seen.found.operand is None,
    ),
    Explanation(
        "string input that faults",
        "The second engine is stopped in front of ports: it dies of them.",
        lambda seen: seen.found.opcode in STRING_PORTS,
    ),
    Explanation(
        "CMPXCHG of 32-bit registers",
        "Whether the upper half of the destination is cleared when they are not equal, the manuals"
        " do not say. Unicorn clears it, Bochs does not.",
        lambda seen: (
            seen.found.opcode == 0x0FB1
            and seen.found.operand is None
            and seen.found.bits == 32
            and seen.mode == 64
        ),
    ),
    Explanation(
        "SHLD and SHRD relative to RIP",
        "Unicorn counts from the immediate byte instead of from the next instruction.",
        lambda seen: (
            seen.found.opcode in {0x0FA4, 0x0FAC}
            and seen.found.operand is not None
            and seen.found.operand.base == d.RIP
        ),
    ),
    Explanation(
        "flags of LOCK NEG",
        "Unicorn computes them from the operand as it was before.",
        lambda seen: (
            seen.found.opcode in {0xF6, 0xF7}
            and seen.found.modrm & 0x38 == 0x18
            and bool(seen.found.locked)
        ),
        flags=STATUS,
    ),
    Explanation(
        "reserved bits of CR0",
        "Unicorn keeps them, a processor does not.",
        lambda seen: seen.found.opcode == 0x0F22 and seen.found.reg == 0,
    ),
)


#: All of them are #UD here, and CPUID shows none; Bochs has BMI1, BMI2 and more.
VEX = "VEX"


def explanations_of_bytes(code, mode):
    """The same of bytes that are no instruction to the engine's decoder."""
    code = code.lstrip(bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3)))
    if mode == 64 and code[:1] and code[0] & 0xF0 == 0x40:
        code = code[1:]
    return [VEX] if code[:1] in {b"\xc4", b"\xc5", b"\x62"} else []


def explanations(seen):
    """The known differences an instruction may meet."""
    return [known for known in EXPLAINED if known.applies(seen)]
