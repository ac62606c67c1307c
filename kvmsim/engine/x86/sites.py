"""Sites: the instructions at which the engine looks up, and where their memory is.

A block of code is decoded once, when the emulator has translated it. Most blocks hold no
instruction of interest and are dismissed by a search over their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import plain_code, vex, xsave
from kvmsim.engine.x86.registers import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Set

    Watch = Callable[[memoryview, "Site", Callable[["Site"], None]], Callable[[], None]]

LINE = 64
CR8 = 8
#: POPF, IRET, STI.
RESTORE_FLAGS = frozenset({0x9D, 0xCF, 0xFB})
NOP, REX_B = 0x90, 1
_U32 = (1 << 32) - 1


class Kind(Enum):
    """What the engine does at a site."""

    LOCK = auto()  # looks whether it is a bus lock
    SENSITIVE = auto()  # executes the instruction itself
    UNDEFINED = auto()  # raises #UD
    WINDOW = auto()  # may let interrupts in
    MAPPING = auto()  # changes address translation
    SYSTEM_STATE = auto()  # shows it, unless CR4.UMIP forbids that
    DESCRIPTOR = auto()  # may lock a descriptor
    PAUSE = auto()  # lets other vCPUs execute
    FLAGS = auto()  # has the emulator settle its lazy flags
    NEXT = auto()  # nothing: a bus lock may just have been taken before it


@dataclass(slots=True)
class Site:
    """One instruction at one linear address.

    Attributes:
        address: linear address.
        kind: why it is here.
        found: the instruction.
        mode: of the code segment: 16, 32 or 64.
        locate: linear address of its locked operand, from the registers as 64-bit words; None
            without one, and where the address holds different code in different address spaces.
        watch: makes a callback of ``look`` (called with the site) that is only called when the
            operand may be a bus lock; None without an operand.
        calm: pages of write-back memory, in which a lock within a cache line is none; empty where
            every execution is to be looked at.
        room: greatest offset into a cache line at which the operand does not cross into the next.
        ambiguous: the address holds different code at times; look again.
        exchanges_pairs: see the function.
    """

    address: int
    kind: Kind
    found: d.Instruction | None = None
    mode: int = 64
    locate: Callable[[memoryview], int] | None = None
    watch: Watch | None = None
    calm: Set[int] = field(default_factory=frozenset)
    room: int = 0
    ambiguous: bool = False
    exchanges_pairs: bool = field(init=False)

    @property
    def size(self) -> int:
        """Bytes of its locked access."""
        return LINE - self.room

    @property
    def following(self) -> int:
        """Linear address of the instruction behind it."""
        found = self.found
        return self.address if found is None else self.address + len(found.code)

    def __post_init__(self) -> None:
        self.exchanges_pairs = self.found is not None and exchanges_pairs(self.found)


def kind_of(found: d.Instruction) -> Kind | None:
    """Why an instruction is of interest; None: it is not."""
    if _does_not_exist(found):
        return Kind.UNDEFINED
    if d.is_locked_access(found):
        return Kind.LOCK
    control = found.opcode in {0x0F20, 0x0F22} and found.reg != CR8
    engines = d.is_sensitive(found) or xsave.is_one(found) or vex.is_move(found)
    if engines and not control:
        return Kind.SENSITIVE
    if (control and found.opcode == 0x0F22) or _is_invlpg(found):
        return Kind.MAPPING
    return _kind_of_rare(found)


def _kind_of_rare(found: d.Instruction) -> Kind | None:
    if d.shows_system_state(found):
        return Kind.SYSTEM_STATE
    if d.loads_descriptor(found):
        return Kind.DESCRIPTOR
    if found.opcode in RESTORE_FLAGS:
        return Kind.WINDOW
    if found.opcode == NOP and found.repeat == d.REP and not found.rex & REX_B:
        return Kind.PAUSE
    return Kind.FLAGS if exchanges_pairs(found) else None


def _does_not_exist(found: d.Instruction) -> bool:
    if found.opcode >= d.VEX:
        return not vex.is_move(found)
    return d.is_undefined(found) or (found.locked and not d.is_lockable(found))


def exchanges_pairs(found: d.Instruction) -> bool:
    """Whether it is CMPXCHG8B or CMPXCHG16B.

    The emulator computes their flags from ``cc_op``, which the translated code has not stored when
    an instruction before them in their block changed it (Unicorn 2.1.4, ``translate.c``).
    """
    return found.opcode == 0x0FC7 and found.operand is not None and found.modrm >> 3 & 7 == 1


def _is_invlpg(found: d.Instruction) -> bool:
    return found.opcode == 0x0F01 and found.operand is not None and found.modrm >> 3 & 7 == 7


def sites_in(code: bytes, address: int, mode: int, size: int | None = None) -> Iterator[Site]:
    """The sites of a block of code.

    Args:
        code: its bytes, and what follows: the emulator does not read an instruction to its end
            when it knows before that it will fault.
        address: its linear address.
        mode: 16, 32 or 64.
        size: of the block, if ``code`` is more.
    """
    at, end = 0, len(code) if size is None else size
    while at < end:
        if mode == 64 and (at := plain_code.end(code, at)) >= end:
            return
        found = d.decode(code, at, mode)
        if found is None:
            return
        kind = kind_of(found)
        if kind is not None:
            yield make(address + at, kind, found, mode)
        if found.opcode >= d.VEX and kind is Kind.UNDEFINED:
            return  # its length is not known, and nobody gets past it
        at += found.length


def make(address: int, kind: Kind, found: d.Instruction, mode: int) -> Site:
    """A site, with the functions that locate its operand."""
    site = Site(address, kind, found, mode)
    if kind is Kind.LOCK:
        site.room = LINE - d.locked_bytes(found)
        text = _location(site.following, found, mode)
        site.locate = _compiled(f"lambda q:{text}")
        site.watch = _compiled(
            "lambda q,site,look:lambda:None if (at:="
            f"{text})&63<={site.room} and at>>12 in site.calm else look(site)"
        )
    return site


def operand_address(address: int, found: d.Instruction, mode: int, q: memoryview) -> int | None:
    """Linear address of the operand of any instruction, from the registers; None without one."""
    if found.operand is None:
        return None
    text = _location(address + len(found.code), found, mode)
    place: int = _compiled(f"lambda q:{text}")(q)
    return place


def _compiled(text: str) -> Any:  # noqa: ANN401 - two kinds of functions
    """A function called at every execution of an instruction; its text is made of numbers."""
    return eval(text, {"__builtins__": {}})  # noqa: S307, RUF100


def _location(following: int, found: d.Instruction, mode: int) -> str:
    """Linear address of an operand as an expression.

    Register n is word n of the emulator's state ``q``, and the base of segment n is where
    ``registers`` says.
    """
    operand = found.operand
    assert operand is not None
    terms = [f"{operand.disp}"]
    if operand.base == d.RIP:
        terms = [f"{following + operand.disp}"]
    elif operand.base != d.NONE:
        terms.append(f"q[{operand.base}]")
    if operand.index != d.NONE:
        terms.append(f"q[{operand.index}]*{operand.scale}")
    if found.opcode in d.BIT_STRINGS:
        terms.append(_bit_string(found))
    terms = [term for term in terms if term != "0"] or ["0"]
    offset = f"({'+'.join(terms)})&{(1 << operand.address_bits) - 1:#x}"
    base = f"q[{(SEGMENTS + 24 * operand.segment + 8) // 8}]"
    if mode != 64:
        return f"((({offset})+{base})&{_U32:#x})"
    if operand.segment in {d.FS, d.GS}:
        return f"((({offset})+{base})&{(1 << 64) - 1:#x})"
    return f"({offset})"


def _bit_string(found: d.Instruction) -> str:
    """BTS and its like with a register as bit number: whole operands to go, signed."""
    bits = found.bits
    shift = bits.bit_length() - 1
    sign = 1 << (bits - 1)
    value = f"(((q[{found.reg}]&{(1 << bits) - 1:#x})^{sign:#x})-{sign:#x})"
    return f"({value}>>{shift})*{bits // 8}"
