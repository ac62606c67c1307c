"""Notification by poll, epoll and inotify: rows F.8 and C.9."""

import os
import select
import threading
import time

import pytest
from conformance.calls import attempt, eventually, flat, opened, read, write
from conformance.inotify import watching

PRI = select.POLLPRI | select.POLLERR
EVERYTHING = select.POLLIN | select.POLLPRI | select.POLLOUT


@pytest.fixture
def child(d):
    (d / "a").mkdir()
    return d / "a"


def polled(fd, bits=select.POLLPRI, wait_ms=0):
    poll = select.poll()
    poll.register(fd, bits)
    found = poll.poll(wait_ms)
    return found[0][1] if found else 0


def woken(fd, wait_ms=2000):
    """Whether an exceptional condition comes up; events may be late by the 10 ms of merging."""
    return polled(fd, select.POLLPRI, wait_ms)


def move(kid, cgrp):
    write(cgrp / "cgroup.procs", b"%d" % kid.pid)


@pytest.mark.parametrize(
    "name", ["cgroup.events", "cgroup.max.depth", "cgroup.subtree_control", "cgroup.stat"]
)
def test_row_143_a_fresh_descriptor_has_not_been_read(d, observe, name):
    with opened(d / name, os.O_RDWR) as fd:
        fresh = select.POLLIN | select.POLLOUT | PRI
        observe("fresh", polled(fd, EVERYTHING), fresh)
        os.pread(fd, 100, 0)
        observe("read", polled(fd, EVERYTHING), select.POLLIN | select.POLLOUT)


def test_c9_only_a_list_of_processes_with_something_in_it_counts_as_read(d, kids, observe):
    # Linux 6.18 fs/kernfs/file.c: the event is noted when a line is shown, not by reading.
    with opened(d / "cgroup.procs", os.O_RDWR) as fd:
        os.pread(fd, 100, 0)
        observe("empty", polled(fd, EVERYTHING), select.POLLIN | select.POLLOUT | PRI)
        move(kids(), d)
        os.pread(fd, 100, 0)
        observe("not empty", polled(fd, EVERYTHING), select.POLLIN | select.POLLOUT)


def test_row_144_only_reading_from_the_start_rearms(d, kids, observe):
    with opened(d / "cgroup.events") as fd:
        os.read(fd, 100)
        observe("quiet", polled(fd), 0)
        move(kids(), d)
        observe("populated", woken(fd), PRI)
        observe("again", polled(fd), PRI)
        os.read(fd, 100)
        observe("after reading at the end", polled(fd), PRI)
        observe("text", os.pread(fd, 100, 0), b"populated 1\nfrozen 0\n")
        observe("after reading from the start", polled(fd), 0)


def test_row_145_an_edge_triggered_epoll_wakes_once_per_change(d, kids, observe):
    kid = kids()
    move(kid, d)
    with opened(d / "cgroup.events") as fd, select.epoll() as epoll:
        os.read(fd, 100)
        epoll.register(fd, select.EPOLLPRI | select.EPOLLET)
        observe("initially", epoll.poll(0.05), [])
        kid.kill()
        observe("depopulated", [bits for _, bits in epoll.poll(2)], [PRI])
        observe("once", epoll.poll(0.05), [])


def test_row_146_what_a_parent_is_told(d, kids, observe):
    with opened(d / "cgroup.events") as fd:
        os.read(fd, 100)
        (d / "c").mkdir()
        observe("mkdir", woken(fd, 50), 0)
        move(kids(), d / "c")
        observe("first process", woken(fd), PRI)
        os.pread(fd, 100, 0)
        move(kids(), d / "c")
        observe("second process", woken(fd, 50), 0)


def test_row_147_freezing_again_is_no_event(d, observe):
    with opened(d / "cgroup.events") as fd:
        os.read(fd, 100)
        write(d / "cgroup.freeze", b"1")
        observe("first", woken(fd), PRI)
        os.pread(fd, 100, 0)
        write(d / "cgroup.freeze", b"1")
        observe("second", woken(fd, 50), 0)


def test_row_148_inotify_on_files(child, kids, observe):
    kid = kids()
    with watching() as watcher:
        for name in ("events", "procs", "freeze"):
            watcher.watch(child / f"cgroup.{name}", name)
        move(kid, child)
        seen = watcher.events()
    by_file = {name: [e for e in seen if e.startswith(name)] for name in ("events", "freeze")}
    procs = [event for event in seen if event.startswith("procs")]
    observe("procs", procs, ["procs OPEN", "procs MODIFY", "procs CLOSE_WRITE"])
    observe("events", by_file["events"], ["events MODIFY"])
    observe("freeze", by_file["freeze"], [])


def test_row_149_inotify_on_the_directory(child, kids, observe):
    kid = kids()
    # Linux tells of a file only while its inode is in memory.
    (child / "cgroup.events").stat()
    with watching() as watcher:
        watcher.watch(child, "a", 0x2)
        move(kid, child)
        seen = watcher.events()
    observe("modified", sorted(seen), ["a MODIFY cgroup.events", "a MODIFY cgroup.procs"])


def test_row_150_inotify_on_mkdir_and_rmdir(d, observe):
    with watching() as watcher:
        watcher.watch(d, "d", 0x300)
        (d / "n").mkdir()
        (d / "n").rmdir()
        observe("events", watcher.events(), ["d CREATE|ISDIR n", "d DELETE|ISDIR n"])


def test_row_151_inotify_on_files_of_a_removed_cgroup(child, observe):
    with watching() as watcher:
        for name in ("events", "procs"):
            watcher.watch(child / f"cgroup.{name}", name)
        os.rmdir(child)
        observe("events", watcher.events(wait_s=0.2), [])


def test_row_152_equal_events_are_merged(d, child, kids, observe):
    kid = kids()
    with watching() as watcher:
        watcher.watch(child / "cgroup.events", "events", 0x2)
        with (
            opened(child / "cgroup.procs", os.O_WRONLY) as into,
            opened(d / "cgroup.procs", os.O_WRONLY) as out,
        ):
            for _ in range(50):
                os.write(into, b"%d" % kid.pid)
                os.write(out, b"%d" % kid.pid)
        time.sleep(0.1)
        observe("events", watcher.events(), ["events MODIFY"])
    observe("text", read(child / "cgroup.events"), b"populated 0\nfrozen 0\n")


def test_c9_inotify_on_reading_and_writing(d, observe):
    with watching() as watcher:
        watcher.watch(d / "cgroup.max.depth", "depth")
        write(d / "cgroup.max.depth", b"5")
        observe("write", watcher.events(), ["depth OPEN", "depth MODIFY", "depth CLOSE_WRITE"])
        read(d / "cgroup.max.depth")
        wanted = ["depth OPEN", "depth ACCESS", "depth CLOSE_NOWRITE"]
        observe("read", watcher.events(), wanted)


def test_c9_inotify_tells_of_a_process_that_exits(child, kids, observe):
    kid = kids()
    move(kid, child)
    time.sleep(0.05)
    with watching() as watcher:
        watcher.watch(child / "cgroup.events", "events", 0x2)
        kid.kill()
        observe("events", watcher.events(wait_s=2), ["events MODIFY"])


def test_c9_inotify_tells_of_freezing(child, kids, observe):
    move(kids(), child)
    time.sleep(0.05)
    with watching() as watcher:
        watcher.watch(child / "cgroup.events", "events", 0x2)
        write(child / "cgroup.freeze", b"1")
        frozen = eventually(lambda: flat(child / "cgroup.events", "frozen") == 1)
        observe("frozen", frozen, True)
        observe("freeze", watcher.events(), ["events MODIFY"])
        write(child / "cgroup.freeze", b"0")
        thawed = eventually(lambda: flat(child / "cgroup.events", "frozen") == 0)
        observe("thawed", thawed, True)
        observe("thaw", watcher.events(), ["events MODIFY"])


def test_c9_what_the_event_tells_can_be_read_when_it_comes(child, kids, observe):
    kid = kids()
    with opened(child / "cgroup.events") as fd:
        os.read(fd, 100)
        seen = []
        for text, act in (
            (b"populated 1\nfrozen 0\n", lambda: move(kid, child)),
            (b"populated 1\nfrozen 1\n", lambda: write(child / "cgroup.freeze", b"1")),
            (b"populated 1\nfrozen 0\n", lambda: write(child / "cgroup.freeze", b"0")),
            (b"populated 0\nfrozen 0\n", kid.kill),
        ):
            act()
            woken(fd)
            seen.append(os.pread(fd, 100, 0) == text)
    observe("seen", seen, [True] * 4)


def test_c9_events_go_up_as_far_as_the_value_changes(d, kids, observe):
    (d / "a" / "b").mkdir(parents=True)
    first, second = kids(), kids()
    move(first, d / "a")
    with opened(d / "cgroup.events") as top, opened(d / "a" / "b" / "cgroup.events") as bottom:
        os.read(top, 100)
        os.read(bottom, 100)
        time.sleep(0.02)
        move(second, d / "a" / "b")
        observe("bottom", woken(bottom), PRI)
        observe("top", woken(top, 50), 0)


def test_c9_a_sleeping_poll_is_woken_by_a_write(d, observe):
    with opened(d / "cgroup.events") as fd:
        os.read(fd, 100)
        writer = threading.Timer(0.1, write, (d / "cgroup.freeze", b"1"))
        writer.start()
        observe("woken", woken(fd), PRI)
        writer.join()


def test_c9_two_descriptors_are_told_separately(d, kids, observe):
    with opened(d / "cgroup.events") as first, opened(d / "cgroup.events") as second:
        os.read(first, 100)
        os.read(second, 100)
        move(kids(), d)
        observe("first", woken(first), PRI)
        os.pread(first, 100, 0)
        observe("first read", polled(first), 0)
        observe("second", woken(second), PRI)


def test_c9_other_files_have_no_events(d, kids, observe):
    kid = kids()
    move(kids(), d)
    names = ("cgroup.procs", "cgroup.stat", "cgroup.max.depth", "cgroup.controllers")
    fds = {name: os.open(d / name, os.O_RDONLY) for name in names}
    for fd in fds.values():
        os.read(fd, 1000)
    move(kid, d)
    (d / "c").mkdir()
    write(d / "cgroup.max.depth", b"7")
    time.sleep(0.05)
    for name, fd in fds.items():
        observe(name, polled(fd), 0)
        os.close(fd)


def test_c9_inotify_sees_a_refused_write_as_no_modification(d, observe):
    with watching() as watcher:
        watcher.watch(d / "cgroup.max.depth", "depth")
        observe("write", write(d / "cgroup.max.depth", b"bad"), "EINVAL")
        observe("events", watcher.events(), ["depth OPEN", "depth CLOSE_WRITE"])
        observe("text", attempt(read, d / "cgroup.max.depth"), b"max\n")
