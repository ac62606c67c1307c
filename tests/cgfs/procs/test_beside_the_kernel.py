"""The same processes in a real cgroup and in ours: both must list the same members."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cgfs.core.caller import Caller
from cgfs.core.roots import Roots

# A tree that grows and dies in every way: forks, double forks, vfork and exec, threads, orphans.
STORM = """
import os, random, subprocess, sys, threading, time
print(flush=True)
sys.stdin.readline()
end = time.monotonic() + 60
def grow(depth, seed):
    chance = random.Random(seed)
    while time.monotonic() < end:
        what = chance.random()
        if what < 0.3 and depth < 3:
            if os.fork() == 0:
                grow(depth + 1, chance.random())
        elif what < 0.5:
            if os.fork() == 0:
                if os.fork() == 0:
                    time.sleep(chance.random() / 10)
                os._exit(0)
        elif what < 0.6:
            subprocess.Popen(["sleep", "0.05"])
        elif what < 0.7:
            threading.Thread(target=time.sleep, args=(0.01,), daemon=True).start()
        elif what < 0.85 and depth:
            os._exit(0)
        time.sleep(chance.random() / 100)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]: pass
        except ChildProcessError: pass
    os._exit(0)
grow(0, 1)
"""


@pytest.fixture
def real():
    """A fresh cgroup of the machine's own cgroup2."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    if not found or not os.access(found[0] / "cgroup.procs", os.W_OK):
        pytest.skip("needs a writable cgroup2 mount")
    path = found[0] / f"cgfs-procs-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as err:
        pytest.skip(f"{path}: {err.strerror}")
    yield path
    with suppress(OSError):
        (path / "cgroup.freeze").write_text("0")
    (path / "cgroup.kill").write_text("1")
    limit = time.monotonic() + 10
    while (path / "cgroup.procs").read_text() and time.monotonic() < limit:
        time.sleep(0.002)
    path.rmdir()


def pids(text):
    return sorted(int(line) for line in text.split())


def standing_still(real, frozen):
    (real / "cgroup.freeze").write_text(str(frozen))
    limit = time.monotonic() + 10
    while f"frozen {frozen}" not in (real / "cgroup.events").read_text():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_members_are_those_of_the_kernel_throughout_a_storm(real, connected, start):
    roots = Roots([], connected)
    connected.members = roots.tasks
    ours = roots.v2.mkdir(roots.v2.root, "d")
    us = Caller(0, 0, os.getpid())
    node, slot = roots.v2.file(ours, "cgroup.procs")
    storm = start.python(STORM)
    (real / "cgroup.procs").write_text(str(storm.pid))
    node.rows[slot - 1].write(node, str(storm.pid).encode(), us, 0)
    storm.stdin.write("\n")
    storm.stdin.flush()
    sizes = []
    for _ in range(15):
        time.sleep(0.02)
        standing_still(real, 1)
        expected = pids((real / "cgroup.procs").read_text())
        assert pids(node.rows[slot - 1].show(node, us)) == expected
        standing_still(real, 0)
        sizes.append(len(expected))
    assert max(sizes) > 5
