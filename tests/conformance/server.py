"""Our side of the two worlds: one place that knows how a hierarchy is mounted."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from conformance import syscalls
from conformance.calls import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READY_S = 20.0
SILENCE_S = 100.0
_MNT_DETACH = 2


def missing() -> str | None:
    """Says what is missing to mount a hierarchy of ours, None if nothing is."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or not accessible"
    if importlib.util.find_spec("pyfuse3") is None:
        return "pyfuse3 is not installed"
    return None


def command(directory: Path, options: str) -> list[str]:
    """The command that mounts a hierarchy and serves it in the foreground."""
    arguments = [sys.executable, "-m", "cgfs", "mount", "--foreground", str(directory)]
    return [*arguments, "-o", options] if options else arguments


@contextlib.contextmanager
def mounted(options: str = "") -> Iterator[tuple[Path, Callable[[], None]]]:
    """Mounts a hierarchy for a block; gives its root and the function that feeds the watchdog."""
    with _served(lambda directory: command(directory, options)) as (directory, _, feed):
        yield directory, feed


@contextlib.contextmanager
def charging() -> Iterator[tuple[Path, Callable[[int, str, int], str]]]:
    """Mounts a hierarchy whose `misc` can be charged; gives its root and what charges.

    That is a function of pid, resource and amount, which returns "ok" or the errno's name.
    """
    script = Path(__file__).with_name("bare_server.py")
    with _served(lambda directory: [sys.executable, str(script), str(directory)]) as (
        directory,
        server,
        _,
    ):

        def charge(pid: int, resource: str, amount: int) -> str:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{pid} {resource} {amount}\n".encode())
            server.stdin.flush()
            return server.stdout.readline().decode().strip()

        yield directory, charge


@contextlib.contextmanager
def _served(
    command_for: Callable[[Path], list[str]],
) -> Iterator[tuple[Path, subprocess.Popen[bytes], Callable[[], None]]]:
    """Runs a server of a mount for a block.

    A request that the server never answers cannot be interrupted by a signal, so a watchdog
    process ends a server that has kept the tests waiting for too long.
    """
    with tempfile.TemporaryDirectory(prefix="cgfs-oracle-") as name:
        directory = Path(name, "mount")
        directory.mkdir()
        Path(name).chmod(0o755)
        log = Path(name, "log")
        with log.open("wb") as errors, _process(command_for(directory), errors) as server:
            feed, end = _watchdog(server.pid)
            try:
                _wait_for_mount(server, directory, log)
                yield directory, server, feed
                assert server.poll() is None, f"the server ended by itself: {log.read_text()}"
            finally:
                _stop(server, directory)
                end()


def _process(arguments: list[str], errors: BinaryIO) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=errors)


def _wait_for_mount(server: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
    eventually(lambda: directory.is_mount() or server.poll() is not None, READY_S)
    if not directory.is_mount():
        raise ChildProcessError(f"no mount after {READY_S} s: {log.read_text()}")


def _stop(server: subprocess.Popen[bytes], directory: Path) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(READY_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if directory.is_mount():
        syscalls.umount(directory, _MNT_DETACH)


def _watchdog(server_pid: int) -> tuple[Callable[[], None], Callable[[], None]]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        while select.select([reader], [], [], SILENCE_S)[0] and os.read(reader, 1):
            pass
        with contextlib.suppress(ProcessLookupError):
            if not select.select([reader], [], [], 0)[0]:
                os.kill(server_pid, signal.SIGKILL)
        os._exit(0)
    os.close(reader)

    def end() -> None:
        os.close(writer)
        os.waitpid(pid, 0)

    return lambda: os.write(writer, b".") and None, end
