"""Figures of our world alone: memory at rest, the large run, the long run of a limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import worlds

CGROUPS_PER_DIRECTORY = 1000
BYTES_PER_CGROUP = 4096


@dataclass(frozen=True)
class Figure:
    """One line below the table.

    Attributes:
        title: What was done.
        value: What came out, with its unit.
        goal: What is promised, with its unit.
        met: Whether the promise is kept.
    """

    title: str
    value: str
    goal: str
    met: bool


def idle_memory(scratch: Path, nr_cgroups: int) -> Sequence[Figure]:
    """Makes empty cgroups and returns what the server grew by for each."""
    with worlds.ours(scratch) as world:
        assert world.nest is not None
        assert world.server is not None
        before = _resident_bytes(world.server)
        for first in range(0, nr_cgroups, CGROUPS_PER_DIRECTORY):
            directory = world.nest / f"from{first}"
            directory.mkdir()
            worlds.enable_all(directory)
            for number in range(min(CGROUPS_PER_DIRECTORY, nr_cgroups - first) - 1):
                (directory / str(number)).mkdir()
        each = (_resident_bytes(world.server) - before) / nr_cgroups
    return (
        Figure(
            f"memory of the server per idle cgroup, at {nr_cgroups:,} of them",
            f"{each / 1024:.2f} KiB",
            f"at most {BYTES_PER_CGROUP / 1024:.0f} KiB",
            each <= BYTES_PER_CGROUP,
        ),
    )


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise worlds.MissingWorldError(f"process {pid} is gone")


FIGURES: dict[str, Callable[[Path, bool], Sequence[Figure]]] = {
    "memory": lambda scratch, quick: idle_memory(scratch, 5_000 if quick else 100_000),
}
