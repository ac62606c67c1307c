import os
import signal
import subprocess

import pytest

from cgfs.core.roots import Roots
from cgfs.procs.record import RecordedProcesses
from cgfs.procs.scan import ForkScan


@pytest.fixture
def record(tmp_path):
    return tmp_path / "record"


@pytest.fixture
def processes(record):
    processes = RecordedProcesses(ForkScan(), lambda: 0, Roots([]).tasks, record)
    yield processes
    processes.close()


@pytest.fixture
def sleepers():
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield started
    for sleeper in started:
        sleeper.kill()
        sleeper.wait()


def signs(record):
    return [line.split()[0] for line in record.read_text().splitlines()]


def test_frozen_process_is_recorded_until_it_goes_on(processes, sleepers, record):
    first, second = (sleeper.pid for sleeper in sleepers)
    processes.freeze(first)
    processes.freeze(second)
    processes.thaw(first)
    assert signs(record) == [f"+{first}", f"+{second}", f"-{first}"]


def test_record_goes_with_the_last_frozen_process(processes, sleepers, record):
    processes.freeze(sleepers[0].pid)
    assert record.exists()
    processes.thaw(sleepers[0].pid)
    assert not record.exists()


def test_process_that_was_stopped_before_is_not_recorded(processes, sleepers, record):
    pid = sleepers[0].pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    processes.freeze(pid)
    assert not record.exists()


def test_close_leaves_no_record(processes, sleepers, record):
    processes.freeze(sleepers[0].pid)
    processes.close()
    assert not record.exists()


def test_record_goes_with_a_frozen_process_that_ends(processes, sleepers, record):
    processes.watch(sleepers[0].pid)
    processes.freeze(sleepers[0].pid)
    sleepers[0].kill()
    sleepers[0].wait()
    processes.sync()
    assert not record.exists()


def test_process_is_frozen_although_the_disk_of_the_record_is_full(
    processes, sleepers, record, caplog
):
    record.symlink_to("/dev/full")
    processes.freeze(sleepers[0].pid)
    os.waitid(os.P_PID, sleepers[0].pid, os.WSTOPPED)
    assert "No space left on device" in caplog.text
    processes.thaw(sleepers[0].pid)
    os.waitid(os.P_PID, sleepers[0].pid, os.WCONTINUED)
