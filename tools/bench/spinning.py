"""Reads of the mount while a guest of real code spins in another process, beside an idle host."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import guests
import worlds
from figures import Figure

MOST_RATIO = 1.15
BOARD = Path(__file__).parents[2] / "docs/examples/board.c"
PRESET = "spr-buslock"
FILES = {
    "live counter": "bus_lock.stat",
    "unchanged limit file": "bus_lock.max",
}


@dataclass(frozen=True)
class Host:
    """A started host, and a way to have a guest on it.

    Attributes:
        cgroup: A cgroup of it.
        client: The command of a client whose guest spins for ever.
        environment: What that has to run in.
    """

    cgroup: Path
    client: Sequence[str]
    environment: dict[str, str]


@contextlib.contextmanager
def _host(scratch: Path) -> Iterator[Host]:
    """Yields a host on the CPU of this process.

    Raises:
        MissingWorldError: It does not start, or guests cannot be built.
    """
    board, rom, target = scratch / "board", scratch / "spin.rom", scratch / "host"
    try:
        # Locked, yet within a line: it never leaves the guest.
        rom.write_bytes(guests.rom("storm64", "LOCKS=0", "OPERAND=ALIGNED"))
    except guests.BuildError as error:
        raise worlds.MissingWorldError(str(error)) from error
    _call(["gcc", "-O1", "-o", str(board), str(BOARD)], dict(os.environ))
    environment = {**os.environ, "KVMSIM_RUNTIME_DIR": str(scratch / "runtime")}
    kvmsim = str(Path(sys.executable).with_name("kvmsim"))
    _call([kvmsim, "up", str(target), "--preset", PRESET], environment)
    try:
        root = target / "sys/fs/cgroup"
        (root / "cgroup.subtree_control").write_text("+bus_lock")
        (root / "tenant").mkdir()
        client = [kvmsim, "run", "--host", str(target), "--", str(board), str(rom)]
        yield Host(root / "tenant", client, environment)
    finally:
        _call([kvmsim, "down", str(target)], environment)


@contextlib.contextmanager
def _guest(host: Host, cpus: set[int]) -> Iterator[None]:
    """Has a guest spin on some CPUs.

    Raises:
        MissingWorldError: It ended at once.
    """
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        process = subprocess.Popen(
            host.client,
            env=host.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    finally:
        os.sched_setaffinity(0, mine)
    try:
        time.sleep(2.0)  # it has started, and code is translated
        if process.poll() is not None:
            assert process.stderr is not None
            words = process.stderr.read().decode(errors="replace").strip()
            raise worlds.MissingWorldError(words or "the guest ended")
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        process.kill()
        process.communicate()


def spin(scratch: Path, quick: bool) -> Sequence[Figure]:
    """Times reads of two files, in turns without and with a guest that spins on other CPUs.

    Raises:
        MissingWorldError: There is only one CPU, or no guest can be had.
    """
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
    if not others:
        raise worlds.MissingWorldError("a guest beside the mount needs a second CPU")
    rounds, turn_ms = (2, "60") if quick else (5, "250")
    client = str(worlds.compiled("client", scratch))
    idle: dict[str, list[float]] = {title: [] for title in FILES}
    spinning: dict[str, list[float]] = {title: [] for title in FILES}
    with _host(scratch) as host:

        def turn(results: dict[str, list[float]]) -> None:
            for title, name in FILES.items():
                command = [client, "read", str(host.cgroup / name), turn_ms]
                results[title].append(float(_call(command, host.environment)) / 1000)

        turn({title: [] for title in FILES})  # the first turn warms the caches
        for _ in range(rounds):
            turn(idle)
            with _guest(host, others):
                turn(spinning)
    return [
        _figure(title, statistics.median(idle[title]), statistics.median(spinning[title]))
        for title in FILES
    ]


def _figure(title: str, idle: float, spinning: float) -> Figure:
    ratio = spinning / idle
    return Figure(
        f"{title}, while a guest spins in another process "
        f"({spinning:.1f} µs), beside an idle host ({idle:.1f} µs)",
        f"{ratio:.2f}x",
        f"at most {MOST_RATIO:g}x",
        ratio <= MOST_RATIO,
    )


def _call(command: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise worlds.MissingWorldError(words[-1])
    return done.stdout


FIGURES: dict[str, Callable[[Path, bool], Sequence[Figure]]] = {"spin": spin}
