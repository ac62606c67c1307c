import os
import threading

import pytest

from cgfs.procs.connector import ProcConnector
from cgfs.procs.forks import Fork, ThreadExit


@pytest.fixture
def listening(connector):
    connector.start()
    return connector


def grow(source, watched):
    """Reads the source like its user does: children of the watched are watched."""
    found = []
    for news in source.read(watched):
        found.append(news)
        if isinstance(news, Fork):
            watched[news.child_tgid] = 0
    return found


def test_child_is_known_as_soon_as_fork_has_returned(listening, start):
    child = start("/bin/true")
    found = grow(listening, {os.getpid(): 0})
    assert (os.getpid(), child.pid, child.pid) in [news[1:] for news in found]


def test_fork_of_an_unwatched_process_is_no_news(listening, start):
    start("/bin/true")
    assert list(listening.read({1: 0})) == []


def test_new_number_of_a_watched_process_is_news(listening, start):
    child = start("/bin/true")
    assert [news.child_tgid for news in listening.read({child.pid: 0})] == [child.pid]


def test_grandchildren_follow_in_order(listening, start):
    child = start.sh("sh -c 'sh -c : & wait' & wait; echo; read line")
    child.stdout.readline()
    forks = [news for news in grow(listening, {child.pid: 0}) if isinstance(news, Fork)]
    known = {child.pid}
    for fork in forks:
        assert fork.child_tgid == child.pid or fork.parent_tgid in known
        known.add(fork.child_tgid)
    assert len(known) >= 3


def test_thread_and_its_exit_are_news_of_its_process(listening):
    tids = []
    thread = threading.Thread(target=lambda: tids.append(threading.get_native_id()))
    us = os.getpid()
    thread.start()
    thread.join()
    found = list(listening.read({us: 0}))
    assert Fork(us, us, tids[0], us) in found


def test_thread_exit_is_reported(listening, eventually):
    tids = []
    thread = threading.Thread(target=lambda: tids.append(threading.get_native_id()))
    us = os.getpid()
    found = []
    thread.start()
    thread.join()
    eventually(lambda: found.extend(listening.read({us: 0})) or ThreadExit(tids[0], us) in found)


def test_children_lost_in_an_overflow_are_found(connector, start):
    connector.close()
    small = ProcConnector(receive_buffer_bytes=4096)
    try:
        small.start()
        child = start.sh("for i in 1 2 3 4 5 6 7 8 9 10; do sleep 60 & done; echo; wait")
        watched = {child.pid: 0}
        child.stdout.readline()
        grow(small, watched)
        assert len(watched) == 11
    finally:
        small.close()


def test_children_older_than_the_last_read_are_not_found_again(connector, start):
    connector.close()
    small = ProcConnector(receive_buffer_bytes=4096)
    try:
        child = start.sh(
            "sleep 60 & echo; read line; for i in 1 2 3 4 5 6; do sleep 60 & done; echo; wait"
        )
        child.stdout.readline()
        older = _children(child.pid)
        _next_tick()
        small.start()
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        forks = [news for news in grow(small, {child.pid: 0}) if isinstance(news, Fork)]
        assert forks
        assert older.isdisjoint(fork.child_tgid for fork in forks)
    finally:
        small.close()


def test_nothing_is_queued_after_stop(listening, start):
    listening.stop()
    start("/bin/true").wait()
    assert list(listening.read({os.getpid(): 0})) == []


def test_start_after_stop_reports_again(listening, start):
    listening.stop()
    listening.start()
    child = start("/bin/true")
    found = [news for news in listening.read({os.getpid(): 0}) if isinstance(news, Fork)]
    assert child.pid in [news.child_tgid for news in found]


def test_close_twice_is_harmless(connector):
    connector.close()
    connector.close()


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return {int(child) for child in children.read().split()}


def _next_tick():
    from cgfs.procs.scan import clock_ticks

    before = clock_ticks()
    while clock_ticks() <= before:
        pass
