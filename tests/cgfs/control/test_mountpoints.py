import os
from pathlib import Path

import pytest

from cgfs.control.errors import CommandError
from cgfs.control.mountpoints import (
    Mount,
    mount_at,
    parse_mountinfo,
    resolve,
    unmount,
    users_below,
)

MOUNTINFO = r"""
24 30 0:22 / /proc rw,nosuid - proc proc rw
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 master:1 - cgroup2 cgroup2 rw
90 30 0:60 / /home/a\040b\134c rw,nosuid - fuse.kvmsim lab\040amd rw,user_id=1000,group_id=1000
""".lstrip()


def test_mountinfo_gives_directory_type_source_and_user():
    mounts = list(parse_mountinfo(MOUNTINFO))
    assert mounts == [
        Mount(Path("/proc"), "proc", "proc"),
        Mount(Path("/sys/fs/cgroup/unified"), "cgroup2", "cgroup2"),
        Mount(Path("/home/a b\\c"), "fuse.kvmsim", "lab amd", 1000),
    ]


def test_mount_point_is_found_and_another_directory_is_not(tmp_path):
    found = mount_at(Path("/proc"))
    assert found is not None
    assert found.fstype == "proc"
    assert mount_at(tmp_path) is None


def test_resolve_follows_symbolic_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve(tmp_path / "link") == (tmp_path / "real").resolve()


def test_resolve_of_a_missing_directory_is_enoent(tmp_path):
    with pytest.raises(FileNotFoundError):
        resolve(tmp_path / "none")


def test_unmount_of_what_is_not_mounted_fails_with_one_line(tmp_path):
    with pytest.raises(CommandError, match="cannot unmount"):
        unmount(tmp_path)


def test_process_with_an_open_file_below_is_a_user(tmp_path):
    with (tmp_path / "file").open("w"):
        assert os.getpid() in [user.pid for user in users_below(tmp_path)]


def test_process_with_a_file_beside_is_not_a_user(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    with (tmp_path / "in-beside").open("w"):
        assert users_below(inside) == []
