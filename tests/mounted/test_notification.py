from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import time

import pytest

IN_MODIFY = 0x2
IN_DELETE_SELF = 0x400
EVENT = struct.Struct("iIII")
WAIT_MS = 2000
NOTHING_MS = 100
libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    def __init__(self, path, mask=IN_MODIFY):
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self.fd, os.fsencode(path), mask) >= 0

    def events(self, wait_ms=WAIT_MS):
        """(mask, name) of what is queued; waits for the first."""
        if not select.select([self.fd], [], [], wait_ms / 1000)[0]:
            return []
        data, events = os.read(self.fd, 65536), []
        while data:
            _, mask, _, length = EVENT.unpack_from(data)
            name = data[EVENT.size : EVENT.size + length].rstrip(b"\0").decode()
            events.append((mask, name))
            data = data[EVENT.size + length :]
        return events


@pytest.fixture
def inotify():
    with contextlib.ExitStack() as stack:

        def watch(path, mask=IN_MODIFY):
            watcher = Inotify(path, mask)
            stack.callback(os.close, watcher.fd)
            return watcher

        yield watch


@pytest.fixture
def tenant(root):
    (root / "tenant").mkdir()
    (root / "tenant" / "misc.max").write_text("sev 0")
    yield root / "tenant"
    with contextlib.suppress(OSError):
        os.rmdir(root / "tenant")


@pytest.fixture
def refuse(mounted_cgfs):
    """Makes misc.events of the tenant count one more."""

    def charge():
        answer = mounted_cgfs.ask("charge", cgroup="/tenant", resource="sev", amount=1)
        assert answer == "EBUSY"

    return charge


def poll(file, mask=select.POLLPRI, wait_ms=WAIT_MS):
    poller = select.poll()
    poller.register(file, mask)
    return dict(poller.poll(wait_ms)).get(file.fileno(), 0)


def test_poll_after_reading_waits_for_the_next_event(tenant, refuse):
    with open(tenant / "misc.events", "rb", buffering=0) as events:
        events.read()
        before = poll(events, wait_ms=NOTHING_MS)
        refuse()
        after = poll(events)
    assert (before, after) == (0, select.POLLPRI | select.POLLERR)


def test_poll_stays_ready_until_the_file_is_read_from_the_start(tenant, refuse):
    with open(tenant / "misc.events", "rb", buffering=0) as events:
        events.read()
        refuse()
        events.read()
        at_end = poll(events, wait_ms=NOTHING_MS)
        os.pread(events.fileno(), 100, 0)
        again = poll(events, wait_ms=NOTHING_MS)
    assert (at_end, again) == (select.POLLPRI | select.POLLERR, 0)


def test_epoll_edge_triggered_wakes_once_per_event(tenant, refuse):
    with open(tenant / "misc.events", "rb", buffering=0) as events:
        events.read()
        with select.epoll() as epoll:
            epoll.register(events, select.EPOLLPRI | select.EPOLLET)
            first = len(epoll.poll(0))
            refuse()
            second = len(epoll.poll(WAIT_MS / 1000))
            third = len(epoll.poll(NOTHING_MS / 1000))
    assert (first, second, third) == (0, 1, 0)


def test_poll_wakes_when_the_cgroup_is_removed(tenant):
    with open(tenant / "misc.events", "rb", buffering=0) as events:
        events.read()
        os.rmdir(tenant)
        assert poll(events) == select.POLLPRI | select.POLLERR


def test_inotify_on_the_file_sees_an_event_the_server_made(tenant, refuse, inotify):
    watcher = inotify(tenant / "misc.events")
    refuse()
    assert watcher.events() == [(IN_MODIFY, "")]


def test_inotify_on_the_directory_names_the_file(tenant, refuse, inotify):
    watcher = inotify(tenant)
    refuse()
    names = {name for _, name in watcher.events()}
    assert names <= {"misc.events", "misc.events.local"}
    assert names


def test_inotify_on_a_directory_sees_that_the_server_removes_it(mounted_cgfs, root, inotify):
    mounted_cgfs.ask("mkdir", path="/a")
    os.listdir(root / "a")
    watcher = inotify(root / "a", IN_DELETE_SELF)
    mounted_cgfs.ask("rmdir", path="/a")
    assert watcher.events()[0] == (IN_DELETE_SELF, "")


def test_a_removed_directory_in_use_is_gone_all_the_same(mounted_cgfs, root):
    mounted_cgfs.ask("mkdir", path="/a")
    with open(root / "a" / "cgroup.procs", "rb"):
        mounted_cgfs.ask("rmdir", path="/a")
        time.sleep(NOTHING_MS / 1000)
        assert not (root / "a").exists()


def test_inotify_sees_nothing_but_the_modification(tenant, refuse, inotify):
    watcher = inotify(tenant / "misc.events", 0xFFF)
    refuse()
    time.sleep(NOTHING_MS / 1000)
    assert watcher.events() == [(IN_MODIFY, "")]


def test_many_events_within_ten_milliseconds_are_two_modifications(tenant, refuse, inotify):
    watcher = inotify(tenant / "misc.events")
    started = time.monotonic()
    for _ in range(20):
        refuse()
    took = time.monotonic() - started
    seen = watcher.events()
    time.sleep(0.05)
    seen += watcher.events(0)
    # One at once, one at the end of each 10 ms in which more came.
    assert 1 <= len(seen) <= 2 + took / 0.010


def test_a_modification_does_not_fix_the_times_of_the_file(tenant, refuse, inotify):
    watcher = inotify(tenant / "misc.events")
    before = os.stat(tenant / "misc.events")
    refuse()
    watcher.events()
    after = os.stat(tenant / "misc.events")
    assert after.st_mtime_ns == before.st_mtime_ns


def test_times_set_by_a_user_stay(tenant):
    os.utime(tenant / "misc.events", (1000, 2000))
    (tenant / "misc.max").write_text("sev 1")
    found = os.stat(tenant / "misc.events")
    assert (found.st_atime, found.st_mtime) == (1000, 2000)
