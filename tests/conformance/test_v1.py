"""A v1 hierarchy: sections D.1 and D.2, against a named hierarchy of the machine."""

import os
import stat

import pytest
from conformance import syscalls
from conformance.calls import attempt, eventually, numbers, open_and_close, opened, read, write
from conformance.kids import NOBODY, become, call_in_thread, in_pid_namespace, start_thread
from conformance.world import fresh

AGENT = """#!/bin/sh
{ echo "$@"; tr '\\0' '\\n' < /proc/$$/environ; } > %s.part
mv %s.part %s
"""
FLAGS = ("notify_on_release", "cgroup.clone_children")
COMMON = ["cgroup.clone_children", "cgroup.procs", "notify_on_release", "tasks"]


@pytest.fixture(params=["linux", "cgfs"])
def v1(request):
    """The root of a v1 hierarchy."""
    return request.getfixturevalue(f"{request.param}_v1")


@pytest.fixture
def d(v1, kids):
    del kids
    with fresh(v1) as cgrp:
        yield cgrp


@pytest.fixture
def agent(v1, tmp_path):
    """A release agent that leaves its arguments and environment in a file."""
    script, report = tmp_path / "agent", tmp_path / "report"
    script.write_text(AGENT % (report, report, report))
    script.chmod(0o755)
    write(v1 / "release_agent", os.fsencode(script))
    yield report
    write(v1 / "release_agent", b"\n")


def core_files(cgrp):
    return sorted(name for name in os.listdir(cgrp) if not name.startswith("encryption_ids."))


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def move(number, cgrp, name="cgroup.procs"):
    result = write(cgrp / name, b"%d" % number)
    return "ok" if result == len(str(number)) else result


def test_d1_file_set_and_modes(v1, d, observe):
    observe("root", [name for name in core_files(v1) if not (v1 / name).is_dir()],
            sorted([*COMMON, "cgroup.sane_behavior", "release_agent"]))  # fmt: skip
    observe("below", core_files(d), COMMON)
    for name in COMMON:
        observe(f"mode of {name}", oct(mode(d / name)), "0o644")
    observe("mode of sane_behavior", oct(mode(v1 / "cgroup.sane_behavior")), "0o444")
    observe("mode of release_agent", oct(mode(v1 / "release_agent")), "0o644")


def test_d1_fresh_contents(v1, d, observe):
    for name in COMMON:
        observe(name, read(d / name), b"0\n" if name in FLAGS else b"")
    observe("sane_behavior", read(v1 / "cgroup.sane_behavior"), b"0\n")
    observe("release_agent", read(v1 / "release_agent"), b"\n")


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("text", "result"),
    [
        *((text, len(text)) for text in (b"1", b"1\n", b"0x1", b"7", b"+1", b"01")),
        *((text, "EINVAL") for text in (b" 1", b"1 ", b"1\n\n", b"-1", b"abc", b"\n")),
        (b"18446744073709551616", "ERANGE"),
        (b"18446744073709551615", 20),
    ],
)
def test_d2_flags_are_numbers_and_not_stripped(d, observe, name, text, result):
    observe("write", write(d / name, text), result)
    observe("text", read(d / name), b"1\n" if isinstance(result, int) else b"0\n")


@pytest.mark.parametrize("name", FLAGS)
def test_d2_flags_are_inherited_at_mkdir(d, observe, name):
    (d / "before").mkdir()
    write(d / name, b"1")
    (d / "after").mkdir()
    observe("before", read(d / "before" / name), b"0\n")
    observe("after", read(d / "after" / name), b"1\n")
    write(d / name, b"0")
    observe("cleared", [read(d / name), read(d / "after" / name)], [b"0\n", b"1\n"])


def test_d2_release_agent_is_stripped_and_limited(v1, agent, observe):
    del agent
    f = v1 / "release_agent"
    observe("write", write(f, b" /bin/true \n"), 12)
    observe("text", read(f), b"/bin/true\n")
    observe("4095 bytes", write(f, b"/" * 4095), 4095)
    observe("4096 bytes", write(f, b"/" * 4096), "E2BIG")
    observe("blank", write(f, b"\n"), 1)
    observe("cleared", read(f), b"\n")


def test_d2_release_agent_is_roots(v1, agent, kids, observe):
    del agent
    kid = kids()
    kid.do(become, NOBODY)
    f = str(v1 / "release_agent")
    observe("open", attempt(kid.do, open_and_close, f, os.O_WRONLY), "EACCES")
    os.chmod(f, 0o666)
    observe("write", kid.do(write, f, b"/bin/true"), "EPERM")
    os.chmod(f, 0o644)


def test_d2_the_agent_runs_when_the_last_process_leaves(v1, d, agent, kids, observe):
    (d / "c").mkdir()
    write(d / "c" / "notify_on_release", b"1")
    kid = kids()
    move(kid.pid, d / "c")
    kid.kill()
    observe("ran", eventually(agent.exists), True)
    first, *environment = agent.read_text().splitlines()
    observe("path", first == f"/{(d / 'c').relative_to(v1)}", True)
    wanted = ["HOME=/", "PATH=/sbin:/bin:/usr/sbin:/usr/bin"]
    own = [line for line in environment if not line.startswith(("PWD=", "SHLVL=", "_="))]
    observe("environment", sorted(own), wanted)


def test_d2_the_agent_runs_when_the_last_child_goes(d, agent, observe):
    (d / "c" / "g").mkdir(parents=True)
    write(d / "c" / "notify_on_release", b"1")
    (d / "c" / "g").rmdir()
    observe("ran", eventually(agent.exists), True)
    observe("path ends", agent.read_text().splitlines()[0].endswith("/c"), True)


def test_d2_the_agent_does_not_run_for_what_is_not_empty(d, agent, kids, observe):
    (d / "c" / "g").mkdir(parents=True)
    write(d / "c" / "notify_on_release", b"1")
    first, second = kids(), kids()
    for kid in (first, second):
        move(kid.pid, d / "c")
    first.kill()
    (d / "c" / "g").rmdir()
    observe("ran", eventually(agent.exists, 0.3), False)
    second.kill()
    observe("then ran", eventually(agent.exists), True)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        *((text, "EINVAL") for text in (b"abc", b"-1", b"\n", b"2147483648")),
        (b"99999999", "ESRCH"),
    ],
)
@pytest.mark.parametrize("name", ["cgroup.procs", "tasks"])
def test_d2_pids_that_are_refused(d, observe, name, text, result):
    observe("write", write(d / name, text), result)


def test_d2_procs_moves_processes_and_lists_them_sorted(d, kids, observe):
    made = sorted((kids() for _ in range(4)), key=lambda kid: kid.pid, reverse=True)
    for kid in made:
        observe(f"move {made.index(kid)}", move(kid.pid, d), "ok")
    pids = sorted(kid.pid for kid in made)
    observe("procs", numbers(d / "cgroup.procs") == pids, True)
    observe("tasks", numbers(d / "tasks") == pids, True)
    observe("zero", made[0].do(write, str(d.parent / "cgroup.procs"), b"0"), 1)
    observe("moved out", numbers(d / "cgroup.procs") == pids[:-1], True)


def test_d2_tasks_moves_one_thread_anywhere(d, kids, observe):
    (d / "a").mkdir()
    (d / "b").mkdir()
    kid = kids()
    tid = kid.do(start_thread)
    move(kid.pid, d / "a")
    observe("both", numbers(d / "a" / "tasks") == [kid.pid, tid], True)
    observe("move", move(tid, d / "b", "tasks"), "ok")
    observe("a", numbers(d / "a" / "tasks") == [kid.pid], True)
    observe("b", numbers(d / "b" / "tasks") == [tid], True)
    both = [numbers(d / name / "cgroup.procs") == [kid.pid] for name in "ab"]
    observe("procs of both", both, [True, True])
    observe("back together", move(tid, d / "a"), "ok")
    observe("all", numbers(d / "a" / "tasks") == [kid.pid, tid], True)


def test_d2_tasks_zero_is_the_calling_thread(d, kids, observe):
    kid = kids()
    tid, result = kid.do(call_in_thread, write, str(d / "tasks"), b"0")
    observe("write", result, 1)
    observe("tasks", numbers(d / "tasks") == [tid], True)


def test_d2_rights_to_move_are_those_over_the_process(d, kids, observe):
    os.chmod(d / "cgroup.procs", 0o666)
    mine, other, nobody = kids(), kids(), kids()
    mine.do(become, NOBODY)
    nobody.do(become, NOBODY)
    procs = str(d / "cgroup.procs")
    observe("own uid", nobody.do(write, procs, b"%d" % mine.pid) != "EACCES", True)
    observe("root's", nobody.do(write, procs, b"%d" % other.pid), "EACCES")
    observe("itself", nobody.do(write, procs, b"0"), 1)
    observe("listed", sorted(numbers(d / "cgroup.procs")) == sorted([mine.pid, nobody.pid]), True)


def test_d2_processes_of_other_pid_namespaces_are_skipped(d, kids, observe):
    for _ in range(3):
        move(kids().pid, d)
    for name in ("cgroup.procs", "tasks"):
        observe(name, kids().do(in_pid_namespace, read, str(d / name)), b"")


def test_d2_rename_within_the_parent(d, observe):
    (d / "c").mkdir()
    inode = os.stat(d / "c").st_ino
    with opened(d / "c" / "notify_on_release", os.O_RDWR) as fd:
        observe("rename", attempt(os.rename, d / "c", d / "n"), "ok")
        observe("write to an open file", attempt(os.write, fd, b"1"), 1)
    observe("text", read(d / "n" / "notify_on_release"), b"1\n")
    observe("inode", os.stat(d / "n").st_ino == inode, True)
    observe("old name", attempt(os.stat, d / "c"), "ENOENT")
    observe("listed", [name for name in os.listdir(d) if name in "cn"], ["n"])


def test_d2_rename_that_is_refused(d, observe):
    for name in ("c", "e", "c/g"):
        (d / name).mkdir()
    observe("other parent", attempt(os.rename, d / "c" / "g", d / "g"), "EIO")
    observe("file", attempt(os.rename, d / "tasks", d / "n"), "ENOTDIR")
    observe("newline", attempt(os.rename, d / "c", d / "a\nb"), "EINVAL")
    observe("existing", attempt(os.rename, d / "c", d / "e"), "EEXIST")
    observe("itself", attempt(os.rename, d / "c", d / "c"), "ok")
    flags = syscalls.RENAME_NOREPLACE
    observe("flags", attempt(syscalls.renameat2, d / "c", d / "n", flags), "EINVAL")
    observe("nothing changed", sorted(e.name for e in os.scandir(d) if e.is_dir()), ["c", "e"])


def test_d2_directories_otherwise_behave_as_in_v2(d, kids, observe):
    (d / "c").mkdir()
    observe("mkdir existing", attempt(os.mkdir, d / "c"), "EEXIST")
    observe("mkdir newline", attempt(os.mkdir, d / "a\nb"), "EINVAL")
    observe("mkdir file name", attempt(os.mkdir, d / "tasks"), "EEXIST")
    observe("rmdir with child", attempt(os.rmdir, d), "EBUSY")
    move(kids().pid, d / "c")
    observe("rmdir with process", attempt(os.rmdir, d / "c"), "EBUSY")
    observe("child beside process", attempt(os.mkdir, d / "c" / "g"), "ok")
    observe("unlink", attempt(os.unlink, d / "tasks"), "EPERM")
    creating = os.O_WRONLY | os.O_CREAT
    observe("create", attempt(open_and_close, d / "n", creating), "EACCES")
    observe("xattr", attempt(os.setxattr, d, "user.x", b"1"), "ok")


def test_d1_files_of_v2_are_absent(d, observe):
    for name in ("cgroup.events", "cgroup.freeze", "cgroup.subtree_control", "cgroup.type"):
        observe(name, attempt(os.stat, d / name), "ENOENT")


def test_d2_a_removed_file_says_enodev(d, observe):
    (d / "c").mkdir()
    with opened(d / "c" / "tasks", os.O_RDWR) as fd:
        (d / "c").rmdir()
        observe("read", attempt(os.pread, fd, 100, 0), "ENODEV")
        observe("write", attempt(os.write, fd, b"0"), "ENODEV")


def test_d1_controller_files(cgfs_v1, kids):
    del kids
    with fresh(cgfs_v1) as d:
        for kind in ("sev", "sev_es"):
            assert mode(cgfs_v1 / f"encryption_ids.{kind}.stat") == 0o444
            assert not (cgfs_v1 / f"encryption_ids.{kind}.max").exists()
            assert read(d / f"encryption_ids.{kind}.max") == b"max\n"
            assert read(d / f"encryption_ids.{kind}.current") == b"0\n"
            assert not (d / f"encryption_ids.{kind}.stat").exists()
        write(d / "encryption_ids.sev.max", b"5")
        assert read(d / "encryption_ids.sev.max") == b"5\n"
