"""The host's last-branch records told to its supervisors, and lines of their kernels to it."""

import pytest
import trio

from kvmsim.control.client_messages import KernelLine
from kvmsim.control.messages import LbrState, Nothing
from kvmsim.engine.base import Executing
from kvmsim.engine.scripted import Scripted
from kvmsim.kvm.client import LocalClient
from kvmsim.supervise import lbr


@pytest.fixture
async def supervisor(supervise):
    return await supervise()


async def until(condition, connection):
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)
            connection.poll()


def facility_of(supervisor):
    lbr.follow(supervisor.system, supervisor.connection, taken=supervisor.attached.lbr_taken)
    return supervisor.system.machine.lbr_facility


async def test_a_supervisor_hears_that_the_records_are_taken_and_given_back(served, supervisor):
    facility = facility_of(supervisor)
    assert served.host.set_lbr(LbrState(taken=True)) == LbrState(taken=True)
    await until(lambda: facility.taken, supervisor.connection)
    served.host.set_lbr(LbrState(taken=False))
    await until(lambda: not facility.taken, supervisor.connection)
    assert facility.takeovers == 1


async def test_a_guest_that_executes_hears_of_it_at_once(served, supervisor):
    facility = facility_of(supervisor)
    kicks = []
    vcpu = supervisor.system.create_vm(0, LocalClient(100)).create_vcpu(0)
    vcpu.engine = Scripted([Executing(kick=lambda: kicks.append(1))])
    vcpu.kvm_run(0)
    served.host.set_lbr(LbrState(taken=True))
    await until(lambda: facility.taken, supervisor.connection)
    assert kicks == [1]


async def test_a_supervisor_that_comes_later_finds_them_taken(served, supervise):
    served.host.set_lbr(LbrState(taken=True))
    facility = facility_of(await supervise())
    assert facility.taken


async def test_what_a_supervisors_kernel_prints_is_in_the_log_of_the_host(
    served, supervisor, in_thread, caplog
):
    line = KernelLine("x86/split lock detection: #AC: it\x1b happened")
    await in_thread(supervisor.connection.call, "client.log", line, Nothing)
    assert list(served.host.machine.kernel_log) == ["x86/split lock detection: #AC: it? happened"]
    assert "kernel: x86/split lock detection: #AC: it? happened" in caplog.text
