import os
import signal
import time

import pytest

from cgfs.control.errors import CommandError
from cgfs.control.launch import launch
from cgfs.control.runtime_dir import Entry, RuntimeDir

# The servers here mount nothing; what they leave is what is looked at.


@pytest.fixture
def runtime(tmp_path, monkeypatch, fuse):
    monkeypatch.setenv("KVMSIM_RUNTIME_DIR", str(tmp_path / "run"))
    return RuntimeDir.mine()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_server_is_registered_once_it_is_ready_and_no_longer_when_it_ended(runtime, tmp_path):
    def serve(launched):
        launched.ready()
        signal.sigwait({signal.SIGUSR1})

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    launch("cgfs", tmp_path / "tree", serve)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    entry = runtime.read(tmp_path / "tree")
    assert (entry.kind, entry.alive, entry.created) == ("cgfs", True, True)
    os.kill(entry.pid, signal.SIGUSR1)
    until(lambda: not entry.alive)
    assert list(runtime.path.iterdir()) == []
    assert not (tmp_path / "tree").exists()


def test_server_that_cannot_start_leaves_nothing(runtime, tmp_path):
    def serve(_launched):
        raise CommandError("no")

    with pytest.raises(CommandError, match="no"):
        launch("cgfs", tmp_path / "tree", serve)
    assert list(runtime.path.iterdir()) == []
    assert not (tmp_path / "tree").exists()


def test_leftovers_that_cannot_be_cleared_leave_no_directory(runtime, tmp_path):
    runtime.socket(tmp_path / "tree").mkdir()
    with pytest.raises(IsADirectoryError):
        launch("cgfs", tmp_path / "tree", lambda _launched: None)
    assert not (tmp_path / "tree").exists()


def test_directory_made_for_a_server_that_died_goes_with_the_next(runtime, tmp_path):
    directory = tmp_path / "tree"
    directory.mkdir()
    runtime.write(Entry("cgfs", str(directory), os.getpid(), 1, os.geteuid(), created=True))
    launch("cgfs", directory, lambda launched: launched.ready(), foreground=True)
    assert not directory.exists()


def test_server_that_breaks_later_leaves_its_log(runtime, tmp_path):
    def serve(launched):
        launched.ready()
        raise ZeroDivisionError("later")

    launch("cgfs", tmp_path / "tree", serve)
    entry = runtime.read(tmp_path / "tree")
    until(lambda: not entry.alive)
    assert "ZeroDivisionError: later" in runtime.log(tmp_path / "tree").read_text()


def test_foreground_server_is_registered_while_it_runs(runtime, tmp_path):
    seen = []

    def serve(launched):
        launched.ready()
        seen.append(runtime.read(tmp_path / "tree").pid)

    launch("cgfs", tmp_path / "tree", serve, foreground=True)
    assert seen == [os.getpid()]
    assert list(runtime.path.iterdir()) == []
