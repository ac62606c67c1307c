import errno
import os
import select
import signal

import pytest

from cgfs.procs.pidfds import Pidfds


@pytest.fixture
def pidfds():
    held = Pidfds()
    yield held
    held.close()


@pytest.fixture
def no_pidfds(monkeypatch, pidfds):
    """Holds processes as if no descriptor were left."""

    def refuse(pid):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    return pidfds


def readable(pidfds, timeout_s=0.0):
    return bool(select.select([pidfds.fileno()], [], [], timeout_s)[0])


def test_nobody_is_gone_while_all_live(pidfds, start):
    assert pidfds.add(start("sleep", "60").pid)
    assert pidfds.gone() == []
    assert not readable(pidfds)


def test_dead_process_is_gone_before_it_is_reaped(pidfds, start):
    child = start.sh("read line")
    pidfds.add(child.pid)
    child.kill()
    assert readable(pidfds, 5)
    assert pidfds.gone() == [child.pid]
    assert not pidfds.alive(child.pid)


def test_dead_process_stays_gone_until_discarded(pidfds, start):
    child = start("/bin/true")
    pidfds.add(child.pid)
    child.wait()
    assert pidfds.gone() == pidfds.gone() == [child.pid]
    pidfds.discard(child.pid)
    assert pidfds.gone() == []
    assert not readable(pidfds)


def test_add_of_no_process_is_refused(pidfds, start):
    child = start("/bin/true")
    child.wait()
    assert not pidfds.add(child.pid)


def test_wake_makes_it_readable_until_heard(pidfds):
    pidfds.wake()
    assert readable(pidfds)
    assert pidfds.gone() == []
    assert readable(pidfds)
    pidfds.woken()
    pidfds.woken()
    assert not readable(pidfds)


def test_send_to_a_reaped_process_is_silent(pidfds, start):
    child = start("/bin/true")
    pidfds.add(child.pid)
    child.wait()
    pidfds.send(child.pid, signal.SIGKILL)


def test_send_without_permission_leaves_the_process_alone(pidfds, monkeypatch, caplog):
    def refuse(fd, signum):
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    pidfds.add(os.getpid())
    pidfds.send(os.getpid(), signal.SIGKILL)
    pidfds.send(os.getpid(), signal.SIGKILL)
    assert caplog.text.count("no permission") == 1


def test_without_descriptors_the_start_time_tells(no_pidfds, start, died):
    child = start.sh("read line")
    assert no_pidfds.add(child.pid)
    assert no_pidfds.alive(child.pid)
    no_pidfds.send(child.pid, signal.SIGKILL)
    child.wait()
    assert no_pidfds.gone() == [child.pid]
    assert not no_pidfds.alive(child.pid)


def test_without_descriptors_a_reused_number_is_somebody_else(no_pidfds, start):
    child = start.sh("read line")
    no_pidfds.add(child.pid)
    no_pidfds._start[child.pid] -= 1
    no_pidfds.send(child.pid, signal.SIGKILL)
    assert no_pidfds.gone() == [child.pid]
    assert child.poll() is None
