import ctypes
import os
import signal
import time

import pytest

from cgfs.procs import proc
from cgfs.procs.freezer import SETTLE_S, Freezer
from cgfs.procs.pidfds import Pidfds

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
IGNORES_SIGTERM = "import signal, sys; signal.signal(15, signal.SIG_IGN); print(); sys.stdin.read()"


@pytest.fixture
def freezer():
    pidfds = Pidfds()
    yield Freezer(pidfds)
    pidfds.close()


@pytest.fixture
def sleeper(start):
    return start.sh("read line")


def state(child):
    return proc.read_stat(child.pid).state


def enforced(freezer, child):
    freezer.enforce()
    return state(child)


def wait_stopped(child):
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


def test_frozen_process_stops(freezer, sleeper, eventually):
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    assert state(sleeper) == "T"


def test_running_process_is_not_frozen(freezer, sleeper):
    assert not freezer.is_frozen(sleeper.pid)


def test_process_that_is_gone_does_not_keep_a_cgroup_from_being_frozen(
    freezer, sleeper, eventually
):
    freezer.freeze(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    eventually(lambda: freezer.is_frozen(sleeper.pid))


def test_thawed_process_goes_on(freezer, sleeper, eventually):
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    freezer.thaw(sleeper.pid)
    assert state(sleeper) != "T"


def test_freeze_and_thaw_at_once_leaves_it_running(freezer, sleeper):
    freezer.freeze(sleeper.pid)
    freezer.thaw(sleeper.pid)
    sleeper.communicate("\n", timeout=5)
    assert sleeper.returncode == 0


def test_freezing_does_not_wait(freezer, sleeper, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("slept"))
    freezer.freeze(sleeper.pid)
    freezer.thaw(sleeper.pid)


def test_all_threads_stop(freezer, start, eventually):
    child = start.python(
        "import threading, time\n"
        "for _ in range(3): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    freezer.freeze(child.pid)
    eventually(lambda: freezer.is_frozen(child.pid))
    assert list(proc.thread_states(child.pid).values()) == ["T"] * 4


def test_process_stopped_before_is_frozen_at_once_and_stays_stopped(freezer, sleeper, eventually):
    sleeper.send_signal(signal.SIGSTOP)
    eventually(lambda: state(sleeper) == "T")
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    freezer.thaw(sleeper.pid)
    assert state(sleeper) == "T"


def test_process_stopped_while_frozen_stays_stopped(freezer, sleeper, eventually):
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    sleeper.send_signal(signal.SIGSTOP)
    freezer.thaw(sleeper.pid)
    assert state(sleeper) == "T"
    sleeper.send_signal(signal.SIGCONT)
    assert state(sleeper) != "T"


def test_process_that_is_continued_while_frozen_is_stopped_again(freezer, sleeper, eventually):
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    sleeper.send_signal(signal.SIGCONT)
    eventually(lambda: enforced(freezer, sleeper) == "T")


def test_stop_that_was_lifted_while_frozen_is_forgotten(freezer, sleeper, eventually):
    sleeper.send_signal(signal.SIGSTOP)
    eventually(lambda: state(sleeper) == "T")
    freezer.freeze(sleeper.pid)
    sleeper.send_signal(signal.SIGCONT)
    eventually(lambda: enforced(freezer, sleeper) == "T")
    freezer.thaw(sleeper.pid)
    assert state(sleeper) != "T"


def test_sigterm_ends_a_frozen_process(freezer, sleeper, eventually):
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    sleeper.terminate()
    eventually(lambda: enforced(freezer, sleeper) == "Z")
    assert sleeper.wait() == -signal.SIGTERM


def test_ignored_sigterm_leaves_a_frozen_process_frozen(freezer, start, eventually):
    child = start.python(IGNORES_SIGTERM)
    freezer.freeze(child.pid)
    eventually(lambda: freezer.is_frozen(child.pid))
    child.terminate()
    freezer.enforce()
    assert state(child) == "T"


def test_sigkill_ends_a_frozen_process(freezer, sleeper, eventually):
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    sleeper.kill()
    assert sleeper.wait(5) == -signal.SIGKILL


def test_traced_process_counts_as_frozen(freezer, sleeper, eventually):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_SEIZE, sleeper.pid, None, None):
        pytest.skip(f"ptrace: {os.strerror(ctypes.get_errno())}")
    libc.ptrace(PTRACE_INTERRUPT, sleeper.pid, None, None)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    assert state(sleeper) == "t"
    freezer.freeze(sleeper.pid)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    libc.ptrace(PTRACE_DETACH, sleeper.pid, None, None)
    eventually(lambda: freezer.is_frozen(sleeper.pid))
    freezer.thaw(sleeper.pid)
    assert state(sleeper) != "T"


def test_parent_that_waits_for_vfork_counts_as_frozen(freezer, start, eventually):
    # posix_spawn waits in the kernel until its child has opened the file: nobody writes the fifo.
    child = start.python(
        "import os, tempfile\n"
        "fifo = os.path.join(tempfile.mkdtemp(), 'fifo')\n"
        "os.mkfifo(fifo)\n"
        "print(fifo, flush=True)\n"
        "os.posix_spawn('/bin/true', ['true'], {}, "
        "file_actions=[(os.POSIX_SPAWN_OPEN, 9, fifo, os.O_RDONLY, 0)])\n"
    )
    try:
        eventually(lambda: state(child) == "D")
        freezer.freeze(child.pid)
        eventually(lambda: freezer.is_frozen(child.pid))
        freezer.thaw(child.pid)
        with open(child.said, "w"):
            pass
        assert child.wait(5) == 0
    finally:
        os.unlink(child.said)
        os.rmdir(os.path.dirname(child.said))


def test_server_itself_is_never_stopped(freezer):
    freezer.freeze(os.getpid())
    assert freezer.is_frozen(os.getpid())
    assert len(freezer) == 0


def test_kernel_thread_is_left_alone(freezer):
    if proc.read_stat(proc.KTHREADD_PID) is None:
        pytest.skip("kernel threads are not visible in this pid namespace")
    freezer.freeze(proc.KTHREADD_PID)
    assert freezer.is_frozen(proc.KTHREADD_PID)
    assert len(freezer) == 0


def test_thaw_all_leaves_nobody_stopped(freezer, start):
    children = [start.sh("read line") for _ in range(3)]
    for child in children:
        freezer.freeze(child.pid)
    for child in children:
        wait_stopped(child)
    freezer.thaw_all()
    assert all(state(child) != "T" for child in children)


def test_process_that_stops_late_is_reported_once(start):
    pidfds = Pidfds()
    held_back = []
    child = start.sh("read line")
    pidfds.send = lambda *signal: held_back.append(signal)
    now = [0.0]
    freezer = Freezer(pidfds, monotonic=lambda: now[0])
    freezer.freeze(child.pid)
    now[0] = SETTLE_S / 2
    assert freezer.enforce() == []
    now[0] = SETTLE_S
    assert not freezer.is_frozen(child.pid)
    Pidfds.send(pidfds, *held_back[0])
    wait_stopped(child)
    assert freezer.enforce() == [child.pid]
    assert freezer.enforce() == []
    pidfds.close()


def test_thaw_after_a_repeated_stop_goes_on(start):
    pidfds = Pidfds()
    child = start.sh("read line")
    now = [0.0]
    freezer = Freezer(pidfds, monotonic=lambda: now[0])
    freezer.freeze(child.pid)
    wait_stopped(child)
    child.send_signal(signal.SIGCONT)
    now[0] = SETTLE_S
    freezer.enforce()
    wait_stopped(child)
    pidfds.send(child.pid, signal.SIGSTOP)
    freezer.thaw(child.pid)
    assert state(child) != "T"
    pidfds.close()


def test_sigterm_waits_on_in_a_process_that_was_stopped_before(freezer, sleeper, monkeypatch):
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_stopped(sleeper)
    os.kill(sleeper.pid, signal.SIGTERM)
    sent = []
    monkeypatch.setattr(freezer._pidfds, "send", lambda *signal: sent.append(signal))
    freezer.freeze(sleeper.pid)
    freezer.enforce()
    assert sent == []
