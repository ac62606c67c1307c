"""Depth and descendant limits: rows F.6, 114 to 118."""

import os
import time

from conformance.calls import attempt, flat, read, write


def mkdir(path):
    return attempt(os.mkdir, path)


def test_row_114_max_descendants_counts_the_whole_subtree(d, observe):
    (d / "c").mkdir()
    write(d / "cgroup.max.descendants", b"1")
    observe("child", mkdir(d / "n"), "EAGAIN")
    observe("grandchild", mkdir(d / "c" / "n"), "EAGAIN")


def test_row_115_a_limit_below_the_count_refuses_only_new_ones(d, observe):
    (d / "c").mkdir()
    observe("set", write(d / "cgroup.max.descendants", b"0"), 1)
    observe("mkdir", mkdir(d / "n"), "EAGAIN")
    observe("there", (d / "c").exists(), True)
    (d / "c").rmdir()
    observe("after rmdir", mkdir(d / "n"), "EAGAIN")
    write(d / "cgroup.max.descendants", b"max")
    observe("after raising", mkdir(d / "n"), "ok")


def test_row_116_names_are_checked_before_the_limit(d, observe):
    (d / "c").mkdir()
    write(d / "cgroup.max.descendants", b"1")
    observe("existing", mkdir(d / "c"), "EEXIST")
    observe("control file", mkdir(d / "cgroup.procs"), "EEXIST")
    observe("newline", mkdir(d / "a\nb"), "EINVAL")


def test_row_117_max_depth_counts_from_where_it_is_set(d, observe):
    (d / "c").mkdir()
    write(d / "cgroup.max.depth", b"1")
    observe("1: child", mkdir(d / "x"), "ok")
    observe("1: grandchild", mkdir(d / "c" / "g"), "EAGAIN")
    write(d / "cgroup.max.depth", b"0")
    observe("0: child", mkdir(d / "n"), "EAGAIN")
    write(d / "cgroup.max.depth", b"2")
    observe("2: depth 2", mkdir(d / "c" / "g"), "ok")
    observe("2: depth 3", mkdir(d / "c" / "g" / "n"), "EAGAIN")


def test_row_118_removed_cgroups_are_soon_forgotten(d, observe):
    for name in "abc":
        (d / name).mkdir()
    for name in "abc":
        (d / name).rmdir()
    observe("few at first", flat(d / "cgroup.stat", "nr_dying_descendants") in range(4), True)
    deadline = time.monotonic() + 3
    while flat(d / "cgroup.stat", "nr_dying_descendants") and time.monotonic() < deadline:
        time.sleep(0.02)
    observe("then none", flat(d / "cgroup.stat", "nr_dying_descendants"), 0)
    observe("descendants", flat(d / "cgroup.stat", "nr_descendants"), 0)


def test_c3_the_root_has_limits_too(world, observe):
    for name in ("cgroup.max.depth", "cgroup.max.descendants"):
        observe(name, read(world.root / name), b"max\n")
