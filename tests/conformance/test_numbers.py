"""The number grammar of 0.2 and 0.3: the same random texts written in both worlds."""

import hashlib
import os
import random

import pytest
from conformance.calls import attempt, opened, read, write

SEED = 20201208
ALPHABET = [
    b"0", b"0", b"1", b"1", b"2", b"5", b"7", b"8", b"9", b"a", b"f", b"g", b"x", b"X", b"0x",
    b"0X", b"+", b"-", b" ", b"\n", b"\t", b"\r", b"\x0b", b"\x0c", b"\xa0", b"\x85", b"\0",
    b"max", b"m", b"_", b".", b"e", b"4294967295", b"2147483647", b"2147483648",
    b"18446744073709551615", b"18446744073709551616", b"777", b"\xff", b"\xc2\xa0",
]  # fmt: skip


def texts(count):
    """Random texts, half of them near-numbers."""
    chance = random.Random(SEED)
    for _ in range(count):
        parts = chance.choices(ALPHABET, k=chance.randint(0, 6))
        if chance.random() < 0.5:
            parts = [chance.choice([b"", b"", b"+", b"-", b" ", b"\n"]), *parts[:2]]
            parts += [str(chance.randrange(3 ** chance.randint(0, 45))).encode()]
            parts += chance.choices([b"", b"", b"\n", b" ", b"x", b"\0z"], k=1)
        yield b"".join(parts)


def answers(path, count, reset):
    """What each text does: its errno or count, and what the file then shows."""
    given = []
    with opened(path, os.O_WRONLY) as fd:
        for text in texts(count):
            os.write(fd, reset)
            given.append([text, attempt(os.write, fd, text), read(path)])
    return given


@pytest.mark.parametrize(
    ("name", "reset"),
    [("cgroup.max.depth", b"77"), ("cgroup.max.descendants", b"max"), ("cgroup.freeze", b"0")],
)
def test_random_texts_get_the_same_answers(d, observe, name, reset):
    given = answers(d / name, 2000, reset)
    accepted = {
        text.decode("latin-1"): shown for text, answer, shown in given if answer == len(text)
    }
    # The refused ones are kept as a digest, which keeps the golden file readable.
    observe("accepted", accepted)
    for kind in ("EINVAL", "ERANGE"):
        refused = [text for text, answer, _ in given if answer == kind]
        digest = hashlib.sha256(b"\n".join(refused)).hexdigest()
        observe(kind, [len(refused), digest])
    observe("refused ones kept the value", kept(given, reset), True)


def kept(given, reset):
    return all(shown == reset + b"\n" for _, answer, shown in given if isinstance(answer, str))


@pytest.mark.parametrize("space", [*range(1, 0x30), 0x7F, 0x80, 0x85, 0xA0, 0xAD, 0xFF])
def test_white_space_is_seven_bytes(d, observe, space):
    blank = space in {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0xA0}
    sign = space in b"+-"
    f = d / "cgroup.max.depth"
    observe("before", write(f, bytes([space]) + b"0"), 2 if blank or sign else "EINVAL")
    observe("after", write(f, b"0" + bytes([space])), 2 if blank else "EINVAL")
