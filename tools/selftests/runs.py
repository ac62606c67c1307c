"""Running one selftest: its verdict, its reason in its own words, and nothing left of it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selftests.expected import Expect

SKIPPED = 4  # KSFT_SKIP of kselftest.h
GRACE_S = 2
MOST_OUTPUT = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What a test came to.

    Attributes:
        result: Pass, skip or fail.
        why: The test's own reason, unless it passed.
        seconds: How long it took.
        output: What it printed, at most the first MiB.
    """

    result: Expect
    why: str
    seconds: float
    output: str


def run(command: Sequence[str], timeout_s: float, directory: str) -> Outcome:
    """Runs a test in a session of its own and ends whatever remains of that session."""
    start = time.monotonic()
    with (Path(directory) / "output").open("w+b") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=directory,
            start_new_session=True,
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout_s)
        finally:
            _end(process)
        seconds = time.monotonic() - start
        file.seek(0)
        output = file.read(MOST_OUTPUT).decode(errors="replace")
    if status is None:
        return Outcome(Expect.FAIL, f"no end within {timeout_s:g} s", seconds, output)
    return Outcome(verdict(status), reason(status, output), seconds, output)


def verdict(status: int) -> Expect:
    """Returns what an exit status means."""
    return {0: Expect.PASS, SKIPPED: Expect.SKIP}.get(status, Expect.FAIL)


def reason(status: int, output: str) -> str:
    """Returns why a test was skipped or failed, in its own words as far as it said any."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if status == 0:
        return ""
    if status == SKIPPED:
        said = [line for line in lines if "skip" in line.lower()]
        return _skip_reason((said or lines or ["gives no reason"])[-1])
    for number, line in enumerate(lines):
        if "Test Assertion Failure" in line:
            return _assertion(lines[number + 1 :])
    last = lines[-1] if lines else "printed nothing"
    died = status < 0 or status > 128
    return f"signal {abs(status) % 128}: {last}" if died else last


def _skip_reason(line: str) -> str:
    """Takes the KTAP words off: `1..0 # SKIP - Requirement not met: CONDITION`."""
    text = line.removeprefix("1..0 # SKIP").strip(" -").removesuffix(", skipping test")
    return text.removeprefix("Requirement not met: ")


def _assertion(lines: Sequence[str]) -> str:
    """Returns where it failed, and the message below the list of callers."""
    place = lines[0] if lines else ""
    # FILE:LINE: CONDITION, `pid=`, callers `N  0x...: FUNCTION at FILE:LINE`, then the message.
    message = [
        line for line in lines[1:] if not line.startswith(("pid=", "(")) and not line[:1].isdigit()
    ]
    return f"{place.split('/')[-1]}: {message[0]}" if message else place


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a test by asking, then by force; it may have made process groups of its own."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    deadline = time.monotonic() + GRACE_S
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()


def _session(leader: int) -> list[int]:
    """Returns the processes of a session that are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # PID (COMMAND) STATE PPID PGRP SESSION ...; the command may hold anything.
            state, _ppid, _pgrp, session = (
                (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found
