"""The rows of the table: what is done, in which worlds, and how far from them it may be."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from worlds import World

OURS = "cgfs"
QUIET_SECONDS = 0.5  # longer than any server keeps a file apart after a change
NR_GREP_CGROUPS = 1000


class FailedError(Exception):
    """A measurement did not come to its end; the text says why."""


@dataclass(frozen=True)
class Goal:
    """Ours may be at most `ratio` times the world `of`."""

    of: str
    ratio: float


@dataclass(frozen=True)
class Setting:
    """How much to measure.

    Attributes:
        client: The compiled client.c.
        rounds: How often each world has its turn.
        turn_ms: Length of a turn in milliseconds.
    """

    client: Path
    rounds: int
    turn_ms: int


@dataclass
class Cells:
    """What a row came to.

    Attributes:
        ns: Median nanoseconds by world.
        why_not: By world, why there is no figure.
    """

    ns: dict[str, float] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: Its name on the command line.
        title: Its name in the table.
        goals: What is promised.
        prepare: Makes a turn ready for a world: a function that takes the turn and returns
            nanoseconds; None where the world has nothing to work on.
        tidy: Removes what `prepare` made in the world.
    """

    key: str
    title: str
    goals: tuple[Goal, ...]
    prepare: Callable[[Setting, World], Callable[[], float] | None]
    tidy: Callable[[World], None] = lambda _world: None


def measure(row: Row, worlds: Sequence[World], setting: Setting) -> Cells:
    """Returns the medians of a row; the worlds take turns, so that a busy moment meets them all."""
    cells = Cells()
    turns: dict[str, Callable[[], float]] = {}
    samples: dict[str, list[float]] = {}
    time.sleep(QUIET_SECONDS)
    try:
        for world in worlds:
            try:
                turn = row.prepare(setting, world)
                if turn is not None:
                    turn()  # the first turn warms the caches
                    turns[world.name] = turn
            except (OSError, FailedError) as error:
                cells.why_not[world.name] = str(error)
        for _ in range(setting.rounds):
            for name in list(turns):
                try:
                    samples.setdefault(name, []).append(turns[name]())
                except FailedError as error:
                    cells.why_not[name] = str(error)
                    del turns[name]
    finally:
        for world in worlds:
            row.tidy(world)
    cells.ns = {name: statistics.median(samples[name]) for name in turns}
    return cells


def _client(setting: Setting, operation: str, path: Path, *texts: str) -> Callable[[], float]:
    """Returns a turn of client.c."""
    command = [str(setting.client), operation, str(path), str(setting.turn_ms), *texts]

    def turn() -> float:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"{operation} {path.name}: no answer in a minute") from error
        if done.returncode != 0:
            raise FailedError(done.stderr.strip())
        return float(done.stdout)

    return turn


def _read_limit(setting: Setting, world: World) -> Callable[[], float] | None:
    return None if world.limit is None else _client(setting, "read", world.limit)


def _read_counter(setting: Setting, world: World) -> Callable[[], float] | None:
    return None if world.counter is None else _client(setting, "read", world.counter)


def _write_limit(setting: Setting, world: World) -> Callable[[], float] | None:
    if world.limit is None or not all(world.texts):
        return None
    return _client(setting, "write", world.limit, *world.texts)


def _mkdir(setting: Setting, world: World) -> Callable[[], float] | None:
    return None if world.nest is None else _client(setting, "mkdir", world.nest / "one")


def _grep(setting: Setting, world: World) -> Callable[[], float] | None:
    """Makes 1,000 cgroups; a turn is a real `grep -r .` over them, per file."""
    if world.nest is None:
        return None
    top = world.nest / "grep"
    top.mkdir()
    for number in range(NR_GREP_CGROUPS):
        (top / str(number)).mkdir()
    nr_files = sum(len(files) for _path, _dirs, files in os.walk(top))
    # grep stops at the first match of a file when it writes to /dev/null.
    output = setting.client.with_name("grep.out")

    def turn() -> float:
        with output.open("wb") as file:
            start_ns = time.monotonic_ns()
            command = ["grep", "-rs", ".", str(top)]
            # 2: some files cannot be read, as cgroup.kill; the same in every world.
            if subprocess.run(command, stdout=file, timeout=300, check=False).returncode > 2:
                raise FailedError("grep was interrupted")
            return (time.monotonic_ns() - start_ns) / nr_files

    return turn


def _tidy_grep(world: World) -> None:
    if world.nest is None or not (world.nest / "grep").is_dir():
        return
    for directory in (world.nest / "grep").iterdir():
        if directory.is_dir():
            directory.rmdir()
    (world.nest / "grep").rmdir()


ROWS = (
    Row(
        "limit",
        "unchanged limit file: open, read, read at the end, close",
        (Goal("kernel", 4.0), Goal("lxcfs", 0.25)),
        _read_limit,
    ),
    Row("counter", "live counter: the same four calls", (Goal("C libfuse", 1.5),), _read_counter),
    Row("write", "`echo N > ...max`: open, write, close", (Goal("kernel", 7.0),), _write_limit),
    Row("mkdir", "mkdir and rmdir with the full file set", (Goal("kernel", 1.8),), _mkdir),
    Row(
        "grep",
        "`grep -r .` over 1,000 cgroups, warm, per file",
        (Goal("kernel", 3.0),),
        _grep,
        _tidy_grep,
    ),
)
