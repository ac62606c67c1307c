import os
import threading

import pytest

from cgfs.procs import proc

THREE_THREADS = """
import threading, time
for _ in range(2):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready")
time.sleep(60)
"""
LEADER_EXITS = """
import ctypes, threading, time, os
def stay():
    print(threading.get_native_id())
    time.sleep(60)
threading.Thread(target=stay).start()
time.sleep(0.05)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_stat_of_our_own_process():
    stat = proc.read_stat(os.getpid())
    assert (stat.tid, stat.ppid, stat.kthread) == (os.getpid(), os.getppid(), False)


def test_stat_with_parentheses_and_blanks_in_the_name(start):
    child = start("/bin/sh", "-c", "printf ') R 7 (' >/proc/$$/comm; echo; read line")
    child.stdout.readline()
    assert proc.slurp(f"/proc/{child.pid}/comm") == b") R 7 (\n"
    assert proc.read_stat(child.pid).ppid == os.getpid()


def test_task_that_does_not_exist_reads_as_none():
    assert proc.read_stat(99_999_999) is None
    assert proc.read_status(99_999_999) is None
    assert not proc.process_alive(99_999_999)


def test_kthreadd_is_a_pinned_kernel_thread():
    stat = proc.read_stat(proc.KTHREADD_PID)
    if stat is None or not stat.kthread:
        pytest.skip("kernel threads are not visible in this pid namespace")
    assert stat.pinned


def test_status_of_a_thread_names_its_process():
    tids = []
    thread = threading.Thread(
        target=lambda: tids.append(proc.read_status(threading.get_native_id()).tgid)
    )
    thread.start()
    thread.join()
    assert tids == [os.getpid()]


def test_status_tells_credentials_and_one_pid_in_our_own_namespace():
    status = proc.read_status(os.getpid())
    assert (status.ruid, status.uid, status.suid) == os.getresuid()
    assert status.pids == (os.getpid(),)


def test_threads_lists_all_live_ones(start, eventually):
    child = start.python(THREE_THREADS)
    assert child.said == "ready"
    eventually(lambda: len(proc.live_threads(child.pid)) == 3)
    assert child.pid in proc.live_threads(child.pid)


def test_zombie_is_not_alive(start, died):
    child = start("/bin/true")
    died(child.pid)
    assert proc.read_stat(child.pid).state == "Z"
    assert not proc.process_alive(child.pid)
    assert child.pid not in proc.live_tgids()


def test_dead_leader_with_a_live_thread_counts_as_alive(start, eventually):
    child = start.python(LEADER_EXITS)
    eventually(lambda: proc.read_stat(child.pid).state == "Z")
    assert proc.process_alive(child.pid)
    assert proc.live_threads(child.pid) == [int(child.said)]
    assert child.pid in proc.live_tgids()


def test_live_tgids_are_processes_and_ascend():
    found = proc.live_tgids()
    assert os.getpid() in found
    assert found == sorted(found)
