"""Where selftests run: on an emulated host that is made for them, or on the machine's own KVM."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selftests.source import UnavailableError

SETTLE_S = 3.0


@dataclass(frozen=True)
class World:
    """How to run something in it.

    Attributes:
        command: What to put before a test's own command.
        left_behind: What is still charged, for people; empty if nothing.
    """

    command: Sequence[str]
    left_behind: Callable[[], str]


@contextlib.contextmanager
def real() -> Iterator[World]:
    """Yields the machine's own KVM.

    Raises:
        UnavailableError: It has none, or not for this user.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise UnavailableError("no /dev/kvm that this user may open")
    yield World((), lambda: "")


@contextlib.contextmanager
def emulated(scratch: Path, preset: str) -> Iterator[World]:
    """Yields a started host of a preset, which is stopped afterwards.

    Raises:
        UnavailableError: It does not start, or trapping system calls does not work here.
    """
    host = scratch / preset
    # Apart from the hosts of whoever calls.
    environment = {**os.environ, "KVMSIM_RUNTIME_DIR": str(scratch / "runtime")}
    kvmsim = [sys.executable, "-m", "kvmsim"]
    _call([*kvmsim, "up", str(host), "--preset", preset], environment)
    try:
        within = ["env", f"KVMSIM_RUNTIME_DIR={environment['KVMSIM_RUNTIME_DIR']}"]
        client = [*within, *kvmsim, "run", "--host", str(host), "--"]
        _call([*client, "true"], environment)
        yield World(client, lambda: _charged(host / "sys/fs/cgroup/misc.current"))
    finally:
        _call([*kvmsim, "down", str(host)], environment)


def _call(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UnavailableError(words[-1])


def _charged(counters: Path) -> str:
    """Returns what is charged once the last client has been gone for a moment."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        held = [line for line in counters.read_text().splitlines() if line.split()[1] != "0"]
        if not held or time.monotonic() > deadline:
            return ", ".join(held)
        time.sleep(0.02)
