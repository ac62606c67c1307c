import os
import threading

import pytest

from cgfs.procs import scan
from cgfs.procs.forks import Fork
from cgfs.procs.scan import ForkScan, children_since, last_pid


@pytest.fixture(params=["by number", "all processes"])
def looking(request, monkeypatch):
    """The scan after `start`, with and without the kernel's last number."""
    if request.param == "all processes":
        monkeypatch.setattr(scan, "last_pid", lambda: 0)
    source = ForkScan()
    source.start()
    return source


def grow(source, watched):
    found = []
    for news in source.read(watched):
        found.append(news)
        watched[news.child_tgid] = 0
    return found


def two_generations(start):
    """A shell with a child that has a child; all three stay."""
    child = start.sh("sh -c 'sleep 60 & echo; wait' & wait")
    child.stdout.readline()
    return child


def test_last_pid_is_that_of_a_process_just_started(start):
    before = last_pid()
    child = start("/bin/true")
    assert last_pid() >= child.pid or last_pid() < before


def test_last_pid_is_zero_where_loadavg_is_made_up(monkeypatch):
    monkeypatch.setattr(scan.proc, "slurp", lambda path: b"0.00 0.00 0.00 1/1 \n")
    assert last_pid() == 0


def test_child_is_found(looking, start):
    child = start("sleep", "60")
    assert grow(looking, {os.getpid(): 0}) == [Fork(os.getpid(), os.getpid(), child.pid, child.pid)]


def test_grandchild_is_found_with_its_parent(looking, start):
    child = two_generations(start)
    watched = {child.pid: 0}
    found = grow(looking, watched)
    assert [fork.parent_tgid for fork in found] == [child.pid, found[0].child_tgid]


def test_child_is_found_once(looking, start):
    start("sleep", "60")
    watched = {os.getpid(): 0}
    assert len(grow(looking, watched)) == 1
    assert grow(looking, watched) == []


def test_child_older_than_start_is_not_found(start):
    child = two_generations(start)
    source = ForkScan()
    source.start()
    assert grow(source, {child.pid: 0}) == []


def test_child_of_nobody_watched_is_not_found(looking, start):
    start("sleep", "60")
    assert grow(looking, {start("sleep", "60").pid: 0}) == []


def test_thread_is_no_child(looking):
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert grow(looking, {os.getpid(): 0, os.getppid(): 0}) == []
    finally:
        release.set()
        thread.join()


def test_new_numbers_after_the_numbering_started_again_are_found(start):
    source = ForkScan()
    source.start()
    source._cursor = 4_000_000
    child = start("sleep", "60")
    assert child.pid in [fork.child_tgid for fork in grow(source, {os.getpid(): 0})]


def test_children_from_before_the_watch_began_do_not_count(start):
    child = two_generations(start)
    later = scan.clock_ticks() + 1000
    assert list(children_since({child.pid: later}, 0)) == []
    assert len(list(children_since({child.pid: 0}, 0))) == 1


def test_nothing_to_wait_for():
    assert ForkScan().fileno() is None
