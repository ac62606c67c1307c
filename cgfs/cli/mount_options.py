"""What ``-o`` of ``cgfs mount`` can say."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cgfs.cli.helper import is_generic
from cgfs.control.errors import CommandError

CONTROLLERS = ("encryption_ids", "misc", "bus_lock")
V1_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
RESOURCE = re.compile(r"[a-z][a-z0-9_]*")
NUMBER = re.compile(r"[0-9]+")
MAX_CAPACITY = 2**32 - 1  # what the kernel's unsigned int of ASIDs can count


@dataclass(slots=True)
class MountOptions:
    """A mount as its user described it.

    ``capacities`` is units by resource (``sev``); ``name``, ``clone_children`` and
    ``release_agent`` are for v1 alone.
    """

    version: int = 2
    controllers: tuple[str, ...] = CONTROLLERS
    capacities: dict[str, int] = field(default_factory=dict)
    name: str = ""
    clone_children: bool = False
    release_agent: str = ""
    allow_other: bool = False
    nonempty: bool = False


def parse_options(options: Iterable[str]) -> MountOptions:
    """Reads the single options of ``-o``.

    Raises:
        CommandError: an option that is not known, or does not go with another (EX_USAGE).
    """
    result = MountOptions()
    chosen: list[str] = []
    v1_only: list[str] = []
    for option in options:
        key, has_value, value = option.partition("=")
        if option in {"v1", "v2"}:
            result.version = int(option[1])
        elif option in CONTROLLERS or option in {"all", "none"}:
            chosen.append(option)
        elif option in {"allow_other", "nonempty"}:
            setattr(result, option, True)
        elif option == "clone_children" or key in {"name", "release_agent"}:
            _set_v1(result, key, value)
            v1_only.append(key)
        elif has_value and RESOURCE.fullmatch(key) and NUMBER.fullmatch(value):
            result.capacities[key] = _capacity(key, value)
        elif not is_generic(option):
            raise _bad(f"unknown option {option!r}")
    if v1_only and result.version != 1:
        raise _bad(f"{v1_only[0]} goes with v1 only")
    result.controllers = _selection(chosen, named=bool(result.name))
    if result.version == 1 and not result.controllers and not result.name:
        raise _bad("v1 without controllers needs name=")
    return result


def _capacity(resource: str, digits: str) -> int:
    # int() refuses thousands of digits with an error of its own.
    if len(digits) > len(str(MAX_CAPACITY)) or int(digits) > MAX_CAPACITY:
        raise _bad(f"{resource}: more than {MAX_CAPACITY}")
    return int(digits)


def _set_v1(result: MountOptions, key: str, value: str) -> None:
    if key == "name" and not V1_NAME.fullmatch(value):
        raise _bad(f"name={value}: letters, digits, '.', '_' and '-', at most 63")
    setattr(result, key, value if key != "clone_children" else True)


def _selection(chosen: list[str], *, named: bool) -> tuple[str, ...]:
    """The controllers of a mount, in the order files list them (cgroup.md D.3)."""
    special = {"all", "none"} & set(chosen)
    if special and len(set(chosen)) > 1:
        raise _bad(f"{special.pop()!r} does not go with controller names")
    if "none" in special or (named and not chosen):
        return ()
    if "all" in special or not chosen:
        return CONTROLLERS
    return tuple(name for name in CONTROLLERS if name in chosen)


def _bad(reason: str) -> CommandError:
    return CommandError(f"mount options: {reason}", os.EX_USAGE)
