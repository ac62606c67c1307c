"""The host's last-branch records, told to its supervisors."""

import pytest
import trio

from kvmsim.control.messages import LbrState
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
    facility = supervisor.system.machine.lbr_facility
    lbr.follow(facility, supervisor.connection, taken=supervisor.attached.lbr_taken)
    return facility


async def test_a_supervisor_hears_that_the_records_are_taken_and_given_back(served, supervisor):
    facility = facility_of(supervisor)
    assert served.host.set_lbr(LbrState(taken=True)) == LbrState(taken=True)
    await until(lambda: facility.taken, supervisor.connection)
    served.host.set_lbr(LbrState(taken=False))
    await until(lambda: not facility.taken, supervisor.connection)
    assert facility.takeovers == 1


async def test_a_supervisor_that_comes_later_finds_them_taken(served, supervise):
    served.host.set_lbr(LbrState(taken=True))
    facility = facility_of(await supervise())
    assert facility.taken
