"""Instructions that are nothing to the engine, skipped many at a time.

Nearly all code is moves, arithmetic, comparisons, near branches and calls. One regular expression
knows how long these are in 64-bit mode, and runs over a block in the time the decoder takes for a
single instruction. What it does not know it leaves to the decoder, so it errs on one side only.

Source: Intel SDM volume 2, chapter 2 and appendix A.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


def _any_of(values: Iterable[int]) -> bytes:
    """One byte out of several."""
    return b"[" + b"".join(b"\\x%02x" % value for value in sorted(values)) + b"]"


def _modrm(fields: Iterable[int] = range(8)) -> bytes:
    """ModRM with one of these reg fields, SIB and displacement."""
    regs = tuple(fields)

    def forms(mod: int, numbers: Iterable[int]) -> bytes:
        return _any_of(mod << 6 | reg << 3 | rm for rm in numbers for reg in regs)

    plain = (0, 1, 2, 3, 5, 6, 7)
    no_base = _any_of(sib for sib in range(256) if sib & 7 == 5)
    based = _any_of(sib for sib in range(256) if sib & 7 != 5)
    return (
        b"(?:"
        + b"|".join(
            (
                forms(3, range(8)),
                forms(0, (0, 1, 2, 3, 6, 7)),
                forms(0, (4,)) + b"(?:" + based + b"|" + no_base + b".{4})",
                forms(0, (5,)) + b".{4}",
                forms(1, plain) + b".",
                forms(1, (4,)) + b"..",
                forms(2, plain) + b".{4}",
                forms(2, (4,)) + b".{5}",
            )
        )
        + b")"
    )


def _plain() -> bytes:
    arithmetic = range(0, 0x40, 8)
    with_modrm = {op + low for op in arithmetic for low in range(4)}
    with_modrm |= {0x63, 0x84, 0x85, *range(0x88, 0x8C), 0x8D, *range(0xD0, 0xD4)}
    with_byte = {op + 4 for op in arithmetic} | {0x6A, *range(0x70, 0x80), 0xA8, 0xEB}
    with_byte |= set(range(0xB0, 0xB8))
    with_word = {op + 5 for op in arithmetic} | {0x68, 0xA9, 0xE8, 0xE9}
    alone = {*range(0x50, 0x60), 0x90, 0x98, 0x99, 0xC3, 0xC9}
    # CMOV, SETcc, BT, SHLD, SHRD, IMUL, CMPXCHG, MOVZX, MOVSX, BSF, BSR, XADD, NOP; MOVUPS, MOVAPS.
    two = {0x1F, *range(0x40, 0x50), *range(0x90, 0xA0), 0xA3, 0xA5, 0xAB, 0xAD, 0xAF, 0xB0, 0xB1}
    two |= {0xB3, 0xB6, 0xB7, 0xBB, 0xBC, 0xBD, 0xBE, 0xBF, 0xC0, 0xC1, 0x10, 0x11, 0x28, 0x29}
    any_modrm = _modrm()
    unprefixed = (
        _any_of(with_modrm) + any_modrm,
        b"[\\xf6\\xf7]" + _modrm(range(2, 8)),
        b"\\xf6" + _modrm((0,)) + b".",
        b"\\xf7" + _modrm((0,)) + b".{4}",
        b"\\xfe" + _modrm((0, 1)),
        b"\\xff" + _modrm((0, 1, 2, 4, 6)),
        b"[\\x6b\\x80\\x83\\xc0\\xc1]" + any_modrm + b".",
        b"\\xc6" + _modrm((0,)) + b".",
        b"[\\x69\\x81]" + any_modrm + b".{4}",
        b"\\xc7" + _modrm((0,)) + b".{4}",
        _any_of(alone),
        _any_of(with_byte) + b".",
        _any_of(with_word) + b".{4}",
        b"\\x0f(?:" + _any_of(two) + any_modrm,
        b"[\\x80-\\x8f].{4}",
        b"[\\xa4\\xac]" + any_modrm + b".",
        b"\\xba" + _modrm(range(4, 8)) + b".)",
    )
    rex_or_not = b"[\\x64\\x65]?+(?:[\\x40-\\x4f]?+(?:" + b"|".join(unprefixed) + b")"
    moves = b"[\\x40-\\x47]?+[\\xb8-\\xbf].{4}|[\\x48-\\x4f][\\xb8-\\xbf].{8})"
    # 16-bit moves and comparisons, NOPs of any length, ENDBR64.
    narrow = b"\\x66(?:[\\x40-\\x4f]?+" + _any_of(with_modrm) + any_modrm
    narrow += b"|\\x2e?\\x0f\\x1f" + any_modrm + b"|\\x90)"
    return b"(?:" + rex_or_not + b"|" + moves + b"|" + narrow + b"|\\xf3\\x0f\\x1e\\xfa)*+"


_PLAIN: Final = re.compile(_plain(), re.DOTALL)


def end(code: bytes, at: int) -> int:
    """Where the first instruction begins that may be of interest; 64-bit mode.

    Args:
        code: machine code.
        at: where an instruction begins.
    """
    found = _PLAIN.match(code, at)
    return at if found is None else found.end()
