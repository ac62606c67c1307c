from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from kvmsim.abi.exits import Exit
from kvmsim.engine.base import BusLock, Hlt, InKernel, Io
from kvmsim.engine.synthetic import parse_guest
from kvmsim.errors import KvmError
from kvmsim.sim.streams import vcpu_stream
from kvmsim.vmm.run_loop import MAX_STEPS, RunLoop

S = 1_000_000_000
MS = 1_000_000


def crowd(host, seed: int = 1) -> None:
    """Four noisy VMs under limits of both kinds, one quiet one beside them."""
    host.mkdir("/t", "50 100000")
    for i in range(4):
        spec = parse_guest(f"mixed buslock={200 * (i + 1)} io=50 mmio=20 hlt=30")
        vmm = host.vm(
            *(spec.engine(vcpu_stream(seed, f"n{i}", vcpu)) for vcpu in range(2)),
            cgroup="/t",
            name=f"n{i}",
            bus_lock_ratelimit=100 if i == 3 else 0,
        )
        vmm.start(0)
    host.vm([InKernel(5 * MS)], name="quiet", loop=0).start(0)


def outcome(host) -> str:
    text = [repr(host.trace), host.read("/t", "bus_lock.stat"), host.read("/t", "bus_lock.events")]
    text += [repr(vm.statistics()) for vm in host.system.vms]
    return "\n".join(text)


def run_virtually(host, seconds: float) -> None:
    async def main() -> None:
        loop = RunLoop(host.timeline)
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            await trio.sleep(seconds)
            loop.catch_up()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_same_seed_gives_the_same_run_byte_for_byte(make_host):
    outcomes = []
    for _ in range(2):
        host = make_host(stall_ns=3_500)
        crowd(host)
        run_virtually(host, 2)
        outcomes.append(outcome(host))

    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]) > 10_000


def test_another_seed_gives_another_run(make_host):
    outcomes = []
    for seed in (1, 2):
        host = make_host()
        crowd(host, seed)
        run_virtually(host, 0.2)
        outcomes.append(outcome(host))

    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize("granularity_ns", [1_000, 1_000_000, 77_000_000])
def test_run_under_a_clock_equals_the_timeline_advanced_directly(make_host, granularity_ns):
    driven, direct = make_host(stall_ns=3_500), make_host(stall_ns=3_500)
    for host in (driven, direct):
        crowd(host)

    async def main() -> None:
        loop = RunLoop(driven.timeline, granularity_ns=granularity_ns)
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            await trio.sleep(0.3)
            loop.catch_up()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    direct.timeline.advance(300 * MS)

    assert outcome(driven) == outcome(direct)


async def test_loop_wakes_up_at_most_once_per_granularity(host, autojump_clock):
    host.vm([InKernel(10_000)], loop=0).start(0)
    loop = RunLoop(host.timeline, granularity_ns=10 * MS)
    looks = []
    advance = loop._advance
    loop._advance = lambda now_ns: looks.append(now_ns) or advance(now_ns)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()

    assert 95 <= len(looks) <= 102
    assert len(host.trace) >= 99_000


async def test_catch_up_brings_the_model_to_the_present(host, autojump_clock):
    host.vm([BusLock(7 * MS)], loop=0).start(0)
    loop = RunLoop(host.timeline)

    await trio.sleep(1)
    now_ns = loop.catch_up()

    assert now_ns == host.timeline.now_ns == S
    assert host.trace[-1] == (994 * MS, "vm/0")


async def test_change_from_outside_is_noticed_by_a_sleeping_loop(host, autojump_clock, nursery):
    host.mkdir("/t", "1 1000000")
    vmm = host.vm([BusLock(10)] * 4, cgroup="/t")
    vmm.start(0)
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)
    await trio.sleep(0.1)

    loop.catch_up()
    host.write("/t", "bus_lock.max", "max")
    await trio.sleep(0.01)

    assert vmm.statistics().nr_bus_locks == 4


async def test_idle_host_sleeps_until_a_vm_starts(host, autojump_clock, nursery):
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)
    await trio.sleep(5)

    host.vm([InKernel(1 * MS)], loop=0).start(loop.catch_up())
    await trio.sleep(0.0105)

    # At 5 s, and then every millisecond; the last look was at 10 ms.
    assert [now for now, _ in host.trace] == [5 * S + i * MS for i in range(11)]


async def test_run_vcpu_makes_one_run(host, autojump_clock, nursery):
    vmm = host.vm([Io(50 * MS, size=1), Hlt(1)])
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)

    thread = await loop.run_vcpu(vmm.threads[0])

    assert thread.vcpu.run.exit_reason == Exit.IO
    assert host.timeline.now_ns == trio.current_time() * S == 50 * MS


async def test_run_vcpu_raises_what_kvm_run_failed_with(host, autojump_clock, nursery):
    vmm = host.vm([Hlt(1)])
    vmm.threads[0].vcpu.run.immediate_exit = 1
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)

    with pytest.raises(KvmError, match="EINTR"):
        await loop.run_vcpu(vmm.threads[0])


@pytest.mark.parametrize(
    ("script", "options"),
    [([Hlt(1)], {}), ([BusLock(1)], {"bus_lock_ratelimit": 1})],
    ids=["in KVM_RUN", "in the VMM's sleep"],
)
async def test_run_vcpu_fails_when_the_vm_ends_meanwhile(
    host, autojump_clock, nursery, script, options
):
    vmm = host.vm(script, **options)
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)

    async def kill():
        await trio.sleep(0.1)
        vmm.killed(loop.catch_up())

    nursery.start_soon(kill)
    with trio.fail_after(10), pytest.raises(KvmError, match="EIO"):
        await loop.run_vcpu(vmm.threads[0])


async def test_run_vcpu_of_a_frozen_vm_waits_until_it_is_thawed(host, autojump_clock, nursery):
    vmm = host.vm([Io(50 * MS, size=1)])
    vmm.frozen(True, 0)
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)

    async def thaw():
        await trio.sleep(1)
        vmm.frozen(False, loop.catch_up())

    nursery.start_soon(thaw)
    with trio.fail_after(10):
        await loop.run_vcpu(vmm.threads[0])

    assert host.timeline.now_ns == S + 50 * MS


async def test_limited_run_vcpu_takes_the_vmms_sleep(host, autojump_clock, nursery):
    vmm = host.vm([BusLock(0), BusLock(0)], bus_lock_ratelimit=2)
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)
    await trio.sleep(1)

    for _ in range(2):
        await loop.run_vcpu(vmm.threads[0])

    assert abs(trio.current_time() - 2) < 0.003


async def test_other_tasks_run_while_a_long_stretch_is_worked_off(host, mock_clock, nursery):
    host.vm([InKernel(1_000)], loop=0).start(0)
    loop = RunLoop(host.timeline)
    await nursery.start(loop.run)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(10 * MAX_STEPS * 1e-6)

    turns = 0
    while host.timeline.now_ns < 9 * MAX_STEPS * 1_000:
        await trio.lowlevel.checkpoint()
        turns += 1

    assert turns >= 8
    assert loop.slipped_ns == 0


class SlowMachine(trio.abc.Clock):
    """A clock that moves by itself while somebody computes: ten milliseconds per look."""

    def __init__(self) -> None:
        self.now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self.now += 0.01
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0


def test_host_that_cannot_keep_up_slows_its_time_down(host):
    host.vm([InKernel(1)], loop=0).start(0)

    async def main() -> int:
        loop = RunLoop(host.timeline)
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            for _ in range(15):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert loop.now_ns() - host.timeline.now_ns < S
        return loop.slipped_ns

    assert trio.run(main, clock=SlowMachine()) > 0
