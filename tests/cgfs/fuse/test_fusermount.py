from __future__ import annotations

import pytest

from cgfs.errors import MountError
from cgfs.fuse import fusermount


def test_a_directory_is_accepted_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert fusermount.check("here") == str(tmp_path / "here")


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(MountError, match="no such directory"):
        fusermount.check(str(tmp_path / "missing"))


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="is not a directory"):
        fusermount.check(str(tmp_path / "file"))


def test_a_mount_point_is_refused_unless_it_is_to_be_covered():
    with pytest.raises(MountError, match="already a mount point"):
        fusermount.check("/proc")
    assert fusermount.check("/proc", over=True) == "/proc"


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("user_allow_other\n", True),
        ("mount_max = 5\n  user_allow_other  \n", True),
        ("#user_allow_other\n", False),
        ("", False),
    ],
)
def test_user_allow_other_is_a_line_of_its_own(tmp_path, text, allowed):
    (tmp_path / "fuse.conf").write_text(text)
    assert fusermount.user_allow_other(tmp_path / "fuse.conf") is allowed


def test_without_a_configuration_others_are_not_allowed(tmp_path):
    assert not fusermount.user_allow_other(tmp_path / "none")


def test_commas_and_backslashes_in_names_are_not_options():
    assert fusermount._escape("a,b\\c") == "a\\,b\\\\c"
