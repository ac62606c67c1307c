"""The tree of a mount: inodes, attributes and the write pipeline (spec 0.1, C.5)."""

import stat

import pytest

from cgfs.core.caller import KERNEL
from cgfs.views.static import Directory, TextFile
from cgfs.views.tree import ROOT, Tree


class Heard:
    def __init__(self):
        self.calls = []

    def modified(self, ino):
        self.calls.append(("modified", ino))

    def changed(self, ino):
        self.calls.append(("changed", ino))

    def added(self, parent, name):
        self.calls.append(("added", parent, name))

    def removed(self, parent, name, ino):
        self.calls.append(("removed", parent, name, ino))


@pytest.fixture
def tree(roots):
    return Tree(roots, roots.v2.root, epoch_ns=1_000)


@pytest.fixture
def heard(tree):
    tree.listener = Heard()
    return tree.listener.calls


@pytest.fixture
def d(tree):
    return tree.mkdir(ROOT, b"d", 0o755, KERNEL, 5)


def names(tree, ino):
    return [name for name, _ in tree.readdir(ino)]


def test_root_is_inode_1_and_read_only_for_others(tree):
    attr = tree.getattr(ROOT)
    assert (attr.ino, attr.mode, attr.nlink) == (1, stat.S_IFDIR | 0o555, 2)


def test_every_listed_name_is_found_under_its_inode(tree, d):
    assert [tree.lookup(d, name) for name, _ in tree.readdir(d)] == [i for _, i in tree.readdir(d)]


def test_lookup_of_nothing_is_none(tree, d):
    assert tree.lookup(d, b"none") is None


def test_lookup_below_a_file_is_enotdir(tree, d, fails_with):
    with fails_with("ENOTDIR"):
        tree.lookup(tree.lookup(d, b"cgroup.procs"), b"x")


def test_fresh_directory_lists_the_core_files(tree, d):
    assert names(tree, d) == [
        b"cgroup.type",
        b"cgroup.procs",
        b"cgroup.threads",
        b"cgroup.controllers",
        b"cgroup.subtree_control",
        b"cgroup.events",
        b"cgroup.max.descendants",
        b"cgroup.max.depth",
        b"cgroup.stat",
        b"cgroup.freeze",
        b"cgroup.kill",
    ]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (b"cgroup.procs", 0o644),
        (b"cgroup.controllers", 0o444),
        (b"cgroup.kill", 0o200),
        (b"cgroup.events", 0o444),
    ],
)
def test_modes_of_fresh_files(tree, d, name, mode):
    assert tree.getattr(tree.lookup(d, name)).mode == stat.S_IFREG | mode


def test_size_is_exact_for_config_and_0_for_live_files(tree, d):
    assert tree.getattr(tree.lookup(d, b"cgroup.type")).size == len("domain\n")
    assert tree.getattr(tree.lookup(d, b"cgroup.events")).size == 0


def test_nlink_counts_children(tree, d):
    tree.mkdir(d, b"c", 0o755, KERNEL, 6)
    assert tree.getattr(d).nlink == 3


def test_mkdir_moves_the_parents_mtime_even_after_utimes(tree, d):
    tree.setattr(d, mtime_ns=1)
    assert tree.getattr(d).mtime_ns == 1
    tree.mkdir(d, b"c", 0o755, KERNEL, 9)
    assert tree.getattr(d).mtime_ns == 1_009


def test_set_attributes_persist_on_one_file_only(tree, d):
    procs = tree.lookup(d, b"cgroup.procs")
    tree.setattr(procs, mode=0o600, uid=7, gid=8)
    attr = tree.getattr(procs)
    assert (attr.mode & 0o7777, attr.uid, attr.gid) == (0o600, 7, 8)
    assert tree.getattr(tree.lookup(d, b"cgroup.threads")).uid == 0


def test_write_longer_than_a_page_is_e2big_before_anything(tree, d, fails_with):
    with fails_with("E2BIG"):
        tree.write(tree.lookup(d, b"cgroup.events"), b"7" + b" " * 4096, KERNEL, 0)


def test_write_of_a_page_is_taken(tree, d):
    depth = tree.lookup(d, b"cgroup.max.depth")
    tree.write(depth, b"7" + b" " * 4095, KERNEL, 0)
    assert tree.read(depth, KERNEL) == b"7\n"


def test_write_without_handler_is_einval_but_empty_is_not(tree, d, fails_with):
    events = tree.lookup(d, b"cgroup.events")
    tree.write(events, b"", KERNEL, 0)
    with fails_with("EINVAL"):
        tree.write(events, b"1", KERNEL, 0)


def test_write_ends_at_nul(tree, d):
    depth = tree.lookup(d, b"cgroup.max.depth")
    tree.write(depth, b"5\0junk", KERNEL, 0)
    assert tree.read(depth, KERNEL) == b"5\n"


def test_read_without_handler_is_einval(tree, d, fails_with):
    with fails_with("EINVAL"):
        tree.read(tree.lookup(d, b"cgroup.kill"), KERNEL)


def test_removed_files_answer_enodev_while_known(tree, d, fails_with):
    procs = tree.lookup(d, b"cgroup.procs")
    held = {procs}
    tree.known = held.__contains__
    tree.rmdir(ROOT, b"d", KERNEL, 0)
    with fails_with("ENODEV"):
        tree.read(procs, KERNEL)
    with fails_with("ENODEV"):
        tree.write(procs, b"", KERNEL, 0)
    with fails_with("E2BIG"):
        tree.write(procs, b" " * 4097, KERNEL, 0)
    assert tree.getattr(procs).nlink == 1
    assert not tree.alive(procs)
    held.clear()
    tree.forget(procs)
    with fails_with("ENOENT"):
        tree.getattr(procs)


def test_removed_node_nobody_knows_is_dropped_at_once(tree, roots):
    before = len(roots.nodes)
    tree.mkdir(ROOT, b"x", 0o755, KERNEL, 0)
    tree.rmdir(ROOT, b"x", KERNEL, 0)
    assert len(roots.nodes) == before


def test_removed_directory_lists_nothing_and_finds_nothing(tree, d, fails_with):
    tree.known = {d}.__contains__
    tree.rmdir(ROOT, b"d", KERNEL, 0)
    assert tree.readdir(d) == []
    with fails_with("ENOENT"):
        tree.lookup(d, b"cgroup.procs")
    with fails_with("ENOENT"):
        tree.mkdir(d, b"x", 0o755, KERNEL, 0)


def test_rmdir_refusals(tree, d, fails_with):
    with fails_with("ENOENT"):
        tree.rmdir(ROOT, b"none", KERNEL, 0)
    with fails_with("ENOTDIR"):
        tree.rmdir(d, b"cgroup.procs", KERNEL, 0)


def test_rename_is_eperm_and_einval_with_flags(tree, d, fails_with):
    with fails_with("EPERM"):
        tree.rename(ROOT, b"d", ROOT, b"e", 0)
    with fails_with("EINVAL"):
        tree.rename(ROOT, b"d", ROOT, b"e", 1)


def test_v1_rename_of_a_file_is_enotdir(roots, fails_with):
    hierarchy = roots.mount_v1(["misc"])
    tree = Tree(roots, hierarchy.root)
    tree.mkdir(ROOT, b"a", 0o755, KERNEL, 0)
    with fails_with("ENOTDIR"):
        tree.rename(ROOT, b"tasks", ROOT, b"t", 0)
    tree.rename(ROOT, b"a", ROOT, b"b", 0)
    assert tree.lookup(ROOT, b"a") is None
    assert tree.lookup(ROOT, b"b") is not None


def test_file_names_that_are_no_utf8_survive(tree):
    tree.mkdir(ROOT, b"\xff\xfe", 0o755, KERNEL, 0)
    assert b"\xff\xfe" in names(tree, ROOT)


def test_xattrs_are_listed_by_name_downwards(tree, d):
    for name in (b"user.m", b"user.ab", b"trusted.q", b"user.a"):
        tree.setxattr(d, name, b"")
    assert tree.listxattr(d) == [b"user.m", b"user.ab", b"user.a", b"trusted.q"]


def test_xattrs_keep_their_limits(tree, d, fails_with):
    for index in range(128):
        tree.setxattr(d, b"user.%d" % index, b"")
    with fails_with("ENOSPC"):
        tree.setxattr(d, b"user.more", b"")
    tree.setxattr(d, b"trusted.more", b"1")
    assert b"trusted.more" in tree.listxattr(d)
    tree.removexattr(d, b"user.0")
    with fails_with("ENODATA"):
        tree.getxattr(d, b"user.0")


def test_xattr_of_another_prefix_is_eopnotsupp(tree, d, fails_with):
    with fails_with("EOPNOTSUPP"):
        tree.setxattr(d, b"system.a", b"")


@pytest.mark.parametrize("prefix", [b"user.", b"trusted.", b"security."])
def test_xattr_with_nothing_behind_the_prefix_is_einval(tree, d, fails_with, prefix):
    with fails_with("EINVAL"):
        tree.setxattr(d, prefix, b"")


def test_controller_file_loses_its_attributes_when_disabled(tree, d):
    control = tree.lookup(ROOT, b"cgroup.subtree_control")
    tree.write(control, b"+misc", KERNEL, 0)
    first = tree.lookup(d, b"misc.max")
    tree.setattr(first, mode=0o600)
    tree.setxattr(first, b"user.a", b"")
    tree.write(control, b"-misc", KERNEL, 0)
    tree.write(control, b"+misc", KERNEL, 0)
    second = tree.lookup(d, b"misc.max")
    assert second != first
    assert tree.getattr(second).mode & 0o7777 == 0o644
    assert tree.listxattr(second) == []


def test_listener_hears_of_files_that_come_and_go(tree, d, heard):
    control = tree.lookup(ROOT, b"cgroup.subtree_control")
    tree.write(control, b"+encryption_ids", KERNEL, 0)
    added = [call[2] for call in heard if call[0] == "added"]
    assert added == [
        b"encryption_ids.sev.max",
        b"encryption_ids.sev.current",
        b"encryption_ids.sev_es.max",
        b"encryption_ids.sev_es.current",
    ]
    heard.clear()
    tree.write(control, b"-encryption_ids", KERNEL, 0)
    assert [call[2] for call in heard if call[0] == "removed"] == added


def test_path_of_a_number_nobody_holds_is_none(tree, d):
    tree.rmdir(ROOT, b"d", KERNEL, 0)
    assert tree.path(d) is None


def test_events_file_counts_per_file(tree, roots, d, heard):
    events = tree.lookup(d, b"cgroup.events")
    tree.write(tree.lookup(d, b"cgroup.freeze"), b"1", KERNEL, 0)
    assert tree.sequence(events) == 1
    assert ("modified", events) in heard


def test_host_root_nests_the_hierarchy(roots, fails_with):
    top = Directory(roots)
    top.subdirectory(roots, "sys/fs").entries["cgroup"] = roots.v2.root
    top.entries["note"] = TextFile(roots, lambda: "emulated\n")
    tree = Tree(roots, top)
    sys_fs = tree.lookup(tree.lookup(ROOT, b"sys"), b"fs")
    cgroup = tree.lookup(sys_fs, b"cgroup")
    assert tree.read(tree.lookup(ROOT, b"note"), KERNEL) == b"emulated\n"
    assert tree.read(tree.lookup(cgroup, b"misc.capacity"), KERNEL) == b"sev 4\n"
    made = tree.mkdir(cgroup, b"d", 0o755, KERNEL, 0)
    assert tree.path(tree.lookup(made, b"cgroup.events")) == b"sys/fs/cgroup/d/cgroup.events"
    with fails_with("EPERM"):
        tree.mkdir(ROOT, b"d", 0o755, KERNEL, 0)
    with fails_with("EBUSY"):
        tree.rmdir(sys_fs, b"cgroup", KERNEL, 0)


def test_static_directory_comes_and_goes(roots):
    top = Directory(roots)
    tree = Tree(roots, top)
    tree.listener = heard = Heard()
    below = Directory(roots, {"exits": TextFile(roots, lambda: "7\n")})
    tree.insert(top, "vm", below)
    ino = tree.lookup(tree.lookup(ROOT, b"vm"), b"exits")
    assert tree.read(ino, KERNEL) == b"7\n"
    tree.remove(top, "vm")
    assert tree.lookup(ROOT, b"vm") is None
    assert [call[0] for call in heard.calls] == ["added", "removed", "removed"]
    assert len(roots.nodes) == len({n for n in roots.nodes if roots.nodes[n].online})


def test_rows_changed_by_rmdir_names_them_for_threaded_cgroups_only(tree, d):
    child = tree.mkdir(d, b"t", 0o755, KERNEL, 0)
    assert tree.rows_changed_by_rmdir(child) == ()
    tree.write(tree.lookup(child, b"cgroup.type"), b"threaded", KERNEL, 0)
    assert tree.rows_changed_by_rmdir(child) == ("cgroup.type", "cgroup.controllers")
