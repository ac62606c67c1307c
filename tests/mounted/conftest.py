"""A real mount, served by a process of its own: a test process that served itself would hang."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("server.py")
PROJECT = Path(__file__).parents[2]
ANSWER_S = 20.0
MNT_DETACH = 2


class MountedCgfs:
    """The root of a mount, and the server behind it."""

    def __init__(self, root, *options):
        self.root = root
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(SERVER), str(root), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
        )
        self._buffer = b""

    @property
    def pid(self):
        return self.process.pid

    def hear(self):
        """The next answer of the server."""
        out = self.process.stdout
        while b"\n" not in self._buffer:
            assert select.select([out], [], [], ANSWER_S)[0], "the server does not answer"
            piece = os.read(out.fileno(), 65536)
            assert piece, f"the server ended: {self.process.stderr.read().decode()}"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def ask(self, do, **what):
        """Has the server do something; what it says, or the name of an errno."""
        self.process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.hear()
        return answer["error"] if "error" in answer else answer["value"]

    def stop(self):
        """Ends the server as an operator would; what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self):
        """Waits for the end of the server; what it wrote to standard error."""
        try:
            self.process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            errors = self.process.stderr.read().decode()
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return errors


def missing():
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or not accessible"
    return None


def umount(directory):
    ctypes.CDLL(None).umount2(os.fsencode(directory), MNT_DETACH)


@pytest.fixture
def start_cgfs(tmp_path):
    """Starts servers; whatever is left of them at the end of the test is taken down."""
    if reason := missing():
        pytest.skip(reason)
    started = []

    def start(*options, root=None):
        directory = tmp_path / f"mount{len(started)}" if root is None else root
        directory.mkdir(exist_ok=True)
        server = MountedCgfs(directory, *options)
        started.append(server)
        return server

    yield start
    for server in started:
        errors = server.stop() if server.process.returncode is None else ""
        umount(server.root)
        assert errors == ""


@pytest.fixture
def mounted_cgfs(start_cgfs):
    """A mount with encryption_ids and misc enabled for the root's children."""
    server = start_cgfs()
    assert server.hear() == {"ready": True}
    (server.root / "cgroup.subtree_control").write_text("+encryption_ids +misc")
    return server


@pytest.fixture
def root(mounted_cgfs):
    return mounted_cgfs.root
