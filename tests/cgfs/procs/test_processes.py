import os
import select
import threading

import pytest

from cgfs.procs import processes as processes_module
from cgfs.procs import scan
from cgfs.procs.forks import Fork
from cgfs.procs.processes import RealProcesses

FORKS_TWICE = """
import os, time
print(flush=True)
input()
if os.fork() == 0:
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(60)
"""
FORK_BOMB = """
import os, time
os.fork(); os.fork()
while True:
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
    time.sleep(0.001)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
"""


def tell(child):
    """Lets a process that waits for a line go on, and waits for its answer."""
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


# -- membership -------------------------------------------------------------------------------


def test_child_of_a_watched_process_is_known_at_once(processes, recorder, start):
    child = start.sh("echo; read line; sleep 60 & echo $!; wait")
    child.stdout.readline()
    processes.watch(child.pid)
    grandchild = int(tell(child))
    processes.sync()
    assert recorder.children == [grandchild]


def test_child_forked_before_the_watch_is_not_told(processes, recorder, start):
    child = start.sh("sleep 60 & echo; wait")
    child.stdout.readline()
    processes.watch(child.pid)
    processes.sync()
    assert recorder.forks == []


def test_fork_of_a_process_no_longer_watched_is_not_told(processes, recorder, start):
    child = start.sh("read line; sleep 60 & echo; wait")
    processes.watch(child.pid)
    processes.unwatch(child.pid)
    tell(child)
    processes.sync()
    assert recorder.forks == []


def test_exit_is_told_while_the_process_is_a_zombie(processes, recorder, start, died):
    child = start.sh("read line")
    processes.watch(child.pid)
    child.kill()
    died(child.pid)
    processes.sync()
    assert recorder.exits == [(child.pid, child.pid)]


def test_exit_is_told_once(processes, recorder, start):
    child = start.sh("read line")
    processes.watch(child.pid)
    child.communicate("\n")
    processes.sync()
    processes.sync()
    assert recorder.exits == [(child.pid, child.pid)]


def test_process_that_died_before_the_watch_is_told_by_the_next_sync(processes, recorder, start):
    child = start("/bin/true")
    child.wait()
    processes.watch(child.pid)
    assert recorder.exits == []
    assert select.select([processes.fileno()], [], [], 0)[0]
    processes.sync()
    assert recorder.exits == [(child.pid, child.pid)]
    assert recorder.left == {child.pid: []}


def test_dead_leader_with_a_live_thread_has_not_left(processes, recorder, start, eventually):
    child = start.python(
        "import ctypes, sys, threading\n"
        "threading.Thread(target=sys.stdin.readline).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    processes.watch(child.pid)
    eventually(lambda: processes.find(child.pid).state == "Z")
    processes.sync()
    assert (child.pid, child.pid) not in recorder.exits
    assert not processes.find(child.pid).zombie
    child.communicate("\n")
    processes.sync()
    assert recorder.exits[-1] == (child.pid, child.pid)


def test_orphan_of_a_double_fork_is_followed_by_the_connector(connected, recorder, start):
    child = start.python(FORKS_TWICE)
    connected.watch(child.pid)
    orphan = int(tell(child))
    connected.sync()
    assert orphan in recorder.children


def test_children_that_died_unseen_are_told_with_their_exits(connected, recorder, start):
    child = start.sh("read line; for i in 1 2 3; do sh -c 'sh -c :; :'; done; echo; read line")
    connected.watch(child.pid)
    tell(child)
    connected.sync()
    assert len(recorder.children) == 6
    assert sorted(recorder.children) == sorted(tgid for tid, tgid in recorder.exits if tid == tgid)


def test_reused_number_is_another_process(connected, recorder, start):
    member, stranger = start.sh("read line"), start.sh("read line")
    connected.watch(member.pid)
    member.communicate("\n")
    news = Fork(stranger.pid, stranger.pid, member.pid, member.pid)
    connected._forks.read = lambda watched: iter([news])
    connected.sync()
    assert recorder.exits == [(member.pid, member.pid)]
    assert recorder.forks == []


def test_child_found_twice_is_told_once(connected, recorder, start):
    parent, child = start.sh("read line"), start.sh("read line")
    connected.watch(parent.pid)
    news = Fork(parent.pid, parent.pid, child.pid, child.pid)
    connected._forks.read = lambda watched: iter([news, news])
    connected._deliver()
    assert recorder.children == [child.pid]
    assert recorder.exits == []


def test_nothing_is_followed_while_nobody_is_watched(connected, recorder, start):
    child = start.sh("read line")
    connected.watch(child.pid)
    connected.unwatch(child.pid)
    connected.woken()
    connected.sync()
    start("/bin/true").wait()
    assert not select.select([connected.fileno()], [], [], 0)[0]
    processes_again = start.sh("read line; sleep 60 & echo $!; wait")
    connected.watch(processes_again.pid)
    grandchild = int(tell(processes_again))
    connected.sync()
    assert recorder.children == [grandchild]


def test_sync_within_a_delivery_is_harmless(connected, recorder, start):
    child = start.sh("read line; sleep 60 & echo; wait")
    told = recorder.forked
    recorder.forked = lambda *args: (connected.sync(), told(*args))
    connected.watch(child.pid)
    tell(child)
    connected.sync()
    assert len(recorder.children) == 1


# -- questions --------------------------------------------------------------------------------


def test_find_of_a_thread_names_its_process(connected):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(connected.find(threading.get_native_id()))
    )
    thread.start()
    thread.join()
    assert found[0].tgid == os.getpid() != found[0].tid


def test_find_tells_the_owner(connected, start):
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    child = start("sleep", "60", user=65534)
    found = connected.find(child.pid)
    assert (found.uid, found.suid, found.kthread, found.zombie) == (65534, 65534, False, False)


def test_find_of_a_zombie_and_of_a_reaped_process(connected, start, died):
    child = start("/bin/true")
    died(child.pid)
    assert connected.find(child.pid).zombie
    child.wait()
    assert connected.find(child.pid) is None


def test_tgids_lists_the_living_in_order(connected, start, died):
    dead, alive = start("/bin/true"), start("sleep", "60")
    died(dead.pid)
    found = connected.tgids()
    assert alive.pid in found
    assert dead.pid not in found
    assert found == sorted(found)


def test_threads_of_a_watched_process_that_is_gone_are_none(connected, recorder, start):
    child = start.sh("read line")
    connected.watch(child.pid)
    child.communicate("\n")
    connected.sync()
    assert recorder.left == {child.pid: []}


# -- kill and freeze --------------------------------------------------------------------------


def test_kill_reaches_children_forked_meanwhile(connected, recorder, start, eventually):
    bomb = start.python("print(flush=True)\ninput()\n" + FORK_BOMB)
    connected.watch(bomb.pid)
    bomb.stdin.write("\n")
    bomb.stdin.flush()
    eventually(lambda: connected.sync() or len(recorder.children) > 20)
    for tgid in list(connected._watched):
        connected.kill(tgid)
    eventually(lambda: connected.sync() or not connected._watched)
    assert not [pid for pid in recorder.children if pid in connected.tgids()]


def test_frozen_process_of_a_closed_host_goes_on(connected, start, eventually):
    child = start.sh("read line")
    connected.watch(child.pid)
    connected.freeze(child.pid)
    eventually(lambda: connected.is_frozen(child.pid))
    connected.close()
    child.communicate("\n", timeout=5)
    assert child.returncode == 0


def test_grandchild_is_known_also_when_both_are_seen_late(recorder, start, monkeypatch):
    monkeypatch.setattr(scan, "last_pid", lambda: 0)
    late = RealProcesses(scan.ForkScan(), lambda: 0, recorder)
    recorder.processes = late
    child = start.sh("echo; read line; sh -c 'sleep 60 & echo; wait' & wait")
    child.stdout.readline()
    late.watch(child.pid)
    tell(child)
    monkeypatch.setattr(processes_module, "clock_ticks", lambda: scan.clock_ticks() + 1000)
    late.sync()
    late.close()
    assert len(recorder.children) == 2


def test_number_of_a_killed_process_is_forgotten_with_the_watch(processes, start, monkeypatch):
    child = start("sleep", "60")
    processes.watch(child.pid)
    processes.kill(child.pid)
    processes.unwatch(child.pid)
    sent = []
    monkeypatch.setattr(processes._pidfds, "send", lambda *signal: sent.append(signal))
    processes._killer.forked(child.pid, child.pid + 1)
    assert sent == []
