"""Container runtimes on the emulated cgroup tree: limits from their configuration, KVM inside."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import time

import pytest
from sessions.session import fuse, shell

__all__ = ["fuse", "shell"]

PROGRAM = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
	printf("version %d\n", ioctl(open("/dev/kvm", O_RDWR), 0xAE00, 0));
	fflush(stdout);
	pause();
}
"""
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
    {"destination": "/dev/kvm", "type": "bind", "source": "/dev/kvm", "options": ["bind"]},
]
CONFIG = {
    "ociVersion": "1.0.2",
    "process": {"user": {"uid": 0, "gid": 0}, "args": ["/program"], "cwd": "/"},
    "root": {"path": "rootfs"},
    "mounts": MOUNTS,
    "linux": {
        "cgroupsPath": "/box",
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
        "resources": {"unified": {"misc.max": "sev 1"}},
    },
}


@pytest.fixture(params=["crun", "runc"])
def runtime(request):
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}")
    if os.geteuid() != 0:
        pytest.skip("needs root to make a container")
    return request.param


@pytest.fixture
def cgroups(shell, fuse):
    """The tree of a host whose processes can be limited in the first level."""
    started = shell.kvmsim("up", "host", "--preset", "lab-amd")
    assert (started.returncode, started.stderr) == (0, "")
    host = shell.home / "host"
    if (reason := shell.kvmsim("run", "true")).returncode == 69:
        shell.kvmsim("down", host)
        pytest.skip(f"no client can be run here: {reason.stderr.strip()}")
    root = host / "sys/fs/cgroup"
    (root / "cgroup.subtree_control").write_text("+misc")
    yield root
    shell.kvmsim("down", host)


@pytest.fixture
def bundle(shell):
    """A container that asks its /dev/kvm for the version and then waits to be killed."""
    directory = shell.home / "bundle"
    (directory / "rootfs").mkdir(parents=True)
    source = directory / "program.c"
    source.write_text(PROGRAM)
    program = directory / "rootfs/program"
    built = shell.run("gcc", "-static", "-o", program, source)
    if built.returncode:
        pytest.skip(f"needs gcc and a static libc: {built.stderr[:200]}")
    config = copy.deepcopy(CONFIG)
    # By which the session finds what a failing test has left.
    config["process"]["env"] = [f"KVMSIM_RUNTIME_DIR={shell.runtime}"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextlib.contextmanager
def running(shell, runtime, bundle):
    """The container, from its first line on."""
    container = (runtime, "--root", shell.home / "state", "run", "-b", bundle, "box")
    with subprocess.Popen(
        ("kvmsim", "run", "--cgroup", "/", "--", *container),
        cwd=shell.home,
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            assert line == "version 12\n", process.stderr.read()
            yield process
        except BaseException:
            process.kill()
            raise


def vanishes(cgroup):
    """Waits for a cgroup to be removed."""
    deadline = time.monotonic() + 10
    while cgroup.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not cgroup.exists()


def test_container_finds_the_emulated_kvm_and_its_limit_is_set(shell, cgroups, bundle, runtime):
    with running(shell, runtime, bundle) as process:
        assert (cgroups / "box/misc.max").read_text() == "sev 1\nsev_es max\n"
        state = ("--root", shell.home / "state")
        shell.kvmsim("run", "--cgroup", "/", "--", runtime, *state, "kill", "box", "KILL")
    assert process.returncode == 128 + 9
    assert vanishes(cgroups / "box")


# runc makes its child with CLONE_PARENT, so that it is taken for one of runc's parent.
@pytest.mark.parametrize("runtime", ["crun"], indirect=True)
def test_container_is_killed_by_its_cgroup(shell, cgroups, bundle, runtime):
    with running(shell, runtime, bundle) as process:
        assert (cgroups / "box/cgroup.procs").read_text().split() != []
        (cgroups / "box/cgroup.kill").write_text("1")
    assert process.returncode == 128 + 9
    assert vanishes(cgroups / "box")
