import errno
import os
import signal
from pathlib import Path

import pytest

from cgfs.control import place
from cgfs.control.errors import CommandError
from cgfs.control.mountpoints import mount_at
from cgfs.control.place import Place, check_device, clear, prepare


def refusal(*arguments, **options):
    with pytest.raises(CommandError) as caught:
        prepare(*arguments, **options)
    return caught.value


def test_missing_directory_is_created_and_taken_away_if_nothing_comes_of_it(tmp_path):
    found = prepare(tmp_path / "host", "kvmsim down")
    assert found == Place(tmp_path / "host", created=True)
    assert (tmp_path / "host").is_dir()
    found.abandon()
    assert not (tmp_path / "host").exists()


def test_present_directory_is_not_taken_away(tmp_path):
    found = prepare(tmp_path, "kvmsim down")
    found.abandon()
    assert (found.created, tmp_path.is_dir()) == (False, True)


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert prepare(tmp_path / "link", "kvmsim down").directory == tmp_path / "real"


def test_parent_is_not_created(tmp_path):
    failure = refusal(tmp_path / "none/host", "kvmsim down")
    assert (failure.exit_code, failure.errno) == (os.EX_UNAVAILABLE, errno.ENOENT)


def test_path_that_is_not_utf8_is_refused_and_not_created(tmp_path):
    directory = tmp_path / os.fsdecode(b"bad\xff")
    failure = refusal(directory, "kvmsim down")
    assert (failure.exit_code, failure.message) == (
        os.EX_USAGE,
        rf"{tmp_path}/bad\xff: the path is not UTF-8 text",
    )
    assert not directory.exists()


def test_directory_with_content_is_refused_unless_it_may_disappear(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path, "kvmsim down").errno == errno.ENOTEMPTY
    assert prepare(tmp_path, "kvmsim down", nonempty=True).directory == tmp_path


def test_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file", "kvmsim down").errno == errno.ENOTDIR


def test_mount_of_another_kind_is_refused():
    assert refusal(Path("/proc"), "kvmsim down").errno == errno.EBUSY


def test_missing_device_is_unavailable(tmp_path):
    with pytest.raises(CommandError) as caught:
        check_device(tmp_path / "fuse")
    assert caught.value.exit_code == os.EX_UNAVAILABLE


def test_clear_ends_a_server_that_hangs(shell, fuse, monkeypatch):
    monkeypatch.setattr(place, "STOP_SECONDS", 0.2)
    monkeypatch.setenv("KVMSIM_RUNTIME_DIR", shell.environment["KVMSIM_RUNTIME_DIR"])
    assert shell.cgfs("mount", "tree").returncode == 0
    os.kill(shell.server(), signal.SIGSTOP)
    cleared = clear(shell.home / "tree", "cgfs")
    assert cleared.was_alive
    assert mount_at(shell.home / "tree") is None


def test_clear_leaves_the_other_kind_alone(shell, fuse, monkeypatch):
    monkeypatch.setenv("KVMSIM_RUNTIME_DIR", shell.environment["KVMSIM_RUNTIME_DIR"])
    assert shell.cgfs("mount", "tree").returncode == 0
    with pytest.raises(CommandError, match="no kvmsim is mounted here"):
        clear(shell.home / "tree", "kvmsim")
    assert mount_at(shell.home / "tree") is not None
    assert shell.cgfs("umount", "tree").returncode == 0
