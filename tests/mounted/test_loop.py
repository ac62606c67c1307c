"""The event loop of the server goes on while requests are answered past it."""

from __future__ import annotations

import os
import signal
import time

import pytest

SECONDS = 1.0

# Far above what is seen (docs/performance.md), far below never.
LATE_S = 0.5


def load(path):
    """Reads without end, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        while True:
            fd = os.open(path, os.O_RDONLY)
            os.read(fd, 4096)
            os.close(fd)
    return pid


@pytest.fixture
def readers():
    pids = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_timers_run_while_files_are_read_without_pause(start_cgfs, readers):
    server = start_cgfs("noisy")
    server.hear()
    readers += [load(server.root / name) for name in ("cgroup.stat", "cgroup.max.depth")]
    server.ask("lateness")
    time.sleep(SECONDS)
    assert 0 < server.ask("lateness") < LATE_S
