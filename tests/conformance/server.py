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
_ALIVE, _REST, _DONE, _SILENCE = b".", b",", b"q", b"-"


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
def directory() -> Iterator[Path]:
    """Makes a directory to mount on that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="cgfs-oracle-") as name:
        mountpoint = Path(name, "mount")
        mountpoint.mkdir()
        Path(name).chmod(0o755)
        yield mountpoint


@contextlib.contextmanager
def mounted(options: str = "") -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """Mounts a hierarchy for a block.

    Gives its root and what tells the watchdog that a test begins (True) or has ended.
    """
    with _served(lambda root: command(root, options)) as (root, _, feed):
        yield root, feed


@contextlib.contextmanager
def charging() -> Iterator[tuple[Path, Callable[[int, str, int], str]]]:
    """Mounts a hierarchy whose `misc` can be charged; gives its root and what charges.

    That is a function of pid, resource and amount, which returns "ok" or the errno's name.
    """
    script = Path(__file__).with_name("bare_server.py")
    with _served(lambda root: [sys.executable, str(script), str(root)]) as (root, server, _):

        def charge(pid: int, resource: str, amount: int) -> str:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{pid} {resource} {amount}\n".encode())
            server.stdin.flush()
            return server.stdout.readline().decode().strip()

        yield root, charge


@contextlib.contextmanager
def _served(
    command_for: Callable[[Path], list[str]],
) -> Iterator[tuple[Path, subprocess.Popen[bytes], Callable[[bool], None]]]:
    """Runs a server of a mount for a block.

    A request that the server never answers cannot be interrupted by a signal, so a watchdog
    process ends a server that has kept a test waiting for too long. Between tests, others may take
    as long as they like.
    """
    with directory() as mountpoint:
        log = mountpoint.with_name("log")
        with log.open("wb") as errors, _process(command_for(mountpoint), errors) as server:
            feed, end = _watchdog(server.pid)
            try:
                _wait_for_mount(server, mountpoint, log)
                yield mountpoint, server, feed
                assert server.poll() is None, f"the server ended by itself: {log.read_text()}"
            finally:
                _stop(server, mountpoint)
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
        # A server that died of the signal has a process that unmounts for it, and may be quicker.
        with contextlib.suppress(OSError):
            syscalls.umount(directory, _MNT_DETACH)
        assert eventually(lambda: not directory.is_mount(), READY_S)


def _watchdog(server_pid: int) -> tuple[Callable[[bool], None], Callable[[], None]]:
    """Starts a process that ends the server if it hangs, or if the tests die; see _served."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        _watch(server_pid, reader)
        os._exit(0)
    os.close(reader)

    def feed(running: bool) -> None:
        os.write(writer, _ALIVE if running else _REST)

    def end() -> None:
        os.write(writer, _DONE)
        os.close(writer)
        os.waitpid(pid, 0)

    return feed, end


def _watch(server_pid: int, reader: int) -> None:
    word = _ALIVE
    while word in (_ALIVE, _REST):
        heard = select.select([reader], [], [], SILENCE_S if word == _ALIVE else None)[0]
        word = os.read(reader, 1) if heard else _SILENCE
    if word != _DONE:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server_pid, signal.SIGKILL if word == _SILENCE else signal.SIGTERM)
