"""Guests of real code on a mounted host: limits, and what is left when something dies."""

import errno
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest
from sessions.session import fuse, shell

__all__ = ["fuse", "shell"]


class Host:
    """A mounted host, a program to run on it, and a cgroup to run it in."""

    def __init__(self, shell, directory, program):
        self.shell = shell
        self.program = program
        root = directory / "sys/fs/cgroup"
        (root / "cgroup.subtree_control").write_text("+misc +bus_lock")
        self.cgroup = root / "a"
        self.cgroup.mkdir()

    def run(self, *case, options=(), **more):
        command = ("run", "--cgroup", "/a", *options, "--", self.program, *case)
        return self.shell.kvmsim(*command, **more)

    @contextmanager
    def started(self, *case):
        """The supervisor, and the pid of the client, whose guest spins."""
        with subprocess.Popen(
            ["kvmsim", "run", "--cgroup", "/a", "--", self.program, *case],
            cwd=self.shell.home,
            env=self.shell.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as supervisor:
            word, client = supervisor.stdout.readline().split()
            assert word == "spins"
            try:
                yield supervisor, int(client)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(int(client), signal.SIGKILL)

    def counts(self, name):
        lines = (self.cgroup / name).read_text().splitlines()
        return {key: int(value) for key, value in map(str.split, lines)}

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def host(shell, fuse, compiled):
    del fuse
    program = compiled("code")
    started = shell.kvmsim("up", "host", "--preset", "lab-amd")
    assert (started.returncode, started.stderr) == (0, "")
    directory = shell.home / "host"
    if (reason := shell.kvmsim("run", "true")).returncode == os.EX_UNAVAILABLE:
        shell.kvmsim("down", directory)
        pytest.skip(f"no client can be run here: {reason.stderr.strip()}")
    yield Host(shell, directory, program)
    shell.kvmsim("down", directory)


@pytest.fixture
def with_engine():
    pytest.importorskip("unicorn", reason="needs the extra x86")


@pytest.mark.usefixtures("with_engine")
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_crash_of_the_engine_ends_calls_and_charges_but_not_the_client(host, number):
    with host.started("forever", "orphan") as (supervisor, client):
        assert host.counts("misc.current")["sev"] == 1
        supervisor.send_signal(number)
        assert supervisor.stdout.readline() == f"errno {errno.ENOSYS}\n"
        host.until(lambda: host.counts("misc.current")["sev"] == 0)
        os.kill(client, 0)
        assert supervisor.wait() == -number
    assert host.run("basics").returncode == 0


@pytest.mark.usefixtures("with_engine")
def test_killed_client_takes_its_executing_guest_and_its_charge_along(host):
    with host.started("forever", "orphan") as (supervisor, client):
        os.kill(client, signal.SIGKILL)
        assert supervisor.wait(60) == 128 + signal.SIGKILL
        assert supervisor.stderr.read() == ""
    assert host.counts("misc.current")["sev"] == 0


@pytest.mark.usefixtures("with_engine")
def test_limit_of_the_cgroup_holds_a_guest_of_real_code(host):
    (host.cgroup / "bus_lock.max").write_text("20 100000")
    began = time.monotonic()
    done = host.run("locks", 81, "split")
    assert (done.stdout, done.stderr, done.returncode) == ("81\n", "", 0)
    # The last one is told of in front of the instruction and never admitted.
    assert host.counts("bus_lock.stat")["nr_events"] == 80
    assert time.monotonic() - began > 0.29


@pytest.mark.usefixtures("with_engine")
def test_stopped_client_stops_its_executing_guest(host):
    with host.started("forever", "orphan") as (supervisor, _):
        (host.cgroup / "cgroup.freeze").write_text("1")
        host.until(lambda: "frozen 1" in (host.cgroup / "cgroup.events").read_text())
        (host.cgroup / "cgroup.freeze").write_text("0")
        assert supervisor.stdout.readline() == f"errno {errno.EINTR}\n"


def test_guest_that_is_to_halt_halts_whatever_is_in_its_memory(host):
    done = host.run("basics", options=("--guest", "halt"))
    assert (done.stderr, done.returncode) == ("", 1)
    assert "run(&vm, 0) == KVM_EXIT_IO" in done.stdout


def test_without_the_extra_kvm_run_fails_and_one_line_says_why(host, tmp_path):
    package = tmp_path / "without/unicorn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not here')\n")
    host.shell.environment["PYTHONPATH"] = str(package.parent)
    done = host.run("basics")
    assert done.returncode == 1
    assert f"errno {errno.EOPNOTSUPP} " in done.stdout
    assert done.stderr == (
        "kvmsim: executing x86 code needs Unicorn: install kvmsim with the extra x86; "
        "KVM_RUN fails\n"
    )
