"""The number grammar of spec 0.3, on the tables of spec A.4 and F.3."""

import errno

import pytest

from cgfs.core.parse import (
    U32_MAX,
    U64_MAX,
    parse_limit,
    parse_s32,
    parse_unsigned,
    show_limit,
    strip,
    until_nul,
)
from cgfs.errors import CgroupError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0),
        (b"5", 5),
        (b"5\n", 5),
        (b"+5", 5),
        (b"0x10", 16),
        (b"0X10", 16),
        (b"020", 16),
        (b"010", 8),
        (b"007", 7),
        (b"+0x5", 5),
        (b"4294967294", 4294967294),
        (b"0xffffffff", U32_MAX),
        (b"037777777777", U32_MAX),
    ],
)
def test_parse_unsigned_accepts_the_kernel_grammar(text, value):
    assert parse_unsigned(text, U32_MAX) == value


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"4294967296", "ERANGE"),
        (b"0x100000000", "ERANGE"),
        (b"18446744073709551615", "ERANGE"),
        (b"18446744073709551616", "ERANGE"),
        (b"99999999999999999999999", "ERANGE"),
        (b"18446744073709551616x", "ERANGE"),
        (b"4294967296x", "EINVAL"),
        (b"-1", "EINVAL"),
        (b"-0", "EINVAL"),
        (b"", "EINVAL"),
        (b"\n", "EINVAL"),
        (b"+", "EINVAL"),
        (b"++5", "EINVAL"),
        (b"+-5", "EINVAL"),
        (b"0x", "EINVAL"),
        (b"0xg", "EINVAL"),
        (b"0x+5", "EINVAL"),
        (b"0b1", "EINVAL"),
        (b"08", "EINVAL"),
        (b"5k", "EINVAL"),
        (b"5.0", "EINVAL"),
        (b"1e3", "EINVAL"),
        (b"1 2", "EINVAL"),
        (b"5\n6", "EINVAL"),
        (b"5\n\n", "EINVAL"),
        (b"1_000", "EINVAL"),
        ("\uff15".encode(), "EINVAL"),
        (b"abc", "EINVAL"),
    ],
)
def test_parse_unsigned_refuses_with_the_kernel_errno(text, name):
    with pytest.raises(CgroupError) as caught:
        parse_unsigned(text, U32_MAX)
    assert errno.errorcode[caught.value.errno] == name


def test_parse_unsigned_reaches_the_largest_u64():
    assert parse_unsigned(b"18446744073709551615", U64_MAX) == U64_MAX


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"-0", 0),
        (b"-5", -5),
        (b"-0x10", -16),
        (b"2147483647", 2147483647),
        (b"-2147483648", -2147483648),
    ],
)
def test_parse_s32_accepts_a_sign(text, value):
    assert parse_s32(text) == value


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"2147483648", "ERANGE"),
        (b"-2147483649", "ERANGE"),
        (b"99999999999999999999", "ERANGE"),
        (b"-+5", "EINVAL"),
        (b"+-5", "EINVAL"),
        (b"--5", "EINVAL"),
        (b"-", "EINVAL"),
    ],
)
def test_parse_s32_refuses_with_the_kernel_errno(text, name):
    with pytest.raises(CgroupError) as caught:
        parse_s32(text)
    assert errno.errorcode[caught.value.errno] == name


def test_strip_counts_the_latin_1_space():
    assert strip(b"\t\n\v\f\r \xa05 6\xa0") == b"5 6"


def test_strip_keeps_other_control_bytes():
    assert strip(b"\x1c5\x85") == b"\x1c5\x85"


def test_until_nul_drops_what_follows():
    assert until_nul(b"5\0junk") == b"5"


def test_parse_limit_takes_max_for_the_largest_value():
    assert parse_limit(b"max", U32_MAX) == U32_MAX


def test_show_limit_inverts_it():
    assert (show_limit(U32_MAX, U32_MAX), show_limit(7, U32_MAX)) == ("max", "7")
