"""Clients whose guests are real code."""

import gc
import os
import signal
import time
from dataclasses import replace

import pytest

VENDORS = ["spr-buslock", "turin1006"]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def host(make_host):
    """Guests execute what is in their memory."""
    made = make_host("lab-intel")
    made.emulated = replace(made.emulated, executes=True)
    yield made
    made.assert_nothing_left()


@pytest.fixture(params=["replaced", "copied"])
def memory(request, monkeypatch):
    """Private memory of the client is replaced by shared memory, or copied all the time."""
    if request.param == "copied":

        def traced(_number):
            raise PermissionError(1, "traced by somebody else")

        monkeypatch.setattr("kvmsim.interpose.remap.Tracee", traced)
    return request.param


@pytest.mark.parametrize(
    "case", ["basics", "seen", "spinlock", "pingpong", "changed", "kinds", "logged"]
)
def test_guest_code_does_what_its_client_expects(host, compiled, capfd, memory, case):
    status = host.run(compiled("code"), case)
    assert (*capfd.readouterr(), status) == ("", "", 0)


@pytest.mark.parametrize("kind", ["memfd", "shared", "anonymous"])
def test_no_write_of_a_client_is_lost_when_its_memory_is_shared(host, compiled, capfd, kind):
    status = host.run(compiled("memory"), kind)
    assert (*capfd.readouterr(), status) == ("", "", 0)


def test_guest_that_does_not_stop_is_interrupted_by_signals(host, compiled, capfd, memory):
    status = host.run(compiled("code"), "signalled")
    assert (*capfd.readouterr(), status) == ("", "", 0)


@pytest.mark.parametrize("preset", VENDORS)
def test_bus_locks_of_guest_code_are_counted_exactly(make_host, compiled, capfd, preset):
    host = make_host(preset)
    host.emulated = replace(host.emulated, executes=True)
    status = host.run(compiled("code"), "locks", 100_000, "split")
    assert (*capfd.readouterr(), status) == ("100000\n", "", 0)


@pytest.mark.parametrize("preset", VENDORS)
def test_aligned_locked_code_takes_no_bus_lock(make_host, compiled, capfd, preset):
    host = make_host(preset)
    host.emulated = replace(host.emulated, executes=True)
    status = host.run(compiled("code"), "locks", 0, "aligned")
    assert (*capfd.readouterr(), status) == ("", "", 0)


@pytest.mark.parametrize(
    ("how", "status"), [("exit", 0), ("kill", 128 + signal.SIGKILL), ("close", 0)]
)
def test_client_ends_while_its_guest_executes_and_nothing_stays(host, compiled, capfd, how, status):
    began = time.monotonic()
    assert host.run(compiled("code"), "forever", how) == status
    assert time.monotonic() - began < 60
    assert capfd.readouterr() == ("", "")


def test_vcpus_that_are_gone_keep_no_descriptors(host, compiled):
    gc.collect()
    gc.disable()
    before = _nr_of_memory()
    try:
        for _ in range(3):
            assert host.run(compiled("code"), "spinlock") == 0
        kept = _nr_of_memory()
    finally:
        gc.enable()
    assert kept == before


def _nr_of_memory():
    return sum("memfd:kvm" in _link(fd) for fd in os.listdir("/proc/self/fd"))


def _link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""  # the directory's own
