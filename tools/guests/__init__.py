"""Builds the guests of docs/examples/guests: a ROM of 64 KiB from one assembler file."""

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "docs/examples/guests"
ROM_BYTES = 1 << 16
FLAGS = ("-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0,-e0,--build-id=none")
AS_ROM = ("-Wl,--oformat=binary",)
#: What a guest writes to its exit port in the end.
DONE = 0x10


class BuildError(Exception):
    """A guest cannot be built here; the text says why."""


@functools.cache
def rom(name: str, *defines: str) -> bytes:
    """Returns the ROM of a guest.

    Args:
        name: a file of docs/examples/guests without its suffix.
        defines: what to tell the preprocessor, such as ``LOCKS=100``.

    Raises:
        BuildError: there is no compiler, or it complained.
    """
    with tempfile.TemporaryDirectory(prefix="guest.") as directory:
        output = Path(directory) / "rom"
        _link(name, defines, output, *FLAGS, *AS_ROM)
        return output.read_bytes()


@functools.cache
def symbols(name: str, *defines: str) -> dict[str, int]:
    """Returns where the labels of a guest are, as offsets in its ROM.

    Raises:
        BuildError: there is no compiler, or it complained.
    """
    with tempfile.TemporaryDirectory(prefix="guest.") as directory:
        output = Path(directory) / "elf"
        _link(name, defines, output, *FLAGS)
        lines = _output("nm", str(output)).splitlines()
    return {label: int(value, 16) for value, _, label in map(str.split, lines)}


def _link(name: str, defines: Sequence[str], output: Path, *flags: str) -> None:
    options = [f"-D{define}" for define in defines]
    _output("gcc", *flags, *options, "-o", str(output), str(SOURCES / f"{name}.S"))


def _output(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BuildError(f"no {program} to assemble guests with") from error
    if done.returncode != 0:
        raise BuildError(done.stderr.strip())
    return done.stdout
