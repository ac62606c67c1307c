"""The emulated host of the demo, and QEMU with a storm guest on it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import guests

PRESET = "spr-buslock"
KVMSIM = str(Path(sys.executable).with_name("kvmsim"))
QEMU = "qemu-system-x86_64"
START_SECONDS = 20
MACHINE = "pc,kernel_irqchip=off,bus-lock-ratelimit={}"
OPTIONS = "-m 16 -nodefaults -display none -serial none"


class FailedError(Exception):
    """Something did not start; the text says what."""


@contextlib.contextmanager
def host(directory: Path) -> Iterator[Path]:
    """Brings a host up in a directory and yields a cgroup of it, ``/tenant``."""
    mounted = directory / "host"
    _kvmsim("up", str(mounted), "--preset", PRESET)
    try:
        root = mounted / "sys/fs/cgroup"
        (root / "cgroup.subtree_control").write_text("+bus_lock")
        (root / "tenant").mkdir()
        yield root / "tenant"
    finally:
        _kvmsim("down", str(mounted))


def _kvmsim(*arguments: str) -> None:
    done = subprocess.run([KVMSIM, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FailedError(done.stderr.strip() or f"kvmsim {arguments[0]}: {done.returncode}")


@contextlib.contextmanager
def storm(directory: Path, cgroup: Path, ratelimit: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs QEMU with a guest that takes bus locks without end; yields when it takes some.

    Raises:
        FailedError: QEMU ended, or its guest takes none; with its last words.
    """
    rom, log = directory / "storm.rom", directory / "qemu.log"
    rom.write_bytes(guests.rom("storm64", "LOCKS=0"))
    client = [QEMU, "-accel", "kvm", "-M", MACHINE.format(ratelimit), "-bios", str(rom)]
    command = [KVMSIM, "run", "--host", str(directory / "host"), "--cgroup", f"/{cgroup.name}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--", *client, *OPTIONS.split()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for_locks(process, cgroup, log)
        yield process
    finally:
        with contextlib.suppress(OSError):
            (cgroup / "cgroup.kill").write_text("1")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(START_SECONDS)
        process.kill()
        process.wait()


def _wait_for_locks(process: subprocess.Popen[bytes], cgroup: Path, log: Path) -> None:
    statistics = cgroup / "bus_lock.stat"
    before = statistics.read_text()
    deadline = time.monotonic() + START_SECONDS
    while statistics.read_text() == before:
        if process.poll() is not None or time.monotonic() > deadline:
            words = log.read_text(errors="replace").strip().splitlines()
            raise FailedError(words[-1] if words else "QEMU's guest takes no bus lock")
        time.sleep(0.05)


def why_not() -> str | None:
    """Says what is missing on this machine; None if nothing is."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not any((Path(directory) / QEMU).exists() for directory in path):
        return f"needs {QEMU}: on Debian, apt-get install qemu-system-x86"
    return None
