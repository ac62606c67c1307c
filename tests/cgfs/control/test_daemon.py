import errno
import os
import signal
import time
from pathlib import Path

import pytest

from cgfs.control import daemon
from cgfs.control.daemon import Readiness, start
from cgfs.control.errors import CommandError
from cgfs.control.runtime_dir import start_time


def wait_gone(pid):
    deadline = time.monotonic() + 5
    while start_time(pid) is not None:
        assert time.monotonic() < deadline, f"pid {pid} still runs"
        time.sleep(0.01)


def descriptors(pid):
    return sorted(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())


def wait_for_term(readiness):
    readiness.ready()
    signal.pause()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def server(log):
    pid = start(wait_for_term, log)
    yield pid
    os.kill(pid, signal.SIGTERM)
    wait_gone(pid)


def test_command_goes_on_when_the_server_is_ready(server):
    assert Path(f"/proc/{server}").exists()


def test_server_has_its_own_session_and_no_descriptor_of_the_command(server):
    assert os.getsid(server) not in {os.getsid(0), server}
    deadline = time.monotonic() + 5
    while (found := descriptors(server)) != [0, 1, 2]:  # the pipe goes after its last word
        assert time.monotonic() < deadline, found
    assert Path(f"/proc/{server}/cwd").readlink() == Path("/")


def test_failure_of_the_server_is_the_failure_of_the_command(log):
    def serve(_readiness):
        raise CommandError("no such device", os.EX_UNAVAILABLE, 19)

    with pytest.raises(CommandError) as caught:
        start(serve, log)
    assert (caught.value.message, caught.value.exit_code) == ("no such device", 69)


def test_bug_in_the_server_is_told_in_one_line_and_logged_whole(log):
    def serve(_readiness):
        raise ZeroDivisionError("in the server")

    with pytest.raises(CommandError, match="internal error: ZeroDivisionError: in the server"):
        start(serve, log)
    assert "Traceback" in log.read_text()


def test_failure_of_the_server_is_told_although_its_log_is_on_a_full_disk():
    def serve(_readiness):
        raise CommandError("no such device", os.EX_UNAVAILABLE, 19)

    with pytest.raises(CommandError, match=r"^no such device$"):
        start(serve, Path("/dev/full"))


def test_system_error_in_the_server_names_the_file(log):
    def serve(_readiness):
        raise OSError(errno.ENOSPC, "No space left on device", "/run/entry")

    with pytest.raises(CommandError, match=r"^/run/entry: No space left on device$") as caught:
        start(serve, log)
    assert caught.value.exit_code == os.EX_OSERR


def test_server_that_dies_early_is_told_with_its_last_words(log):
    def serve(_readiness):
        os.write(2, b"something\nfatal words\n")
        os._exit(3)

    with pytest.raises(CommandError, match="ended before it was ready: fatal words"):
        start(serve, log)


def test_server_that_never_gets_ready_is_ended(log, monkeypatch):
    monkeypatch.setattr(daemon, "READY_SECONDS", 0.1)
    seen = log.with_name("pid")

    def serve(_readiness):
        seen.write_text(str(os.getpid()))
        signal.pause()

    with pytest.raises(CommandError, match="not ready after"):
        start(serve, log)
    wait_gone(int(seen.read_text()))


def test_foreground_server_tells_nobody_but_its_caller():
    told = []
    readiness = Readiness(when_ready=lambda: told.append("ready"))
    readiness.ready()
    assert told == ["ready"]
