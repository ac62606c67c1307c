"""No reader sees a value older than a change that was acknowledged, whatever was cached."""

from __future__ import annotations

import errno
import os
import time

import pytest

QUIET_S = 0.3


def read(path):
    return path.read_bytes().decode()


def write(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        return os.write(fd, text.encode())
    finally:
        os.close(fd)


@pytest.fixture
def cached(root):
    """Reads a file until its text is in the page cache."""

    def warm(path):
        time.sleep(QUIET_S)
        read(path)
        return read(path)

    return warm


def test_a_limit_reads_as_written_whatever_its_length(root, cached):
    limit = root / "cgroup.max.depth"
    seen = []
    for value in ("7", "1000000", "12", "max", "3"):
        cached(limit)
        write(limit, value)
        seen.append(read(limit))
    assert seen == ["7\n", "1000000\n", "12\n", "max\n", "3\n"]


def test_a_descriptor_held_across_a_change_reads_the_new_text(root, cached):
    limit = root / "cgroup.max.depth"
    write(limit, "100")
    cached(limit)
    with open(limit, "rb", buffering=0) as held:
        before = held.read()
        write(limit, "200")
        middle = os.pread(held.fileno(), 100, 0)
        write(limit, "30000")
        after = os.pread(held.fileno(), 100, 0)
    assert (before, middle, after) == (b"100\n", b"200\n", b"30000\n")


def test_many_writes_through_one_descriptor_are_seen(root, cached):
    limit = root / "cgroup.max.depth"
    write(limit, "1")
    cached(limit)
    with open(limit, "wb", buffering=0) as file:
        file.writelines(b"%d" % number for number in range(10, 3010))
    time.sleep(QUIET_S)
    assert read(limit) == "3009\n"


def test_a_refused_write_leaves_the_old_text(root, cached):
    limit = root / "cgroup.max.depth"
    write(limit, "12345")
    cached(limit)
    with pytest.raises(OSError, match="Invalid argument"):
        write(limit, "nonsense that is longer")
    assert read(limit) == "12345\n"


def test_enabling_a_controller_changes_cgroup_controllers_of_children(root, cached):
    (root / "a").mkdir()
    available = root / "a" / "cgroup.controllers"
    before = cached(available)
    write(root / "cgroup.subtree_control", "-misc")
    middle = read(available)
    write(root / "cgroup.subtree_control", "+misc -encryption_ids")
    after = read(available)
    (root / "a").rmdir()
    assert (before, middle, after) == ("encryption_ids misc\n", "encryption_ids\n", "misc\n")


def test_a_child_held_open_sees_the_controllers_change(root, cached):
    (root / "a").mkdir()
    cached(root / "a" / "cgroup.controllers")
    with open(root / "a" / "cgroup.controllers", "rb", buffering=0) as held:
        held.read()
        write(root / "cgroup.subtree_control", "-misc")
        after = os.pread(held.fileno(), 100, 0)
    (root / "a").rmdir()
    assert after == b"encryption_ids\n"


def test_files_of_a_controller_come_and_go_with_it(root):
    (root / "a").mkdir()
    limit = root / "a" / "misc.max"
    seen = [limit.exists()]
    for word in ("-misc", "+misc", "-misc"):
        write(root / "cgroup.subtree_control", word)
        seen.append(limit.exists())
    (root / "a").rmdir()
    assert seen == [True, False, True, False]


def test_a_thread_root_is_a_domain_again_after_its_last_threaded_child(root, cached):
    for path in ("a", "a/b"):
        (root / path).mkdir()
    write(root / "a" / "b" / "cgroup.type", "threaded")
    kind = root / "a" / "cgroup.type"
    before = cached(kind)
    with open(kind, "rb") as held:
        held.read()
        (root / "a" / "b").rmdir()
    after = read(kind)
    (root / "a").rmdir()
    assert (before, after) == ("domain threaded\n", "domain\n")


def test_descriptors_of_a_removed_cgroup_say_enodev(root, cached):
    (root / "a").mkdir()
    cached(root / "a" / "cgroup.max.depth")
    errors = []
    with (
        open(root / "a" / "cgroup.max.depth", "rb", buffering=0) as config,
        open(root / "a" / "cgroup.stat", "rb", buffering=0) as live,
    ):
        config.read()
        live.read()
        (root / "a").rmdir()
        for file in (config, live):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at below
                os.pread(file.fileno(), 100, 0)
            errors.append(caught.value.errno)
    assert errors == [errno.ENODEV, errno.ENODEV]


def test_a_capacity_changed_by_the_server_is_seen_once_acknowledged(mounted_cgfs, root, cached):
    seen = []
    for amount in (7, 70000, 12):
        cached(root / "misc.capacity")
        mounted_cgfs.ask("capacity", resource="sev", amount=amount)
        seen.append(read(root / "misc.capacity"))
    assert seen == ["sev 7\n", "sev 70000\n", "sev 12\n"]


def test_a_capacity_changed_behind_the_adapter_is_seen_shortly_after(mounted_cgfs, root, cached):
    cached(root / "misc.capacity")
    mounted_cgfs.ask("capacity, bare", resource="sev", amount=70000)
    time.sleep(QUIET_S)
    assert read(root / "misc.capacity") == "sev 70000\n"


def test_directories_made_by_the_server_appear(mounted_cgfs, root):
    before = (root / "a").exists(), os.stat(root).st_nlink
    mounted_cgfs.ask("mkdir", path="/a")
    time.sleep(0.1)
    middle = (root / "a").exists(), os.stat(root).st_nlink
    mounted_cgfs.ask("rmdir", path="/a")
    time.sleep(0.1)
    after = (root / "a").exists(), os.stat(root).st_nlink
    assert (before, middle, after) == ((False, 2), (True, 3), (False, 2))


def test_removed_cgroups_are_forgotten_when_nobody_refers_to_them(mounted_cgfs, root):
    before = mounted_cgfs.ask("nodes")
    for number in range(50):
        (root / f"a{number}").mkdir()
        os.listdir(root / f"a{number}")
        read(root / f"a{number}" / "misc.max")
        (root / f"a{number}").rmdir()
    with open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("2")
    time.sleep(0.2)
    assert mounted_cgfs.ask("nodes") == before


def test_a_listing_longer_than_one_reply_is_complete(root):
    names = {f"a-rather-long-name-for-a-cgroup-{number}" for number in range(300)}
    for name in names:
        (root / name).mkdir()
    listed = [entry for entry in os.listdir(root) if entry.startswith("a-rather")]
    for name in names:
        (root / name).rmdir()
    assert (len(listed), set(listed)) == (300, names)


def test_half_a_text_goes_on_as_it_was_when_begun(root):
    limit = root / "cgroup.max.depth"
    write(limit, "12345")
    with open(limit, "rb", buffering=0) as file:
        first = file.read(2)
        write(limit, "678")
        rest = file.read(100)
        again = os.pread(file.fileno(), 100, 0)
    assert (first, rest, again) == (b"12", b"345\n", b"678\n")
