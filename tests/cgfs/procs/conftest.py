"""Real short-lived processes, and a recorder in the place of the model's task table."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from cgfs.procs.choose import best_source
from cgfs.procs.connector import ProcConnector
from cgfs.procs.processes import RealProcesses
from cgfs.procs.scan import ForkScan

DEADLINE_S = 10.0


class Starter:
    """Starts processes in sessions of their own and ends them all, their children included."""

    def __init__(self):
        self.started = []

    def __call__(self, *argv, **options):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
        child = subprocess.Popen(argv, start_new_session=True, **options)
        self.started.append(child)
        return child

    def sh(self, script):
        return self("/bin/sh", "-c", script)

    def python(self, script):
        """A Python program; returns once it has printed its first line, kept as `said`."""
        child = self(sys.executable, "-Su", "-c", script)
        child.said = child.stdout.readline().strip()
        return child

    def close(self):
        for child in self.started:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
        for child in self.started:
            child.wait(DEADLINE_S)
            for pipe in (child.stdin, child.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()


class Recorder:
    """Keeps what it is told, and watches every child like the model does."""

    def __init__(self):
        self.processes = None
        self.forks = []
        self.exits = []
        self.stops = []
        self.left = {}

    def forked(self, parent_tid, parent_tgid, child_tid, child_tgid, now_ns):
        self.forks.append((parent_tid, parent_tgid, child_tid, child_tgid))
        if child_tid == child_tgid:
            self.processes.watch(child_tgid)

    def exited(self, tid, tgid, now_ns):
        self.exits.append((tid, tgid))
        self.left[tgid] = self.processes.threads(tgid)

    def stopped(self, tgid):
        self.stops.append(tgid)

    def threads_apart(self):
        return []

    @property
    def children(self):
        return [child for _, _, child, tgid in self.forks if child == tgid]


@pytest.fixture
def start():
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture
def eventually():
    """Polls what the kernel does in its own time; returns the first true answer."""

    def poll(answer):
        limit = time.monotonic() + DEADLINE_S
        while not (got := answer()):
            assert time.monotonic() < limit, "did not happen in time"
            time.sleep(0.002)
        return got

    return poll


@pytest.fixture
def died():
    """Waits until a process is dead, without reaping it."""

    def wait(pid):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(DEADLINE_S * 1000)
        finally:
            os.close(fd)

    return wait


@pytest.fixture
def connector():
    source = best_source()
    if not isinstance(source, ProcConnector):
        pytest.skip("the process connector is missing or not permitted")
    yield source
    source.close()


@pytest.fixture
def recorder():
    return Recorder()


def _processes(source, recorder):
    processes = RealProcesses(source, time.monotonic_ns, recorder)
    recorder.processes = processes
    return processes


@pytest.fixture
def connected(connector, recorder):
    processes = _processes(connector, recorder)
    yield processes
    processes.close()


@pytest.fixture(params=["connector", "scan"])
def processes(request, recorder):
    """The real processes, once with each source of forks."""
    by_name = {"connector": lambda: request.getfixturevalue("connector"), "scan": ForkScan}
    processes = _processes(by_name[request.param](), recorder)
    yield processes
    processes.close()
