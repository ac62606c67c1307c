import signal

import pytest

from cgfs.procs.killer import Killer
from cgfs.procs.pidfds import Pidfds


@pytest.fixture
def killer():
    pidfds = Pidfds()
    yield Killer(pidfds)
    pidfds.close()


def test_kill_is_sigkill(killer, start):
    child = start("sleep", "60")
    killer.kill(child.pid)
    assert child.wait(5) == -signal.SIGKILL


def test_kill_of_a_reaped_process_is_silent(killer, start):
    child = start("/bin/true")
    child.wait()
    killer.kill(child.pid)


def test_child_of_a_killed_process_dies_too(killer, start):
    parent, child = start("sleep", "60"), start("sleep", "60")
    killer.kill(parent.pid)
    killer.forked(parent.pid, child.pid)
    assert child.wait(5) == -signal.SIGKILL


def test_child_of_another_process_lives(killer, start):
    parent, child = start("sleep", "60"), start("sleep", "60")
    killer.forked(parent.pid, child.pid)
    assert child.poll() is None


def test_a_later_process_of_the_same_number_may_have_children(killer, start):
    parent, child = start("sleep", "60"), start("sleep", "60")
    killer.kill(parent.pid)
    killer.forget(parent.pid)
    killer.forked(parent.pid, child.pid)
    assert child.poll() is None
