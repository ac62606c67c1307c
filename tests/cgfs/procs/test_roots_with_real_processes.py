"""The model and real processes together: what real cgroup2 shows in the same situations."""

import errno
import os
import signal
import time

import pytest
import trio

from cgfs.core.caller import Caller
from cgfs.core.roots import Roots
from cgfs.errors import CgroupError
from cgfs.procs import ReleaseAgent, proc, watch

ROOT = Caller(0, 0, os.getpid())
THREAD = """
import sys, threading
def stay():
    print(threading.get_native_id(), flush=True)
    sys.stdin.readline()
threading.Thread(target=stay).start()
"""
LEADER_EXITS = (
    THREAD + "import ctypes, time; time.sleep(0.02); ctypes.CDLL(None).pthread_exit(None)"
)
FORK_BOMB = """
import os, time
print(flush=True)
input()
os.fork(); os.fork()
while True:
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
"""


class Host:
    """Reads and writes control files by path, as root unless said otherwise."""

    def __init__(self, processes):
        self.roots = Roots([], processes)
        self.processes = processes
        self.hierarchy = self.roots.v2
        processes.members = self.roots.tasks

    def mkdir(self, path):
        parent, _, name = path.rpartition("/")
        return self.hierarchy.mkdir(self.hierarchy.find(parent), name)

    def rmdir(self, path):
        self.hierarchy.rmdir(self.hierarchy.find(path))

    def read(self, path, file, caller=ROOT):
        node, slot = self._file(path, file)
        return node.rows[slot - 1].show(node, caller)

    def write(self, path, file, text, caller=ROOT):
        node, slot = self._file(path, file)
        text = text if isinstance(text, bytes) else str(text).encode()
        node.rows[slot - 1].write(node, text.split(b"\0")[0], caller, time.monotonic_ns())

    def procs(self, path, caller=ROOT):
        return [int(line) for line in self.read(path, "cgroup.procs", caller).split()]

    def threads(self, path):
        return [int(line) for line in self.read(path, "cgroup.threads").split()]

    def events(self, path):
        return self.read(path, "cgroup.events")

    def _file(self, path, file):
        return self.hierarchy.file(self.hierarchy.find(path), file)


@pytest.fixture
def host(processes):
    host = Host(processes)
    host.mkdir("/d")
    return host


@pytest.fixture
def connected_host(connected):
    host = Host(connected)
    host.mkdir("/d")
    return host


@pytest.fixture
def waiter(start):
    return lambda: start.sh("read line")


@pytest.fixture
def frozen(host, eventually):
    """Waits until a cgroup with processes is frozen; on an idle machine the first look sees it."""
    return lambda path: eventually(lambda: host.events(path) == "populated 1\nfrozen 1\n")


def refused(host, path, file, text, caller=ROOT):
    with pytest.raises(CgroupError) as caught:
        host.write(path, file, text, caller)
    return caught.value.errno


def state(child):
    return proc.read_stat(child.pid).state


# -- F.4: processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling", ["{0}", " {0} \n", "{0:#x}", "0{0:o}", "+{0}", "{0}\0junk", "{0}\n"]
)
def test_pid_in_every_spelling_moves_the_process(host, waiter, spelling):
    child = waiter()
    host.write("/d", "cgroup.procs", spelling.format(child.pid))
    assert host.procs("/d") == [child.pid]
    assert child.pid not in host.procs("/")


@pytest.mark.parametrize(
    "text",
    ["\n", " ", "abc", "-1", "1 2", "1\n2", "0x", "1.5", "2147483648", "9" * 23, "\0"],
)
def test_text_that_is_no_pid_is_einval(host, text):
    assert refused(host, "/d", "cgroup.procs", text) == errno.EINVAL


def test_pid_of_nobody_is_esrch(host, start):
    reaped = start("/bin/true")
    reaped.wait()
    for pid in (99999999, 2147483647, reaped.pid):
        assert refused(host, "/d", "cgroup.procs", pid) == errno.ESRCH


def test_kthreadd_is_einval(host):
    if proc.read_stat(proc.KTHREADD_PID) is None:
        pytest.skip("kernel threads are not visible in this pid namespace")
    assert refused(host, "/d", "cgroup.procs", proc.KTHREADD_PID) == errno.EINVAL


def test_zero_is_the_writer(host, waiter):
    child = waiter()
    host.write("/d", "cgroup.procs", "0", Caller(0, 0, child.pid))
    assert host.procs("/d") == [child.pid]


def test_zero_to_threads_of_another_domain_is_eopnotsupp(host, waiter):
    caller = Caller(0, 0, waiter().pid)
    assert refused(host, "/d", "cgroup.threads", "0", caller) == errno.EOPNOTSUPP


def test_thread_id_moves_the_whole_process(host, start):
    child = start.python(THREAD)
    tid = int(child.said)
    host.write("/d", "cgroup.procs", tid)
    assert host.procs("/d") == [child.pid]
    assert sorted(host.threads("/d")) == sorted([child.pid, tid])


def test_order_is_that_of_joining(host, waiter):
    host.mkdir("/e")
    k1, k2, k3 = (waiter().pid for _ in range(3))
    for pid in (k1, k2, k3):
        host.write("/d", "cgroup.procs", pid)
    assert host.procs("/d") == [k1, k2, k3]
    host.write("/e", "cgroup.procs", k1)
    host.write("/d", "cgroup.procs", k1)
    assert host.procs("/d") == [k2, k3, k1]
    host.write("/d", "cgroup.procs", k2)
    assert host.procs("/d") == [k2, k3, k1]


def test_pids_moved_in_descending_order_are_listed_so(host, waiter):
    pids = sorted((waiter().pid for _ in range(3)), reverse=True)
    for pid in pids:
        host.write("/d", "cgroup.procs", pid)
    assert host.procs("/d") == pids


def test_zombie_can_be_written_and_is_not_listed(host, start, died):
    zombie = start("/bin/true")
    died(zombie.pid)
    host.write("/d", "cgroup.procs", zombie.pid)
    assert host.procs("/d") == []


def test_zombie_leaves_its_cgroup_which_can_be_removed(host, waiter, died):
    host.mkdir("/d/z")
    child = waiter()
    host.write("/d/z", "cgroup.procs", child.pid)
    child.kill()
    died(child.pid)
    assert host.procs("/d/z") == []
    assert host.events("/d/z") == "populated 0\nfrozen 0\n"
    host.rmdir("/d/z")


def test_rmdir_finds_out_by_itself_that_the_last_process_died(host, waiter, died):
    child = waiter()
    host.write("/d", "cgroup.procs", child.pid)
    with pytest.raises(CgroupError) as caught:
        host.rmdir("/d")
    assert caught.value.errno == errno.EBUSY
    child.kill()
    died(child.pid)
    host.rmdir("/d")


def test_leader_that_exited_is_listed_while_a_thread_lives(host, start, eventually):
    child = start.python(LEADER_EXITS)
    host.write("/d", "cgroup.procs", child.pid)
    eventually(lambda: state(child) == "Z")
    assert host.procs("/d") == [child.pid]
    assert host.threads("/d") == [int(child.said)]
    assert host.events("/d").startswith("populated 1\n")


def test_leader_that_exited_stays_behind_when_its_threads_move(host, start, eventually):
    host.mkdir("/e")
    child = start.python(LEADER_EXITS)
    host.write("/d", "cgroup.procs", child.pid)
    eventually(lambda: state(child) == "Z")
    host.write("/e", "cgroup.procs", child.pid)
    assert host.threads("/e") == [int(child.said)]
    assert host.procs("/d") == [child.pid]


def test_move_of_the_parent_leaves_earlier_children_behind(host, start):
    host.mkdir("/e")
    parent = start.sh("read line; sleep 60 & echo $!; wait")
    host.write("/d", "cgroup.procs", parent.pid)
    parent.stdin.write("\n")
    parent.stdin.flush()
    child = int(parent.stdout.readline())
    assert host.procs("/d") == [parent.pid, child]
    host.write("/e", "cgroup.procs", parent.pid)
    assert (host.procs("/d"), host.procs("/e")) == ([child], [parent.pid])


def test_child_of_a_child_is_a_member(host, start):
    parent = start.sh("read line; sh -c 'sleep 60 & echo $!; wait' & wait")
    host.write("/d", "cgroup.procs", parent.pid)
    parent.stdin.write("\n")
    parent.stdin.flush()
    grandchild = int(parent.stdout.readline())
    assert grandchild in host.procs("/d")
    assert len(host.procs("/d")) == 3


def test_foreign_members_are_zero_inside_a_pid_namespace(host, start, waiter):
    if os.geteuid() != 0:
        pytest.skip("needs root to make a pid namespace")
    inner = start.python(
        "import ctypes, os, sys\n"
        "assert ctypes.CDLL(None).unshare(0x20000000) == 0\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True); os.waitpid(pid, 0)\n"
        "else: sys.stdin.readline()\n"
    )
    caller = Caller(0, 0, int(inner.said))
    for _ in range(6):
        host.write("/d", "cgroup.procs", waiter().pid)
    assert host.read("/d", "cgroup.procs", caller) == "0\n" * 6
    host.write("/d", "cgroup.procs", "1", caller)
    assert host.procs("/d")[-1] == caller.pid
    assert host.procs("/d", caller)[-1] == 1


async def test_populated_goes_to_zero_soon_after_the_last_exit(host, waiter, nursery):
    await nursery.start(watch.run, host.processes)
    child = waiter()
    host.write("/d", "cgroup.procs", child.pid)
    cgrp = host.hierarchy.find("/d")
    child.kill()
    began = trio.current_time()
    with trio.fail_after(5):
        while cgrp.populated:  # noqa: ASYNC110  looks without asking the processes
            await trio.sleep(0.0005)
    assert trio.current_time() - began < 1.0


# -- freeze and kill --------------------------------------------------------------------------


def test_frozen_cgroup_shows_it_at_once(host, waiter, frozen):
    children = [waiter() for _ in range(10)]
    for child in children:
        host.write("/d", "cgroup.procs", child.pid)
    host.write("/d", "cgroup.freeze", "1")
    frozen("/d")
    assert {state(child) for child in children} == {"T"}
    host.write("/d", "cgroup.freeze", "0")
    assert host.events("/d") == "populated 1\nfrozen 0\n"
    assert "T" not in {state(child) for child in children}


def test_process_moved_into_a_frozen_cgroup_stops_and_out_of_it_goes_on(host, waiter, frozen):
    host.mkdir("/e")
    host.write("/d", "cgroup.freeze", "1")
    child = waiter()
    host.write("/d", "cgroup.procs", child.pid)
    frozen("/d")
    host.write("/e", "cgroup.procs", child.pid)
    assert state(child) != "T"
    assert host.events("/d") == "populated 0\nfrozen 1\n"


def test_frozen_process_moved_to_the_root_goes_on(host, waiter, frozen):
    host.write("/d", "cgroup.freeze", "1")
    child = waiter()
    host.write("/d", "cgroup.procs", child.pid)
    frozen("/d")
    host.write("/", "cgroup.procs", child.pid)
    assert state(child) != "T"


def test_frozen_to_frozen_stays_stopped(host, waiter, frozen):
    host.mkdir("/e")
    for path in ("/d", "/e"):
        host.write(path, "cgroup.freeze", "1")
    child = waiter()
    host.write("/d", "cgroup.procs", child.pid)
    frozen("/d")
    host.write("/e", "cgroup.procs", child.pid)
    frozen("/e")
    assert state(child) == "T"
    host.write("/e", "cgroup.freeze", "0")
    assert state(child) != "T"


def test_child_forked_in_a_frozen_cgroup_is_stopped(connected_host, start, eventually):
    bomb = start.python(FORK_BOMB)
    connected_host.write("/d", "cgroup.procs", bomb.pid)
    bomb.stdin.write("\n")
    bomb.stdin.flush()
    eventually(lambda: len(connected_host.procs("/d")) > 10)
    connected_host.write("/d", "cgroup.freeze", "1")
    eventually(lambda: connected_host.events("/d") == "populated 1\nfrozen 1\n")
    members = connected_host.procs("/d")
    assert {proc.read_stat(pid).state for pid in members} == {"T"}
    connected_host.write("/d", "cgroup.kill", "1")
    eventually(lambda: connected_host.events("/d") == "populated 0\nfrozen 1\n")


def test_process_stopped_before_is_still_stopped_after_thaw(host, waiter, eventually, frozen):
    child = waiter()
    child.send_signal(signal.SIGSTOP)
    eventually(lambda: state(child) == "T")
    host.write("/d", "cgroup.procs", child.pid)
    host.write("/d", "cgroup.freeze", "1")
    frozen("/d")
    host.write("/d", "cgroup.freeze", "0")
    assert state(child) == "T"


def test_kill_reaches_a_frozen_tree(host, waiter, eventually):
    children = []
    for path in ("/d", "/d/a", "/d/a/b"):
        if path != "/d":
            host.mkdir(path)
        children.append(waiter())
        host.write(path, "cgroup.procs", children[-1].pid)
    host.write("/d", "cgroup.freeze", "1")
    host.write("/d", "cgroup.kill", "1")
    assert [child.wait(5) for child in children] == [-signal.SIGKILL] * 3
    assert host.events("/d") == "populated 0\nfrozen 1\n"


def test_kill_ends_a_fork_bomb(connected_host, start, eventually):
    bomb = start.python(FORK_BOMB)
    connected_host.write("/d", "cgroup.procs", bomb.pid)
    bomb.stdin.write("\n")
    bomb.stdin.flush()
    eventually(lambda: len(connected_host.procs("/d")) > 10)
    connected_host.write("/d", "cgroup.kill", "1")
    eventually(lambda: connected_host.events("/d").startswith("populated 0\n"))
    connected_host.rmdir("/d")


async def test_sigterm_to_a_frozen_process_ends_it(host, waiter, nursery, frozen):
    await nursery.start(watch.run, host.processes)
    child = waiter()
    host.write("/d", "cgroup.procs", child.pid)
    host.write("/d", "cgroup.freeze", "1")
    frozen("/d")
    child.terminate()
    with trio.fail_after(5):
        while host.procs("/d"):  # noqa: ASYNC110  the kernel sets no event
            await trio.sleep(0.001)
    assert child.wait() == -signal.SIGTERM


# -- threads ----------------------------------------------------------------------------------


@pytest.fixture
def threaded(host):
    """/d is a thread root with the threaded /d/t in it."""
    host.mkdir("/d/t")
    host.write("/d/t", "cgroup.type", "threaded")
    return host


def test_single_thread_moves_within_its_domain(threaded, start):
    child = start.python(THREAD)
    tid = int(child.said)
    threaded.write("/d", "cgroup.procs", child.pid)
    threaded.write("/d/t", "cgroup.threads", tid)
    assert threaded.threads("/d/t") == [tid]
    assert threaded.threads("/d") == [child.pid]
    assert threaded.procs("/d") == [child.pid]


def test_thread_leaves_its_cgroup_when_it_exits(threaded, start, eventually):
    child = start.python(THREAD + "time = __import__('time'); time.sleep(60)")
    tid = int(child.said)
    threaded.write("/d", "cgroup.procs", child.pid)
    threaded.write("/d/t", "cgroup.threads", tid)
    child.stdin.write("\n")
    child.stdin.flush()
    eventually(lambda: threaded.threads("/d/t") == [])
    assert threaded.events("/d/t") == "populated 0\nfrozen 0\n"


def test_child_of_a_thread_joins_the_cgroup_of_that_thread(connected_host, start):
    threaded = connected_host
    threaded.mkdir("/d/t")
    threaded.write("/d/t", "cgroup.type", "threaded")
    child = start.python(
        THREAD.replace(
            "sys.stdin.readline()",
            "sys.stdin.readline(); import subprocess; "
            "print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.readline()",
        )
    )
    tid = int(child.said)
    threaded.write("/d", "cgroup.procs", child.pid)
    threaded.write("/d/t", "cgroup.threads", tid)
    child.stdin.write("\n")
    child.stdin.flush()
    grandchild = int(child.stdout.readline())
    assert sorted(threaded.threads("/d/t")) == sorted([tid, grandchild])
    assert sorted(threaded.procs("/d")) == sorted([child.pid, grandchild])


# -- v1 ---------------------------------------------------------------------------------------


async def test_release_agent_runs_when_the_last_process_exits(connected, waiter, nursery, tmp_path):
    host = Host(connected)
    host.hierarchy = host.roots.mount_v1([], "test")
    agent = ReleaseAgent()
    host.roots.release = agent.submit
    script = tmp_path / "agent"
    script.write_text(f'#!/bin/sh\necho "$1" >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/out\n')
    script.chmod(0o755)
    await nursery.start(agent.run)
    await nursery.start(watch.run, connected)
    host.mkdir("/a")
    host.write("/", "release_agent", str(script))
    host.write("/a", "notify_on_release", "1")
    child = waiter()
    host.write("/a", "cgroup.procs", child.pid)
    child.kill()
    with trio.fail_after(10):
        while not (tmp_path / "out").exists():  # noqa: ASYNC110  the agent is another process
            await trio.sleep(0.002)
    assert (tmp_path / "out").read_text() == "/a\n"


def test_v1_mover_must_own_the_process(host, waiter):
    host.hierarchy = host.roots.mount_v1([], "test")
    host.mkdir("/a")
    nobody = Caller(65534, 65534, os.getpid())
    assert refused(host, "/a", "cgroup.procs", waiter().pid, nobody) == errno.EACCES
