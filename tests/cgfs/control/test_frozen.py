import os
import signal
import subprocess
import sys

import pytest

from cgfs.control.frozen import parse, thaw_recorded
from cgfs.control.runtime_dir import start_time


@pytest.fixture
def stopped():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    yield process
    process.kill()
    process.communicate()


def went_on(process):
    found = os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOHANG)
    return found is not None and found.si_code == os.CLD_CONTINUED


def record_of(tmp_path, text):
    (tmp_path / "record").write_text(text)
    return tmp_path / "record"


def test_recorded_process_goes_on_and_the_record_goes(stopped, tmp_path):
    record = record_of(tmp_path, f"+{stopped.pid} {start_time(stopped.pid)}\n")
    assert thaw_recorded(record, os.geteuid()) == [stopped.pid]
    assert went_on(stopped)
    assert not record.exists()


def test_other_process_of_that_number_is_left_alone(stopped, tmp_path):
    record = record_of(tmp_path, f"+{stopped.pid} {start_time(stopped.pid) - 1}\n")
    assert thaw_recorded(record, os.geteuid()) == []
    assert not went_on(stopped)


def test_process_of_another_user_is_left_alone(stopped, tmp_path):
    record = record_of(tmp_path, f"+{stopped.pid} {start_time(stopped.pid)}\n")
    assert thaw_recorded(record, os.geteuid() + 1) == []
    assert not went_on(stopped)


def test_process_that_has_ended_is_no_error(tmp_path):
    assert thaw_recorded(record_of(tmp_path, "+4194303 1\n"), 0) == []


def test_no_record_is_nothing_to_do(tmp_path):
    assert thaw_recorded(tmp_path / "none", 0) == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("+1 10\n+2 20\n-1 10\n", {2: 20}),
        ("+1 10\n-1 10\n+1 10\n", {1: 10}),
        ("-1 10\n", {}),
        ("+1 10\n+2 2", {1: 10}),
        ("nonsense\n+1\n+1 10\n", {1: 10}),
        ("", {}),
    ],
)
def test_last_line_about_a_process_counts(text, left):
    assert parse(text) == left
