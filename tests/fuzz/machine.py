"""What a fuzzed guest looks like before it begins and after it has ended.

Memory is 256 KiB. Every vector leads to a HLT of its own, wherever there is no code or data there
are HLTs, and descriptors, page tables and stacks are in order: whatever the code does, it ends
soon, and where it ends says how.
"""

import random
from dataclasses import dataclass, field

PAGE = 4096
RAM_BYTES = 0x40000
CODE, GDT, IDT, TSS, STACK, DATA = 0x1000, 0x3000, 0x4000, 0x5000, 0x7800, 0x8000
INNER, IST = 0x6800, 0x6400
INNER_STACKS = 0x6000
HANDLERS = 0x2000
TABLES = 0x10000
HLT = b"\xf4"
#: The second engine computes flags when they are used: each end uses them.
PUSHF = b"\x9c"

#: Descriptor rights, bits 8 to 23 of the upper half.
CODE_16, DATA_16 = 0x9B00, 0x9300
CODE_32, DATA_32, CODE_64 = 0xC09B00, 0xC09300, 0xA09B00
TSS_32, LDT = 0x8B00, 0x8200
RING_3 = 3 << 13
U32 = 0xFFFF_FFFF

MODES = ("real", "protected", "protected-3", "long", "long-3", "compatible-3")
#: IST 1 serves every second vector in long mode.
GATES = 32


@dataclass
class Case:
    """One guest.

    Attributes:
        mode: one of ``MODES``.
        code: its instructions; a HLT follows.
        general: RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
        flags: RFLAGS.
        seed: of the bytes in its data pages.
    """

    mode: str
    code: bytes
    general: list[int]
    flags: int
    seed: int

    @property
    def ring(self):
        return 3 if self.mode.endswith("3") else 0

    @property
    def bits(self):
        return {"real": 16, "long": 64, "long-3": 64}.get(self.mode, 32)

    @property
    def is_long(self):
        return self.mode.startswith(("long", "compatible"))


@dataclass
class Outcome:
    """How a guest ended.

    Attributes:
        kind: ``hlt``, ``io``, ``mmio``, ``limit``, ``shutdown``, ``error``, or ``skip``: the second
            engine cannot tell.
        detail: whatever helps a person.
        rip: instruction pointer.
        general: as in ``Case``.
        flags: RFLAGS.
        segments: (selector, base, limit, rights) of ES CS SS DS FS GS.
        control: CR0, CR2, CR3, CR4.
        pages: content of the pages that changed.
        undefined: flags the processor leaves undefined after what was executed.
        executed: opcodes executed, as far as the second engine noted them.
        known: names of the explanations that may apply to the whole of it.
        spared: names of differences that are explained.
    """

    kind: str
    detail: str = ""
    rip: int = 0
    general: list[int] = field(default_factory=list)
    flags: int = 0
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    control: list[int] = field(default_factory=list)
    pages: dict[int, bytes] = field(default_factory=dict)
    undefined: int = 0
    executed: list[int] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)


def _put(ram, at, value, size=8):
    ram[at : at + size] = value.to_bytes(size, "little")


def descriptor(rights, limit=0xFFFFF):
    """A segment descriptor with base 0."""
    return (limit & 0xFFFF) | (rights | limit & 0xF0000) << 32


def image(case):
    """The memory a guest begins with."""
    ram = bytearray(HLT * RAM_BYTES)
    # PUSH of a segment register may leave the upper half of its slot as it was.
    ram[INNER_STACKS:DATA] = bytes(DATA - INNER_STACKS)
    ram[DATA : DATA + 2 * PAGE] = random.Random(case.seed).randbytes(2 * PAGE)
    ram[CODE : CODE + len(case.code) + 1] = case.code + PUSHF
    wide = case.is_long
    for vector in range(GATES):
        target = HANDLERS + 8 * vector
        ram[target : target + 1] = PUSHF
        if case.mode == "real":
            _put(ram, vector * 4, target, 4)
            continue
        stack = 1 if wide and vector % 2 else 0
        high = (target & 0xFFFF_0000) | 0x8E00 | (3 << 13 if vector in {3, 4} else 0) | stack
        size = 16 if wide else 8
        ram[IDT + vector * size : IDT + (vector + 1) * size] = bytes(size)
        _put(ram, IDT + vector * size, (target & 0xFFFF) | 8 << 16 | high << 32)
    if case.mode != "real":
        _system(ram, wide=wide)
    return ram


def _system(ram, *, wide):
    ram[GDT : GDT + 0x80] = bytes(0x80)
    kernel = CODE_64 if wide else CODE_32
    table = {1: kernel, 2: DATA_32, 3: kernel | RING_3, 4: DATA_32 | RING_3, 7: CODE_32 | RING_3}
    for at, rights in table.items():
        _put(ram, GDT + 8 * at, descriptor(rights))
    for at, rights in {8: CODE_16, 9: DATA_16, 10: CODE_32 | 1 << 10}.items():
        _put(ram, GDT + 8 * at, descriptor(rights, 0xFFFF))
    _put(ram, GDT + 0x28, 0x67 | (TSS & 0xFFFF) << 16 | TSS_32 << 32)
    ram[TSS : TSS + 0x68] = bytes(0x68)
    _put(ram, TSS + 102, 0x68, 2)
    if wide:
        _put(ram, TSS + 4, INNER)
        _put(ram, TSS + 36, IST)
        for level in range(3):
            ram[TABLES + level * PAGE : TABLES + (level + 1) * PAGE] = bytes(PAGE)
            _put(ram, TABLES + level * PAGE, TABLES + (level + 1) * PAGE | 7)
        for page in range(512):
            entry = page * PAGE | 7 if page < RAM_BYTES // PAGE else 0
            _put(ram, TABLES + 3 * PAGE + page * 8, entry)
    else:
        _put(ram, TSS + 4, INNER | 0x10 << 32)


def registers_of(case):
    """(segments, control, efer, tables): what a guest begins with besides memory and ``Case``.

    Segments: ES CS SS DS FS GS LDTR TR; tables: GDT and IDT as (base, limit).
    """
    if case.mode == "real":
        segments = [(0, 0, 0xFFFF, DATA_16)] * 6
        segments[1] = (0, 0, 0xFFFF, CODE_16)
        system = [(0, 0, 0xFFFF, LDT), (0, 0, 0xFFFF, TSS_32)]
        return segments + system, (0x10, 0, 0, 0), 0, ((0, 0), (0, 0x3FF))
    wide = case.is_long
    code = {"compatible-3": CODE_32, "protected": CODE_32, "protected-3": CODE_32}
    rights = code.get(case.mode, CODE_64)
    selectors = {"compatible-3": (0x3B, 0x23), "protected-3": (0x1B, 0x23), "long-3": (0x1B, 0x23)}
    chosen, data = selectors.get(case.mode, (8, 0x10))
    ring = RING_3 if case.ring else 0
    segments = [(data, 0, U32, DATA_32 | ring)] * 6
    segments[1] = (chosen, 0, U32, rights | ring)
    system = [(0, 0, 0xFFFF, LDT), (0x28, TSS, 0x67, TSS_32)]
    control = (0x8005_0033, 0, TABLES, 0x620) if wide else (0x33, 0, 0, 0x600)
    tables = ((GDT, 0x7F), (IDT, GATES * (16 if wide else 8) - 1))
    return segments + system, control, 0xD01 if wide else 0, tables


def changed_pages(before, after):
    """Pages whose content is another."""
    return {
        at: bytes(after[at : at + PAGE])
        for at in range(0, RAM_BYTES, PAGE)
        if before[at : at + PAGE] != after[at : at + PAGE]
    }
