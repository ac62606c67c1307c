"""Ownership and delegation: rows F.9 and C.6. Everything by uid 65534 unless said."""

import os

import pytest
from conformance.calls import (
    attempt,
    eventually,
    flat,
    numbers,
    open_and_close,
    opened,
    read,
    write,
)
from conformance.kids import NOBODY, Kid, become, fork_sleeper, seteuid

DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")


@pytest.fixture
def delegated(d):
    """D/a, given to uid 65534 with the three files that go with it."""
    (d / "a").mkdir()
    give(d / "a")
    return d / "a"


@pytest.fixture
def nobody(kids):
    """An unprivileged process in the root cgroup."""
    kid = kids()
    kid.do(become, NOBODY)
    return kid


def give(cgrp):
    for path in (cgrp, *(cgrp / name for name in DELEGATED)):
        os.chown(path, NOBODY, NOBODY)


def move(pid, cgrp):
    assert isinstance(write(cgrp / "cgroup.procs", b"%d" % pid), int)


def moves_itself(kid, cgrp):
    return kid.do(write, str(cgrp / "cgroup.procs"), b"0")


def test_row_153_a_cgroup_of_root_is_closed(d, nobody, observe):
    (d / "c").mkdir()
    observe("mkdir", attempt(nobody.do, os.mkdir, str(d / "n")), "EACCES")
    observe("rmdir", attempt(nobody.do, os.rmdir, str(d / "c")), "EACCES")
    procs = str(d / "cgroup.procs")
    observe("open procs", attempt(nobody.do, open_and_close, procs, os.O_WRONLY), "EACCES")
    observe("read procs", nobody.do(read, procs), b"")


def test_row_154_the_mode_of_files_counts(d, nobody, observe):
    kill, events = str(d / "cgroup.kill"), str(d / "cgroup.events")
    observe("read kill", attempt(nobody.do, open_and_close, kill, os.O_RDONLY), "EACCES")
    observe("write events", attempt(nobody.do, open_and_close, events, os.O_WRONLY), "EACCES")


def test_row_155_a_delegatee_makes_cgroups_of_its_own(delegated, nobody, observe):
    observe("mkdir", attempt(nobody.do, os.mkdir, str(delegated / "s")), "ok")
    for name in ("", "cgroup.procs", "cgroup.max.depth"):
        found = os.stat(delegated / "s" / name)
        observe(f"owner of {name or 'the directory'}", [found.st_uid, found.st_gid], [NOBODY] * 2)


def test_row_156_a_delegatee_limits_only_what_is_its_own(delegated, nobody, observe):
    nobody.do(os.mkdir, str(delegated / "s"))
    observe("root's", nobody.do(write, str(delegated / "cgroup.max.depth"), b"5"), "EACCES")
    own = delegated / "s"
    observe("own depth", nobody.do(write, str(own / "cgroup.max.depth"), b"5"), 1)
    observe("own freeze", nobody.do(write, str(own / "cgroup.freeze"), b"1"), 1)


def test_row_157_nobody_comes_in_from_outside(delegated, nobody, observe):
    observe("move", moves_itself(nobody, delegated), "EACCES")


def test_row_158_moves_inside_and_across_a_delegation(d, delegated, nobody, observe):
    (d / "b").mkdir()
    nobody.do(os.mkdir, str(delegated / "s"))
    move(nobody.pid, delegated)
    observe("own child", moves_itself(nobody, delegated / "s"), 1)
    observe("not owned", moves_itself(nobody, d / "b"), "EACCES")
    give(d / "b")
    observe("owned, common ancestor not", moves_itself(nobody, d / "b"), "EACCES")


@pytest.mark.parametrize("how", ["owned", "mode 0666"])
def test_row_159_write_permission_on_the_common_ancestor_counts(d, delegated, nobody, observe, how):
    (d / "b").mkdir()
    give(d / "b")
    move(nobody.pid, delegated)
    if how == "owned":
        os.chown(d / "cgroup.procs", NOBODY, -1)
    else:
        os.chmod(d / "cgroup.procs", 0o666)
    observe("move", moves_itself(nobody, d / "b"), 1)


def test_row_160_a_delegatee_moves_and_kills_roots_processes(delegated, nobody, kids, observe):
    kid = kids()
    own = delegated / "s"
    nobody.do(os.mkdir, str(own))
    move(kid.pid, delegated)
    result = nobody.do(write, str(own / "cgroup.procs"), b"%d" % kid.pid)
    observe("move", isinstance(result, int), True)
    observe("listed", numbers(own / "cgroup.procs") == [kid.pid], True)
    observe("kill", nobody.do(write, str(own / "cgroup.kill"), b"1"), 1)
    observe("died by", kid.died_by(), 9)


def test_row_161_the_openers_rights_count(delegated, d, kids, observe):
    kid = kids()
    fd = kid.do(os.open, str(delegated / "cgroup.procs"), os.O_WRONLY)
    kid.do(become, NOBODY)
    observe("opened by root", attempt(kid.do, os.write, fd, b"0"), 1)
    observe("listed", numbers(delegated / "cgroup.procs") == [kid.pid], True)
    other = kids()
    other.do(seteuid, NOBODY)
    fd = other.do(os.open, str(delegated / "cgroup.procs"), os.O_WRONLY)
    other.do(seteuid, 0)
    observe("opened by nobody", attempt(other.do, os.write, fd, b"0"), "EACCES")


def test_row_162_rmdir_needs_rights_on_the_parent(d, delegated, nobody, observe):
    nobody.do(os.mkdir, str(delegated / "s"))
    observe("own child", attempt(nobody.do, os.rmdir, str(delegated / "s")), "ok")
    observe("itself", attempt(nobody.do, os.rmdir, str(delegated)), "EACCES")
    (delegated / "r").mkdir()
    os.chmod(delegated, 0o1755)
    observe("root's child, sticky", attempt(nobody.do, os.rmdir, str(delegated / "r")), "ok")


def test_row_163_a_delegatee_cannot_enable_what_is_not_available(
    without_controller, world, delegated, nobody, observe
):
    control = str(delegated / "cgroup.subtree_control")
    text = b"+" + world.controller.encode()
    observe("enable", nobody.do(write, control, text), "ENOENT")


def test_c6_a_sticky_cgroup_of_root_protects_its_children(d, nobody, observe):
    os.chmod(d, 0o1777)
    (d / "r").mkdir()
    observe("root's child", attempt(nobody.do, os.rmdir, str(d / "r")), "EPERM")
    nobody.do(os.mkdir, str(d / "s"))
    observe("own child", attempt(nobody.do, os.rmdir, str(d / "s")), "ok")


def test_c6_a_delegatee_freezes_roots_processes(delegated, nobody, kids, observe):
    kid = kids()
    own = delegated / "s"
    nobody.do(os.mkdir, str(own))
    move(kid.pid, own)
    observe("freeze", nobody.do(write, str(own / "cgroup.freeze"), b"1"), 1)
    frozen = eventually(lambda: flat(own / "cgroup.events", "frozen") == 1)
    observe("frozen", frozen, True)


def test_c6_a_delegatee_moves_its_own_children(delegated, nobody, observe):
    for name in "st":
        nobody.do(os.mkdir, str(delegated / name))
    move(nobody.pid, delegated)
    moves_itself(nobody, delegated / "s")
    pid = nobody.do(fork_sleeper)
    result = nobody.do(write, str(delegated / "t" / "cgroup.procs"), b"%d" % pid)
    observe("move", isinstance(result, int), True)
    observe("listed", numbers(delegated / "t" / "cgroup.procs") == [pid], True)


def test_c6_a_directory_that_cannot_be_searched_is_closed(d, nobody, observe):
    (d / "c").mkdir(mode=0o700)
    observe("stat below", attempt(nobody.do, os.stat, str(d / "c" / "cgroup.procs")), "EACCES")
    observe("listdir", attempt(nobody.do, os.listdir, str(d / "c")), "EACCES")


def test_c6_controller_files_take_the_group_of_a_setgid_directory(
    without_controller, world, d, observe
):
    os.chown(d, -1, 4242)
    os.chmod(d, 0o2755)
    with world.root_controller(on=True):
        observe(
            "owner", [os.stat(d / world.limit).st_uid, os.stat(d / world.limit).st_gid], [0, 4242]
        )


def test_c6_the_supplementary_groups_of_the_opener_count(d, kids, observe):
    (d / "g").mkdir()
    for path in (d / "g" / "cgroup.procs", d / "cgroup.procs"):
        os.chown(path, -1, 4242)
        os.chmod(path, 0o664)
    kid = kids()
    move(kid.pid, d)
    kid.do(become_member, 4242)
    observe("move", moves_itself(kid, d / "g"), 1)


def become_member(gid):
    os.setgroups([gid])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def test_c6_a_descriptor_passed_on_moves_the_writer(d, kids, observe):
    (d / "c").mkdir()
    opener = kids()
    observe("write", opener.do(pass_on_and_write, str(d / "c" / "cgroup.procs")), 1)
    observe("listed", opener.pid not in numbers(d / "c" / "cgroup.procs"), True)


def pass_on_and_write(path):
    with opened(path, os.O_WRONLY) as fd:
        writer = Kid()
        try:
            return writer.do(os.write, fd, b"0")
        finally:
            writer.end()
