"""The calling forms of mount(8) helpers.

``mount -t fuse.cgfs SOURCE DIR -o OPTIONS`` and an fstab line end in one of two calls:

* util-linux runs ``/sbin/mount.fuse.cgfs SOURCE DIR [-sfnv] [-o OPTIONS] [-t TYPE]`` if there is
  such a file (a symbolic link to ``cgfs`` is enough);
* otherwise ``/sbin/mount.fuse`` (libfuse) runs the program named by the type, found in PATH:
  ``cgfs SOURCE DIR -o OPTIONS``.

SOURCE is only a name, shown in /proc/mounts.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cgfs.control.errors import CommandError

HELPER_PREFIX = "mount."


@dataclass(frozen=True, slots=True)
class HelperCall:
    """What mount(8) asks for. ``fake`` is its -f: check everything, mount nothing."""

    source: str
    directory: str
    options: list[str] = field(default_factory=list)
    fake: bool = False


def is_helper_call(program: str, arguments: Sequence[str], subcommands: Collection[str]) -> bool:
    """Whether these are a mount helper's arguments and not a subcommand's.

    Args:
        program: base name of argv[0].
        arguments: the rest of argv.
        subcommands: names that are never a SOURCE, unless the program is called mount.*.
    """
    if program.startswith(HELPER_PREFIX):
        return True
    # libfuse always gives options; a mistyped subcommand must not mount anything.
    source, options = arguments[:1], arguments[2:3]
    return options == ["-o"] and source[0] not in subcommands and not source[0].startswith("-")


def parse_helper_call(arguments: Sequence[str]) -> HelperCall:
    """Reads a helper's arguments.

    Raises:
        CommandError: they are not of that form (EX_USAGE).
    """
    places: list[str] = []
    options: list[str] = []
    fake = False
    rest = iter(arguments)
    for argument in rest:
        if argument in {"-o", "-t", "-N"}:
            value = next(rest, "")
            options += split_options(value) if argument == "-o" else []
        elif argument.startswith("-o"):
            options += split_options(argument[2:])
        elif argument.startswith("-") and set(argument[1:]) <= set("sfnvrw"):
            fake = fake or "f" in argument
        else:
            places.append(argument)
    if len(places) != 2:
        raise CommandError("a mount helper takes SOURCE DIR [-o OPTIONS]", os.EX_USAGE)
    return HelperCall(places[0], places[1], options, fake)


def split_options(text: str) -> list[str]:
    r"""The options of a comma-separated list; ``\,`` is a comma inside one."""
    options = [""]
    escaped = False
    for character in text:
        if escaped:
            options[-1] += character if character == "," else f"\\{character}"
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == ",":
            options.append("")
        else:
            options[-1] += character
    return [option for option in options if option]


# Options that mount(8), fstab(5) and systemd understand themselves, or that have no meaning for a
# file system of control files.
_TOGGLES = frozenset(
    {"atime", "auto", "dev", "diratime", "exec", "iversion", "lazytime", "mand", "relatime"}
    | {"strictatime", "suid", "user"}
)
_NO_MEANING = frozenset(
    {"defaults", "rw", "users", "owner", "group", "nofail", "_netdev"}
    | {"sync", "async", "dirsync", "silent", "loud"}
    | {prefix + word for word in _TOGGLES for prefix in ("", "no")}
)


def is_generic(option: str) -> bool:
    """Whether an option is for somebody else than the file system."""
    return option in _NO_MEANING or option.startswith(("x-", "comment=", "X-"))
