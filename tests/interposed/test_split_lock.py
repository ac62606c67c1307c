"""Guests of real code that take split locks on a host whose processor detects them."""

import signal
import time
from dataclasses import replace

import pytest

LAB = """vendor = "intel"
[bus-lock]
exit = "trap"
split-lock-detect = true
[kernel]
split-lock-detect = "{}"
"""


@pytest.fixture
def run(make_host, compiled, capfd, tmp_path):
    """Let a guest take split locks; what the client printed, and its exit status."""

    def run(mode, *args):
        preset = tmp_path / "lab.toml"
        preset.write_text(LAB.format(mode))
        host = make_host(str(preset))
        host.emulated = replace(host.emulated, executes=True)
        status = host.run(compiled("code"), "locks", *args)
        return capfd.readouterr().out, status

    return run


def test_fatal_ends_the_client_by_sigbus(run):
    assert run("fatal", 3, "split") == ("", 128 + signal.SIGBUS)


def test_warn_lets_every_lock_happen_and_the_thread_sleep(run):
    began = time.monotonic()
    assert run("warn", 50, "split") == ("50\n", 0)
    assert time.monotonic() - began >= 0.010


def test_off_leaves_them_to_the_bus_lock_exit(run):
    assert run("off", 50, "split") == ("50\n", 0)
