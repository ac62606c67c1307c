import os
import subprocess
import sys
from pathlib import Path

import pytest

from cgfs.control.errors import CommandError
from cgfs.control.runtime_dir import (
    Entry,
    RuntimeDir,
    candidates,
    find_entry,
    start_time,
)


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMSIM_RUNTIME_DIR", str(tmp_path / "kvmsim"))
    return RuntimeDir.mine()


def entry(directory="/srv/host", pid=None, **fields):
    pid = os.getpid() if pid is None else pid
    started = start_time(pid) or 0
    return Entry("kvmsim", directory, pid, started, os.geteuid(), **fields)


def test_session_directory_comes_first_then_run_for_root_and_tmp_for_others():
    assert candidates(1000, {"XDG_RUNTIME_DIR": "/run/user/1000"}) == [
        Path("/run/user/1000/kvmsim"),
        Path("/tmp/kvmsim-1000"),
    ]
    assert candidates(0, {}) == [Path("/run/kvmsim")]
    assert candidates(1000, {"XDG_RUNTIME_DIR": "relative"}) == [Path("/tmp/kvmsim-1000")]


def test_chosen_directory_is_the_only_one(runtime):
    assert candidates(0, {"KVMSIM_RUNTIME_DIR": "/x", "XDG_RUNTIME_DIR": "/y"}) == [Path("/x")]
    assert RuntimeDir.readable() == [runtime]


def test_chosen_directory_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert candidates(0, {"KVMSIM_RUNTIME_DIR": "run"}) == [tmp_path / "run"]


def test_directory_too_long_for_a_socket_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMSIM_RUNTIME_DIR", str(tmp_path / ("r" * 100)))
    with pytest.raises(CommandError, match="too long for the path of a socket"):
        RuntimeDir.mine()
    assert list(tmp_path.iterdir()) == []


def test_entry_that_cannot_be_written_is_named(runtime):
    digest = runtime.socket(Path("/srv/host")).stem
    (runtime.path / f"{digest}.new").symlink_to("/dev/full")
    with pytest.raises(CommandError, match=rf"{digest}\.json: No space left on device"):
        runtime.write(entry())


def test_directory_is_made_for_its_user_alone(runtime, tmp_path):
    assert runtime.path == tmp_path / "kvmsim"
    assert runtime.path.stat().st_mode & 0o777 == 0o700


def test_directory_that_others_can_read_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(
        "cgfs.control.runtime_dir.candidates", lambda _uid, _env: [tmp_path / "kvmsim"]
    )
    (tmp_path / "kvmsim").mkdir(mode=0o755)
    with pytest.raises(CommandError, match="not a directory of this user alone"):
        RuntimeDir.mine()


def test_symbolic_link_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cgfs.control.runtime_dir.candidates", lambda _uid, _env: [tmp_path / "kvmsim"]
    )
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "kvmsim").symlink_to("elsewhere")
    with pytest.raises(CommandError, match="no runtime directory"):
        RuntimeDir.mine()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make somebody else's directory")
def test_session_directory_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    monkeypatch.setattr(
        "cgfs.control.runtime_dir.candidates", lambda _uid, _env: [theirs / "kvmsim"]
    )
    with pytest.raises(CommandError, match="is not ours"):
        RuntimeDir.mine()


def test_entry_is_found_by_its_directory(runtime):
    runtime.write(entry("/srv/a"))
    found = find_entry(Path("/srv/a"))
    assert found == (runtime, entry("/srv/a"))
    assert find_entry(Path("/srv/b")) is None


def test_entry_of_a_running_process_is_alive(runtime):
    runtime.write(entry())
    assert runtime.entries()[0].alive


def test_entry_of_an_ended_process_is_stale():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stale = entry(pid=child.pid)
    assert stale.alive
    child.communicate()
    assert not stale.alive


def test_entry_is_stale_when_its_pid_was_used_again(runtime):
    mine = entry()
    reused = Entry(mine.kind, mine.directory, mine.pid, mine.started - 1, mine.uid)
    assert not reused.alive


def test_zombie_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None
    child.wait()


def test_entry_that_speaks_for_another_user_is_ignored(runtime):
    mine = entry()
    forged = Entry(mine.kind, mine.directory, mine.pid, mine.started, mine.uid + 1)
    runtime.write(forged)
    assert runtime.entries() == []


def test_broken_entry_is_ignored(runtime):
    (runtime.path / "0123.json").write_text("{")
    assert runtime.entries() == []


def test_remove_leaves_nothing(runtime):
    directory = Path("/srv/host")
    runtime.write(entry("/srv/host"))
    runtime.socket(directory).touch()
    runtime.log(directory).touch()
    runtime.remove(directory)
    assert list(runtime.path.iterdir()) == []


def test_lock_is_free_again_although_a_forked_copy_is_open(runtime):
    with runtime.locked():
        child = os.fork()
        if child == 0:
            os.read(os.open("/dev/zero", os.O_RDONLY), 1)
            os._exit(0)
    with runtime.locked():
        pass
    os.waitpid(child, 0)
