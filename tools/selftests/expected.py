"""What every selftest is expected to come to, and why where that is not a pass."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DEFAULT_TIMEOUT_S = 30
DEFAULT_PRESET = "milan509-es99"


class Expect(StrEnum):
    """What a test comes to; OMIT: it is not started at all."""

    PASS = "pass"
    SKIP = "skip"
    FAIL = "fail"
    OMIT = "omit"


@dataclass(frozen=True)
class Entry:
    """One test of the list.

    Attributes:
        expect: What it comes to on the emulated host.
        why: The reason, where that is not a pass.
        quick: Whether CI runs it.
        timeout_s: Seconds after which it counts as failed.
        preset: The machine it runs on, unless asked otherwise.
    """

    expect: Expect
    why: str = ""
    quick: bool = False
    timeout_s: int = DEFAULT_TIMEOUT_S
    preset: str = DEFAULT_PRESET


class ListError(ValueError):
    """The list of expected results is wrong; the text names the test and the key."""


def load(path: Path) -> dict[str, Entry]:
    """Reads the list.

    Raises:
        ListError: Something in it is unknown, of the wrong type, or lacks its reason.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ListError(f"{path.name}: {error}") from error
    return {name: _entry(name, table) for name, table in tables.items()}


def _entry(name: str, table: object) -> Entry:
    if not isinstance(table, dict):
        raise ListError(f"{name}: not a table")
    types = {"expect": str, "why": str, "quick": bool, "timeout_s": int, "preset": str}
    for key, value in table.items():
        if key not in types:
            raise ListError(f"{name}: unknown key {key!r}")
        if type(value) is not types[key]:
            raise ListError(f"{name}: {key} is not {types[key].__name__}")
    try:
        expect = Expect(table["expect"])
    except (KeyError, ValueError):
        raise ListError(f"{name}: expect is one of {', '.join(Expect)}") from None
    entry = Entry(**{**table, "expect": expect})
    if (expect is Expect.PASS) == bool(entry.why):
        raise ListError(f"{name}: `why` belongs to everything but a pass")
    if entry.quick and expect is Expect.OMIT:
        raise ListError(f"{name}: what is omitted cannot be quick")
    return entry


def wanted(
    built: Sequence[str], listed: Mapping[str, Entry], *, quick: bool, only: Sequence[str] | None
) -> list[str]:
    """Returns the tests to run, of those that are built.

    Raises:
        ListError: A name that was asked for is not among them.
    """
    if only:
        if unknown := sorted(set(only) - set(built)):
            raise ListError(f"no such selftest: {', '.join(unknown)}")
        return list(only)
    if quick:
        return [name for name in built if name in listed and listed[name].quick]
    return [name for name in built if name not in listed or listed[name].expect is not Expect.OMIT]


def deviation(entry: Entry, result: Expect, left: str) -> str:
    """Returns what is not as expected; empty if all is.

    Args:
        entry: What the list says.
        result: What the test came to.
        left: What it left charged on the host.
    """
    if left:
        return f"left behind: {left}"
    if entry.expect is Expect.OMIT or result is entry.expect:
        return ""
    return f"expected {entry.expect}"
