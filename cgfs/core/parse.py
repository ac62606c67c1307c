"""Text of control files to values: the grammar of ``kstrto*()`` and ``strstrip()``.

Linux 6.12 lib/kstrtox.c and lib/string_helpers.c. The order in which a text is judged decides
its errno: overflow of 64 bits first, then "no digits", then garbage behind the digits, then the
range of the target type.
"""

from __future__ import annotations

from errno import EINVAL, ERANGE

from cgfs.errors import CgroupError

# The kernel's ctype table counts the no-break space of Latin-1 as white space.
WHITE_SPACE = b"\t\n\v\f\r \xa0"

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1
S32_MAX = 2**31 - 1
S32_MIN = -(2**31)

_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


def strip(text: bytes) -> bytes:
    """Remove white space from both ends, as ``strstrip()`` does."""
    return text.strip(WHITE_SPACE)


def until_nul(data: bytes) -> bytes:
    """The text of a write: everything before the first NUL byte."""
    return data.partition(b"\0")[0]


def _digits(text: bytes) -> int:
    base, start = 10, 0
    if text[:1] == b"0":
        base = 8
        if text[1:2] in (b"x", b"X") and text[2:3] and text[2] in _HEX_DIGITS:
            base, start = 16, 2
    value, index = 0, start
    for byte in text[start:]:
        if byte not in _HEX_DIGITS or (digit := int(chr(byte), 16)) >= base:
            break
        value = value * base + digit
        if value > U64_MAX:
            raise CgroupError(ERANGE)
        index += 1
    if index == start:
        raise CgroupError(EINVAL)
    if text[index:] not in (b"", b"\n"):
        raise CgroupError(EINVAL)
    return value


def parse_unsigned(text: bytes, largest: int) -> int:
    """Parse an unsigned number.

    Args:
        text: what was written, already stripped where the file strips.
        largest: ``U32_MAX`` or ``U64_MAX``.

    Raises:
        CgroupError: EINVAL for bad syntax, ERANGE for a value above ``largest``.
    """
    value = _digits(text.removeprefix(b"+"))
    if value > largest:
        raise CgroupError(ERANGE)
    return value


def parse_s32(text: bytes) -> int:
    """Parse a signed 32-bit number, as ``kstrtoint()`` does.

    Raises:
        CgroupError: EINVAL for bad syntax, ERANGE outside -2^31 .. 2^31-1.
    """
    value = -_digits(text[1:]) if text[:1] == b"-" else _digits(text.removeprefix(b"+"))
    if not S32_MIN <= value <= S32_MAX:
        raise CgroupError(ERANGE)
    return value


def parse_limit(text: bytes, largest: int) -> int:
    """Parse ``max`` or an unsigned number; ``largest`` itself stands for ``max``.

    Raises:
        CgroupError: EINVAL or ERANGE.
    """
    return largest if text == b"max" else parse_unsigned(text, largest)


def show_limit(value: int, largest: int) -> str:
    """The inverse of :func:`parse_limit`, without a newline."""
    return "max" if value == largest else str(value)
