"""Bus locks of clients: queued on the host, admitted by a notice."""

import time

import pytest
import trio

from kvmsim.control.client_messages import Process, Situation, VmReport
from kvmsim.control.messages import Nothing


class Vcpu:
    """What the limiter knows of a vCPU."""

    def __init__(self):
        self.admissions = []

    def admitted(self, now_ns):
        self.admissions.append(now_ns)


@pytest.fixture
async def limited(served, supervise, in_thread):
    """A supervisor whose process 100 has used up its one bus lock per 50 ms."""
    served.start_process(100, "a")
    served.write("a/bus_lock.max", "1 50000")
    supervisor = await supervise()
    assert await in_thread(supervisor.accounting.bus_lock, 100, Vcpu(), 0)
    return supervisor.accounting


async def until(condition, *listening):
    """Waits; supervisors that listen hear of notices meanwhile."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)
            for accounting in listening:
                accounting._connection.poll()


def stat(served, cgroup="a"):
    lines = served.cat(f"{cgroup}/bus_lock.stat").splitlines()
    return {key: int(value) for key, value in (line.split() for line in lines)}


async def test_queued_lock_is_admitted_by_a_notice(served, limited, in_thread):
    vcpu = Vcpu()
    assert not await in_thread(limited.bus_lock, 100, vcpu, 0)
    assert vcpu.admissions == []
    await until(lambda: vcpu.admissions, limited)
    assert vcpu.admissions == [7]  # the supervisor's time
    assert (stat(served)["nr_events"], stat(served)["nr_throttled"]) == (2, 1)


async def test_interrupted_wait_stays_owed(served, limited, in_thread):
    vcpu = Vcpu()
    await in_thread(limited.bus_lock, 100, vcpu, 0)
    await in_thread(limited.bus_lock_withdraw, vcpu, 0)
    await trio.sleep(0.08)
    limited._connection.poll()
    assert vcpu.admissions == []
    assert await in_thread(limited.bus_lock, 100, vcpu, 0)
    assert (stat(served)["nr_events"], stat(served)["nr_throttled"]) == (2, 1)


async def test_admission_that_crosses_an_interruption_counts(served, supervise, in_thread):
    served.start_process(100, "a")
    served.write("a/bus_lock.max", "1 20000")
    supervisor = await supervise()  # does not listen to notices
    accounting, vcpu = supervisor.accounting, Vcpu()
    await in_thread(accounting.bus_lock, 100, Vcpu(), 0)
    assert not await in_thread(accounting.bus_lock, 100, vcpu, 0)
    await until(lambda: stat(served)["nr_events"] == 2)
    await in_thread(accounting.bus_lock_withdraw, vcpu, 99)
    assert vcpu.admissions == [99]
    supervisor.connection.deliver()
    assert vcpu.admissions == [99]


async def test_cancelled_wait_is_dropped(served, limited, in_thread):
    vcpu = Vcpu()
    await in_thread(limited.bus_lock, 100, vcpu, 0)
    await in_thread(limited.bus_lock_cancel, 100, vcpu, 0)
    await until(lambda: stat(served)["nr_cancelled"] == 1)
    await trio.sleep(0.06)
    limited._connection.poll()
    assert vcpu.admissions == []


async def test_lock_that_was_never_asked_for_is_dropped_too(served, limited, in_thread):
    await in_thread(limited.bus_lock_cancel, 100, Vcpu(), 0)
    await until(lambda: stat(served)["nr_cancelled"] == 1)


async def test_lock_of_a_process_that_has_ended_is_dropped_without_a_word(
    served, limited, in_thread, caplog
):
    await in_thread(limited.bus_lock_cancel, 4711, Vcpu(), 0)
    await in_thread(limited._connection.call, "client.report", VmReport(), Nothing)
    assert caplog.messages == []


async def test_admission_that_comes_with_the_end_of_a_vcpu_is_not_told(served, limited, in_thread):
    vcpu = Vcpu()
    await in_thread(limited.bus_lock, 100, vcpu, 0)
    served.host.catch_up = lambda: None  # the limiter looks at the time only when it is told
    await trio.sleep(0.06)
    await in_thread(limited.bus_lock_cancel, 100, vcpu, 0)
    await in_thread(limited._connection.call, "client.report", VmReport(), Nothing)
    limited._connection.poll()
    assert vcpu.admissions == []


def let_pass(duration_ns):
    """Time passes and the host does not look."""
    until_ns = time.monotonic_ns() + duration_ns
    while time.monotonic_ns() < until_ns:
        pass


async def test_lock_that_was_admitted_meanwhile_is_not_cancelled(served, limited, in_thread):
    vcpu = Vcpu()
    await in_thread(limited.bus_lock, 100, vcpu, 0)
    await until(lambda: stat(served)["nr_events"] == 2)
    await in_thread(limited.bus_lock_cancel, 100, vcpu, 0)
    await in_thread(limited._connection.call, "client.report", VmReport(), Nothing)
    assert stat(served)["nr_cancelled"] == 0


async def test_lock_that_the_end_of_a_supervisor_finds_admitted_leaves_nothing(
    served, limited, in_thread
):
    await in_thread(limited.bus_lock, 100, Vcpu(), 0)
    [session] = served.host.clients
    let_pass(60_000_000)
    session.close()
    assert (stat(served)["nr_events"], stat(served)["nr_cancelled"]) == (2, 0)
    assert served.host.roots.tasks.followers == {}


async def test_waiter_of_a_moved_process_waits_in_its_new_cgroup(served, limited, in_thread):
    vcpu = Vcpu()
    served.write("a/bus_lock.max", "1 1000000")
    served.write("a/bus_lock.max", "1 999999")
    await in_thread(limited.bus_lock, 100, Vcpu(), 0)
    assert not await in_thread(limited.bus_lock, 100, vcpu, 0)
    served.write("b/cgroup.procs", "100")  # no limit there
    await until(lambda: vcpu.admissions, limited)
    assert stat(served, "b")["nr_events"] == 1


async def test_limit_is_asked_for_once_and_told_when_it_changes(served, supervise, in_thread):
    served.start_process(100, "a")
    supervisor = await supervise()
    limited = supervisor.accounting.bus_lock_limited
    assert not await in_thread(limited, 100)
    served.write("a/bus_lock.max", "5")
    await until(lambda: limited(100), supervisor.accounting)
    served.write("a/bus_lock.max", "max")
    await until(lambda: not limited(100), supervisor.accounting)
    served.write("b/bus_lock.max", "5")
    served.write("b/cgroup.procs", "100")
    await until(lambda: limited(100), supervisor.accounting)
    served.write("cgroup.subtree_control", "-bus_lock")
    await until(lambda: not limited(100), supervisor.accounting)


async def test_freeze_thaw_and_end_of_a_process_are_told(served, supervise, in_thread):
    served.start_process(100, "a")
    supervisor = await supervise()
    heard = []
    supervisor.accounting.on_situation = lambda s: heard.append((s.frozen, s.cgroup))
    await in_thread(supervisor.accounting.bus_lock_limited, 100)
    served.write("a/cgroup.freeze", "1")
    await until(lambda: heard == [(True, "/a")], supervisor.accounting)
    served.write("a/cgroup.freeze", "0")
    await until(lambda: heard == [(True, "/a"), (False, "/a")], supervisor.accounting)
    served.processes.uids.clear()
    served.host.roots.tasks.exited(100, 100, served.host.now_ns())
    await until(lambda: heard[2:] == [(False, "/")], supervisor.accounting)


async def test_queue_of_a_dropped_supervisor_is_empty(served, limited, in_thread, supervise):
    vcpu = Vcpu()
    await in_thread(limited.bus_lock, 100, vcpu, 0)
    limited._connection.close()
    await until(lambda: not list(served.host.clients))
    assert stat(served)["nr_cancelled"] == 1
    assert served.host.roots.tasks.followers == {}


async def test_nobody_waits_for_a_host_that_is_gone(served, limited, in_thread):
    vcpu = Vcpu()
    await in_thread(limited.bus_lock, 100, vcpu, 0)
    served.scope.cancel()
    await until(lambda: vcpu.admissions, limited)
    assert await in_thread(limited.bus_lock, 100, Vcpu(), 0)
    assert not await in_thread(limited.bus_lock_limited, 4711)


async def test_task_delivers_notices_and_the_end_of_the_host(served, supervise, in_thread, nursery):
    served.start_process(100, "a")
    connection = (await supervise()).connection
    heard, ended = [], trio.Event()
    connection.handle("situation", heard.append)
    connection.on_lost.append(ended.set)
    await in_thread(connection.call, "client.follow", Process(100), Situation)
    nursery.start_soon(connection.run)
    served.write("a/cgroup.freeze", "1")
    await until(lambda: heard)
    served.scope.cancel()
    with trio.fail_after(5):
        await ended.wait()


async def test_host_that_answers_much_that_is_not_read_goes_on(supervise, in_thread):
    connection = (await supervise()).connection

    def give_much_back():
        for _ in range(3000):
            connection.post("client.report", VmReport())
        connection.call("client.report", VmReport(), Nothing)

    await in_thread(give_much_back)
    assert not connection.lost
