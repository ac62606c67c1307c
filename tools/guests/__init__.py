"""Builds the guests of docs/examples/guests: a ROM of 64 KiB from one assembler file."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "docs/examples/guests"
ROM_BYTES = 1 << 16
FLAGS = (
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,-Ttext=0,-e0,--build-id=none,--oformat=binary",
)
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
    gcc = shutil.which("gcc")
    if gcc is None:
        raise BuildError("no gcc to assemble guests with")
    with tempfile.TemporaryDirectory(prefix="guest.") as directory:
        output = Path(directory) / "rom"
        options = [f"-D{define}" for define in defines]
        command = [gcc, *FLAGS, *options, "-o", str(output), str(SOURCES / f"{name}.S")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{name}: {done.stderr.strip()}")
        return output.read_bytes()
