"""Processes: rows F.4 and the write tables of cgroup.procs and cgroup.threads (C.3, C.11)."""

import os
import select
import signal
from pathlib import Path

import pytest
from conformance.calls import attempt, eventually, flat, numbers, opened, read, write
from conformance.kids import (
    call_in_thread,
    cgroup_of,
    clone_sleeper,
    end_leader,
    fork_sleeper,
    in_pid_namespace,
    own_cgroup,
    start_thread,
    state_of,
)
from conformance.syscalls import CLONE_NEWCGROUP, unshare

NO_NUMBERS = [
    b"\n", b" ", b"abc", b"-1", b"1 2", b"1\n2", b"0x", b"1.5", b"\0", b"2147483648",
    b"99999999999999999999999", b"+", b"++1",
]  # fmt: skip


@pytest.fixture
def procs(d):
    return d / "cgroup.procs"


@pytest.fixture
def child_cgroups(d):
    (d / "a").mkdir()
    (d / "b").mkdir()
    return d / "a", d / "b"


def move(pid, cgrp):
    return write(cgrp / "cgroup.procs", b"%d" % pid)


@pytest.mark.parametrize(
    "form", ["{}", " {} \n", "{:#x}", "0{:o}", "+{}", "{}\0junk", "{}\n", "\t{}"]
)
def test_row_069_a_pid_in_its_spellings(procs, kids, observe, form):
    pid = kids().pid
    text = form.format(pid).encode()
    observe("written", write(procs, text) == len(text), True)
    observe("listed", numbers(procs) == [pid], True)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_row_070_no_pid_says_einval(procs, observe, text):
    observe("procs", write(procs, text), "EINVAL")
    observe("threads", write(procs.with_name("cgroup.threads"), text), "EINVAL")


def test_row_070_two_words_say_einval(procs, kids, observe):
    observe("written", write(procs, b"%d x" % kids().pid), "EINVAL")
    observe("listed", numbers(procs), [])


def test_row_071_a_missing_process_says_esrch(procs, kids, observe):
    kid = kids()
    kid.kill()
    kid.reap()
    for label, pid in (("too big", 99999999), ("the largest", 2147483647), ("reaped", kid.pid)):
        observe(label, write(procs, b"%d" % pid), "ESRCH")


def test_row_072_a_kernel_thread_says_einval(procs, observe):
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("pid 2 is not kthreadd in this pid namespace")
    observe("kthreadd", write(procs, b"2"), "EINVAL")


def test_row_073_zero_is_the_writer(d, procs, world, kids, observe):
    kid = kids()
    observe("written", kid.do(write, str(procs), b"0"), 1)
    observe("listed", numbers(procs) == [kid.pid], True)
    observe("/proc/self/cgroup", kid.do(own_cgroup) == b"0::" + world.path_of(d), True)


def test_row_074_a_thread_cannot_leave_its_domain(d, kids, observe):
    threads = str(d / "cgroup.threads")
    observe("main thread", kids().do(write, threads, b"0"), "EOPNOTSUPP")
    kid = kids()
    kid.do(start_thread)
    observe("another thread", kid.do(call_in_thread, write, threads, b"0")[1], "EOPNOTSUPP")


def test_row_075_a_tid_moves_its_whole_process(d, procs, kids, observe):
    kid = kids()
    tid = kid.do(start_thread)
    observe("written", write(procs, b"%d" % tid) == len(str(tid)), True)
    observe("procs", numbers(procs) == [kid.pid], True)
    observe("threads", sorted(numbers(d / "cgroup.threads")) == sorted([kid.pid, tid]), True)


def test_row_076_processes_are_listed_in_order_of_joining(child_cgroups, kids, observe):
    a, b = child_cgroups
    k1, k2, k3 = (kids().pid for _ in range(3))
    for pid in (k1, k2, k3):
        move(pid, a)
    observe("joined", numbers(a / "cgroup.procs") == [k1, k2, k3], True)
    move(k1, b)
    move(k1, a)
    observe("out and in", numbers(a / "cgroup.procs") == [k2, k3, k1], True)
    move(k2, a)
    observe("written again", numbers(a / "cgroup.procs") == [k2, k3, k1], True)


def test_row_077_the_list_is_not_sorted(procs, kids, observe):
    pids = sorted((kids().pid for _ in range(4)), reverse=True)
    for pid in pids:
        write(procs, b"%d" % pid)
    observe("descending", numbers(procs) == pids, True)


def test_row_078_moving_a_zombie_does_nothing(child_cgroups, kids, observe):
    a, b = child_cgroups
    kid = kids()
    move(kid.pid, a)
    kid.kill()
    line = cgroup_of(kid.pid)
    observe("written", isinstance(move(kid.pid, b), int), True)
    observe("listed", numbers(b / "cgroup.procs"), [])
    observe("/proc line", cgroup_of(kid.pid) == line, True)


def test_row_079_a_zombie_is_not_in_its_cgroup(d, world, kids, observe):
    (d / "z").mkdir()
    kid = kids()
    move(kid.pid, d / "z")
    kid.kill()
    observe("procs", read(d / "z" / "cgroup.procs"), b"")
    observe("threads", read(d / "z" / "cgroup.threads"), b"")
    observe("events", read(d / "z" / "cgroup.events"), b"populated 0\nfrozen 0\n")
    observe("rmdir", attempt(os.rmdir, d / "z"), "ok")
    wanted = b"0::" + world.path_of(d / "z") + b" (deleted)"
    observe("/proc line", cgroup_of(kid.pid) == wanted, True)


def test_row_080_a_dead_leader_stays_listed(child_cgroups, kids, observe):
    a, b = child_cgroups
    kid = kids()
    tid = kid.do(start_thread)
    move(kid.pid, a)
    kid.start(end_leader)
    observe("leader is a zombie", eventually(lambda: kid.state == "Z"), True)
    observe("listed", numbers(a / "cgroup.procs") == [kid.pid], True)
    observe("populated", flat(a / "cgroup.events", "populated"), 1)
    observe("moved", isinstance(move(kid.pid, b), int), True)
    observe("listed in the old cgroup", numbers(a / "cgroup.procs") == [kid.pid], True)
    observe("threads in the new cgroup", numbers(b / "cgroup.threads") == [tid], True)


def test_row_081_children_do_not_follow_their_parent(child_cgroups, kids, observe):
    a, b = child_cgroups
    kid = kids()
    move(kid.pid, a)
    earlier = kid.do(fork_sleeper)
    observe("joined by fork", numbers(a / "cgroup.procs") == [kid.pid, earlier], True)
    move(kid.pid, b)
    later = kid.do(fork_sleeper)
    observe("old cgroup", numbers(a / "cgroup.procs") == [earlier], True)
    observe("new cgroup", numbers(b / "cgroup.procs") == [kid.pid, later], True)


def test_row_082_processes_of_other_pid_namespaces_are_zero(procs, kids, observe):
    for _ in range(6):
        write(procs, b"%d" % kids().pid)
    observe("list", kids().do(in_pid_namespace, read, str(procs)), b"0\n" * 6)


def test_row_082_pids_are_those_of_the_writers_namespace(procs, kids, observe):
    kid = kids()
    observe("written", kid.do(in_pid_namespace, write, str(procs), b"1"), 1)
    observe("gone", eventually(lambda: read(procs) == b""), True)


def test_row_083_a_cgroup_namespace_hides_what_is_above(d, world, kids, observe):
    (d / "a").mkdir()
    kid = kids()
    move(kid.pid, d / "a")
    kid.do(unshare, CLONE_NEWCGROUP)
    observe("own", kid.do(own_cgroup), b"0::/")
    at_root = kids()
    write(world.root / "cgroup.procs", b"%d" % at_root.pid)
    observe("root's", kid.do(cgroup_of, at_root.pid), b"0::/../..")
    observe("moved", kid.do(write, str(world.root / "cgroup.procs"), b"0"), 1)
    observe("own after moving", kid.do(own_cgroup), b"0::/../..")


def test_row_084_the_last_exit_is_notified_soon(procs, kids, observe):
    kid = kids()
    write(procs, b"%d" % kid.pid)
    with opened(procs.with_name("cgroup.events")) as fd:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        poll.poll(0)
        os.pread(fd, 100, 0)
        os.kill(kid.pid, signal.SIGKILL)
        observe("event", [bits for _, bits in poll.poll(2000)], [select.POLLPRI | select.POLLERR])
        observe("text", os.pread(fd, 100, 0), b"populated 0\nfrozen 0\n")
    observe("rmdir before reaping", attempt(os.rmdir, procs.parent), "ok")


@pytest.mark.parametrize("flag", ["O_RDONLY", "O_PATH"])
def test_row_085_clone3_starts_a_child_inside(d, kids, observe, flag):
    kid = kids()
    with_fd = os.O_DIRECTORY | getattr(os, flag)
    pid = attempt(kid.do, clone_into, str(d), with_fd)
    observe("clone", pid if isinstance(pid, str) else "ok", "ok")
    observe("listed", numbers(d / "cgroup.procs") == [pid], True)


def clone_into(path, flags):
    with opened(path, flags) as fd:
        return clone_sleeper(fd)


def test_row_086_clone3_wants_a_cgroup2_directory(d, kids, observe):
    kid = kids()
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    v1 = next((where for _, where, kind, *_ in mounts if kind == "cgroup"), None)
    observe("/tmp", attempt(kid.do, clone_into, "/tmp", os.O_RDONLY), "EBADF")
    observe("file", attempt(kid.do, clone_into, str(d / "cgroup.procs"), os.O_RDONLY), "EBADF")
    if v1:
        observe("v1 directory", attempt(kid.do, clone_into, v1, os.O_RDONLY), "EBADF")
    (d / "gone").mkdir()
    observe("removed", attempt(kid.do, clone_into_removed, str(d / "gone")), "ENOENT")


def clone_into_removed(path):
    with opened(path) as fd:
        os.rmdir(path)
        return clone_sleeper(fd)


def test_row_087_sigterm_ends_a_frozen_process(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    write(d / "cgroup.freeze", b"1")
    frozen = eventually(lambda: flat(d / "cgroup.events", "frozen") == 1)
    observe("frozen", frozen, True)
    kid.kill(signal.SIGTERM)
    observe("died by", kid.died_by(1.0), signal.SIGTERM.value)


def test_row_088_a_stopped_process_stays_stopped_after_thawing(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    kid.kill(signal.SIGSTOP)
    observe("stopped", eventually(lambda: kid.state == "T"), True)
    write(d / "cgroup.freeze", b"1")
    observe("frozen", eventually(lambda: flat(d / "cgroup.events", "frozen") == 1), True)
    observe("state frozen", kid.state, "T")
    write(d / "cgroup.freeze", b"0")
    observe("thawed", eventually(lambda: flat(d / "cgroup.events", "frozen") == 0), True)
    observe("state thawed", kid.state, "T")


def test_c3_moving_to_where_it_is_succeeds(procs, kids, observe):
    pid = kids().pid
    write(procs, b"%d" % pid)
    observe("again", isinstance(write(procs, b"%d" % pid), int), True)
    observe("listed once", numbers(procs) == [pid], True)


def test_c3_the_threads_of_a_process_are_all_listed(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    tids = {kid.pid, *(kid.do(start_thread) for _ in range(13))}
    observe("threads", set(numbers(d / "cgroup.threads")) == tids, True)
    observe("procs", numbers(d / "cgroup.procs") == [kid.pid], True)


def test_c11_a_grandchild_is_a_member_after_its_parent_died(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    orphan = kid.do(fork_orphan)
    observe("listed", orphan in numbers(d / "cgroup.procs"), True)
    kid.kill()
    observe("still listed", numbers(d / "cgroup.procs") == [orphan], True)
    observe("populated", flat(d / "cgroup.events", "populated"), 1)
    os.kill(orphan, signal.SIGKILL)
    observe("empty", eventually(lambda: flat(d / "cgroup.events", "populated") == 0), True)


def fork_orphan():
    """Forks twice; the middle process is gone before anybody can look at it."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        orphan = os.fork()
        if orphan:
            os.write(writer, b"%d" % orphan)
            os._exit(0)
        signal.alarm(60)
        signal.pause()
        os._exit(0)
    os.waitpid(middle, 0)
    orphan = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    return orphan


def test_c11_kill_reaches_children_that_were_forked_later(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    pids = [kid.pid, *(kid.do(fork_sleeper) for _ in range(5))]
    observe("kill", write(d / "cgroup.kill", b"1"), 1)
    observe("empty", eventually(lambda: flat(d / "cgroup.events", "populated") == 0), True)
    observe("dead", eventually(lambda: all(state_of(pid) in "ZX-" for pid in pids)), True)
    observe("by", kid.died_by(), 9)


def test_c3_kill_reaches_descendants_and_the_writer(d, kids, observe):
    (d / "a" / "b").mkdir(parents=True)
    first, second = kids(), kids()
    move(first.pid, d)
    move(second.pid, d / "a" / "b")
    first.start(write, str(d / "cgroup.kill"), b"1")
    observe("writer", first.died_by(), 9)
    observe("descendant", second.died_by(), 9)


def test_c3_cgroup_stat_counts_descendants(d, observe):
    observe("none", flat(d / "cgroup.stat", "nr_descendants"), 0)
    (d / "a" / "b").mkdir(parents=True)
    (d / "c").mkdir()
    observe("three", flat(d / "cgroup.stat", "nr_descendants"), 3)
    observe("below", flat(d / "a" / "cgroup.stat", "nr_descendants"), 1)
    (d / "c").rmdir()
    observe("two", flat(d / "cgroup.stat", "nr_descendants"), 2)
    keys = [line.split()[0] for line in read(d / "cgroup.stat").decode().splitlines()]
    others = [key for key in keys if "subsys" not in key]
    observe("keys", others, ["nr_descendants", "nr_dying_descendants"])
