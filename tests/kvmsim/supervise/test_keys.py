"""Keys and charges of clients: taken on the host, given back whatever happens."""

from errno import EBUSY, EINVAL, EIO, EPERM, ESRCH

import msgspec
import pytest
import trio

from kvmsim.control.client_messages import EndCharge, ForCaller, FreeKey
from kvmsim.control.messages import Nothing
from kvmsim.errors import KvmError

SEV = 2


def used(served, cgroup):
    text = served.cat(f"{cgroup}/misc.current")
    return int(dict(line.split() for line in text.splitlines())["sev"])


async def until(condition):
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - counts are in files, nobody tells
            await trio.sleep(0.001)


def start(supervisor, pid, vm_type=SEV):
    """What a client's CREATE_VM and INIT2 do."""
    vm = supervisor.system.create_vm(vm_type, pid)
    try:
        vm.encrypt()
    except BaseException:
        vm.close()
        raise
    return vm


async def refusal(in_thread, call, *args):
    with pytest.raises(KvmError) as caught:
        await in_thread(call, *args)
    return caught.value


async def test_asid_is_the_hosts_and_charged_to_the_cgroup_of_the_caller(
    served, supervise, in_thread
):
    supervisor = await supervise()
    vm = await in_thread(start, supervisor, served.start_process(100, "a"))
    assert (vm.key.asid, used(served, "a"), used(served, "b")) == (4, 1, 0)
    assert served.cat("a/encryption_ids.sev.current") == "1\n"
    await in_thread(vm.close)
    await until(lambda: used(served, "a") == 0)
    assert served.cat("a/encryption_ids.sev.current") == "0\n"


async def test_two_supervisors_share_one_pool(served, supervise, in_thread):
    first, second = await supervise(), await supervise()
    one = await in_thread(start, first, served.start_process(100, "a"))
    two = await in_thread(start, second, served.start_process(200, "b"))
    assert [one.key.asid, two.key.asid] == [4, 5]
    assert served.host.statistics().resources["sev"].used == 2


async def test_last_asid_goes_to_one_and_the_other_is_refused_where_the_spec_says(
    served, supervise, in_thread
):
    first, second = await supervise(), await supervise()
    await in_thread(start, first, served.start_process(100, "a"))
    await in_thread(start, first, 100)
    error = await refusal(in_thread, start, second, served.start_process(200, "b"))
    assert error.errno == EBUSY
    assert 'the host is at misc.capacity "sev 2"' in str(error) or "encryption_ids" in str(error)
    assert (used(served, "a"), used(served, "b")) == (2, 0)


async def test_refusal_waits_for_what_another_supervisor_is_about_to_give_back(
    served, supervise, in_thread, nursery
):
    first, second = await supervise(), await supervise()
    pid = served.start_process(100, "a")
    served.write("a/misc.max", "sev 1")
    vm = await in_thread(start, first, pid)

    def settle(params):
        vm.close()
        first.connection.post("client.settled", msgspec.Raw(params))

    first.connection.handle("settle", settle)
    nursery.start_soon(first.connection.run)
    assert (await in_thread(start, second, pid)).key.asid == 5
    assert served.cat("a/misc.events") == "sev.max 0\nsev_es.max 0\n"


async def test_supervisor_that_does_not_answer_delays_a_refusal_but_does_not_prevent_it(
    served, supervise, in_thread
):
    first, second = await supervise(), await supervise()
    pid = served.start_process(100, "a")
    served.write("a/misc.max", "sev 1")
    await in_thread(start, first, pid)
    assert (await refusal(in_thread, start, second, pid)).errno == EBUSY


async def test_supervisors_that_are_refused_at_the_same_time_do_not_wait_for_each_other(
    served, supervise, in_thread, nursery
):
    supervisors = [await supervise(), await supervise()]
    pid = served.start_process(100, "a")
    for supervisor in supervisors:
        await in_thread(start, supervisor, pid)
    errors = []

    async def refused(supervisor):
        errors.append((await refusal(in_thread, start, supervisor, pid)).errno)

    began = trio.current_time()
    async with trio.open_nursery() as both:
        for supervisor in supervisors:
            both.start_soon(refused, supervisor)
    assert errors == [EBUSY, EBUSY]
    assert trio.current_time() - began < 1


async def test_move_before_the_call_decides_who_is_charged(served, supervise, in_thread):
    supervisor = await supervise()
    served.start_process(100, "a")
    served.write("b/cgroup.procs", "100")
    await in_thread(start, supervisor, 100)
    assert (used(served, "a"), used(served, "b")) == (0, 1)


async def test_connection_that_drops_gives_everything_back(served, supervise, in_thread):
    supervisor = await supervise()
    pid = served.start_process(100, "a")
    for vm_type in (SEV, SEV, 3):
        await in_thread(start, supervisor, pid, vm_type)
    charge = await in_thread(
        supervisor.connection.call, "client.charge", ForCaller(pid, "sev_es"), int
    )
    assert charge > 0
    assert served.cat("a/misc.current") == "sev 2\nsev_es 2\n"
    supervisor.connection.close()
    await until(lambda: served.cat("a/misc.current") == "sev 0\nsev_es 0\n")
    assert served.host.system.keys.asids.statistics().sev == 0
    assert list(served.host.clients) == []


async def test_host_that_is_gone_is_eio_at_once(served, supervise, in_thread):
    supervisor = await supervise()
    pid = served.start_process(100, "a")
    vm = await in_thread(start, supervisor, pid)
    served.scope.cancel()
    await until(lambda: not list(served.host.clients))
    assert (await refusal(in_thread, start, supervisor, pid)).errno == EIO
    assert supervisor.connection.lost
    await in_thread(vm.close)  # nobody to give it back to


async def test_charge_can_be_moved_between_cgroups(served, supervise, in_thread):
    supervisor = await supervise()
    accounting = supervisor.accounting
    vm = await in_thread(start, supervisor, served.start_process(100, "a"))
    served.start_process(200, "b")
    assert await in_thread(accounting.is_charged_to, 100, vm.key.charge)
    assert not await in_thread(accounting.is_charged_to, 200, vm.key.charge)
    charge = await in_thread(accounting.charge_asid, 200, "sev")
    old, vm.key.charge = vm.key.charge, charge
    await in_thread(accounting.uncharge_asid, old)
    await until(lambda: used(served, "a") == 0)
    assert used(served, "b") == 1
    await in_thread(vm.close)
    await until(lambda: used(served, "b") == 0)


async def test_process_of_nobody_is_no_process(served, supervise, in_thread):
    assert (await refusal(in_thread, start, await supervise(), 4711)).errno == ESRCH


async def test_supervisor_of_a_user_acts_for_that_user_only(served):
    from cgfs.control.errors import CommandError
    from cgfs.control.server import Peer

    session = served.host.attach_client("x", Peer(1, 1000, 1000), lambda *_: None)
    served.start_process(100, "a", uid=1000)
    served.start_process(200, "a", uid=0)
    taken = session.take_key(ForCaller(100, "sev"))
    assert taken.number == 4
    with pytest.raises(CommandError) as caught:
        session.take_key(ForCaller(200, "sev"))
    assert caught.value.errno == EPERM


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("client.free_key", FreeKey(4, 1)),
        ("client.uncharge", EndCharge(1)),
        ("client.charge", ForCaller(100, "widgets")),
    ],
)
async def test_what_a_client_does_not_hold_it_cannot_give_back(
    served, supervise, in_thread, method, params
):
    served.start_process(100, "a")
    other = await supervise()
    await in_thread(start, other, 100)
    supervisor = await supervise()
    error = await refusal(in_thread, supervisor.connection.call, method, params, Nothing)
    assert error.errno == EINVAL
    assert used(served, "a") == 1
