"""The thread of one vCPU, on the real KVM objects."""

from __future__ import annotations

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.engine.base import BusLock, Hlt, InKernel, Io, Mmio, Shutdown
from kvmsim.errors import KvmError
from kvmsim.vmm import vcpu_thread

S = 1_000_000_000
MS = 1_000_000


def locks(count: int, after_ns: int = 100 * MS) -> list[BusLock]:
    return [BusLock(after_ns) for _ in range(count)]


def lock_times(host) -> list[tuple[int, str]]:
    """(time, thread) of each bus lock, noted as it is taken."""
    taken = []
    stall = host.timeline.bus_lock

    def note(vcpu, now_ns):
        taken.append((now_ns, vcpu.data))
        stall(vcpu, now_ns)

    for vm in host.system.vms:
        vm.on_bus_lock = note
        for vcpu in vm.vcpus.values():
            vcpu.data = vcpu.id
    return taken


def test_q9_single_vcpu_with_work_gets_five_locks_per_1100_ms(host):
    # C.1.2 Q9.
    vmm = host.vm(locks(1), loop=0, bus_lock_ratelimit=5)
    taken = lock_times(host)
    vmm.start(0)

    host.timeline.advance(3 * S)

    tenths = [now // (100 * MS) for now, _ in taken]
    assert tenths == [1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27]
    assert all(now % (100 * MS) == 0 for now, _ in taken)


def test_q10_late_wake_ups_give_one_larger_second_and_then_the_rate(host):
    # C.1.2 Q10: speed 10, 4 vCPUs, no work, wake-up 50 µs late.
    host.timeline.advance(1)
    scripts = [locks(1, after_ns=0)] * 4
    vmm = host.vm(*scripts, loop=0, bus_lock_ratelimit=10, wake_latency_ns=50_000)
    taken = lock_times(host)
    vmm.start(1)

    host.timeline.advance(5 * S)

    per_second = [0] * 5
    for now, _ in taken:
        per_second[now // S] += 1
    assert per_second == [13, 10, 10, 10, 10]


def test_without_ratelimit_the_vmm_sees_no_bus_lock_exits(host):
    vmm = host.vm(locks(5))
    vmm.start(0)

    host.timeline.advance(S)

    assert vmm.threads[0].nr_bus_lock_exits == 0
    assert vmm.threads[0].vcpu.bus_locks == 5
    assert not vmm.vm.bus_lock_detection


def test_flag_on_another_exit_is_limited_before_the_exit_is_handled(host):
    vmm = host.vm([Mmio(after_ns=10, bus_lock=True), Io(after_ns=0, size=2)], bus_lock_ratelimit=1)
    vmm.start(0)

    host.timeline.advance(S)
    thread = vmm.threads[0]
    before = (thread.vcpu.run.exit_reason, thread.vcpu.input, thread.vmm.statistics())
    host.timeline.advance(S + 10)

    assert before[0] == Exit.MMIO
    assert before[1] == b""
    assert before[2].threads[0].phase == "ratelimited"
    assert thread.vcpu.input == b"\xff\xff"
    assert thread.ratelimit_ns == S


def test_sleep_is_rounded_down_to_microseconds(host):
    host.timeline.advance(1)
    vmm = host.vm(locks(8, after_ns=0), bus_lock_ratelimit=3)
    taken = lock_times(host)
    vmm.start(1)

    host.timeline.advance(2 * S)

    # The third lock fills the quota: it sleeps 1 s exactly and wakes at the end of the slice,
    # which is not past it yet; the next is the fourth of the same slice: 1333333333 - 1000000000.
    assert [now - 1 for now, _ in taken] == [0, 0, 0, S, S + 333_333_000, S + 666_666_000]


def test_kick_does_not_cut_a_limiter_sleep_short(host):
    vmm = host.vm(locks(4, after_ns=10), bus_lock_ratelimit=1)
    vmm.start(0)
    host.timeline.advance(20)

    vmm.pause(20)
    phase_when_paused = vmm.statistics().threads[0].phase
    host.timeline.advance(5 * S)

    assert phase_when_paused == "ratelimited"
    assert vmm.statistics().threads[0].phase == "parked"
    assert vmm.threads[0].ratelimit_ns == S
    assert vmm.threads[0].vcpu.bus_locks == 1


def test_limiter_sleep_of_a_frozen_vm_ends_with_the_thaw(host):
    vmm = host.vm([Shutdown(10, bus_lock=True)], bus_lock_ratelimit=1)
    vmm.start(0)
    host.timeline.advance(20)
    vmm.frozen(True, 20)

    host.timeline.advance(5 * S)
    frozen = vmm.statistics()
    vmm.frozen(False, 5 * S)
    host.timeline.advance(5 * S)

    assert (frozen.state, frozen.threads[0].phase) == ("running", "ratelimited")
    assert vmm.statistics().state == "shutdown"
    assert vmm.threads[0].ratelimit_ns == 5 * S - 10


def test_thaw_does_not_cut_a_limiter_sleep_short(host):
    vmm = host.vm([BusLock(10), BusLock(10)], bus_lock_ratelimit=1)
    vmm.start(0)
    host.timeline.advance(20)

    vmm.frozen(True, 20)
    vmm.frozen(False, 30)
    host.timeline.advance(2 * S)

    assert vmm.threads[0].ratelimit_ns == S


def test_pause_interrupts_the_guest_and_the_rest_follows_after_resume(host):
    vmm = host.vm([BusLock(100)])
    vmm.start(0)
    host.timeline.advance(30)

    vmm.pause(30)
    host.timeline.advance(500)
    paused = (vmm.threads[0].work_ns, vmm.threads[0].vcpu.run.exit_reason)
    vmm.start(500)
    host.timeline.advance(569)
    before = vmm.threads[0].vcpu.bus_locks
    host.timeline.advance(570)

    assert paused == (30, Exit.INTR)
    assert (before, vmm.threads[0].vcpu.bus_locks) == (0, 1)


def test_work_counts_guest_time_only(host):
    host.timeline.bus_lock_stall_ns = 7
    noisy = host.vm(locks(3, after_ns=10), name="noisy")
    busy = host.vm([InKernel(10**9)], name="busy")
    noisy.start(0)
    busy.start(0)

    host.timeline.advance(100)

    assert busy.threads[0].work_ns == 100 - 3 * 7
    assert noisy.threads[0].work_ns == 30


def test_halt_with_a_timer_ends_by_itself_and_one_without_by_an_interrupt(host):
    vmm = host.vm([Hlt(10, wake_after_ns=5), Io(1, data=b"x"), Hlt(1), Io(1, data=b"y")])
    thread = vmm.threads[0]
    vmm.start(0)

    host.timeline.advance(100)
    halted = (thread.nr_runs, vmm.statistics().threads[0].phase)
    thread.interrupt_guest(100)
    host.timeline.advance(101)

    assert halted == (1, "halted")
    assert thread.nr_runs == 2
    assert host.trace[:3] == [(0, "vm/0"), (10, "vm/0"), (15, "vm/0")]


def test_cgroup_limit_throttles_in_the_kernel_without_an_exit(host):
    host.mkdir("/t", "1 1000000")
    vmm = host.vm(locks(3, after_ns=10), cgroup="/t")
    taken = lock_times(host)
    vmm.start(0)

    host.timeline.advance(3 * S)

    # The lock itself has happened; what waits is the way back into the guest.
    assert [now for now, _ in taken] == [10, 20, S + 20]
    thread = vmm.threads[0]
    assert (thread.nr_runs, thread.nr_bus_lock_exits) == (0, 0)
    assert thread.vcpu.throttled_ns == (S + 10 - 20) + (2 * S + 10 - (S + 20))


def test_throttled_vcpu_that_is_paused_still_owes_its_lock(host):
    host.mkdir("/t", "1 1000000")
    vmm = host.vm(locks(3, after_ns=10), cgroup="/t")
    taken = lock_times(host)
    vmm.start(0)
    host.timeline.advance(100)

    vmm.pause(100)
    vmm.start(200)
    host.timeline.advance(3 * S)

    assert [now for now, _ in taken] == [10, 20, S + 20]
    assert host.read("/t", "bus_lock.stat") == (
        "nr_events 3\nnr_throttled 2\nthrottled_usec 1999999\nnr_cancelled 0\n"
    )


def test_vm_stopped_while_throttled_is_counted_as_cancelled(host):
    host.mkdir("/t", "1 1000000")
    vmm = host.vm(locks(3, after_ns=10), cgroup="/t")
    vmm.start(0)
    host.timeline.advance(100)

    vmm.stop(100)

    assert "nr_cancelled 1\n" in host.read("/t", "bus_lock.stat")
    assert host.timeline.next_due_ns() is None


def test_raised_limit_lets_throttled_vcpus_go_at_once(host):
    host.mkdir("/t", "1 1000000")
    vmm = host.vm(locks(3, after_ns=10), cgroup="/t")
    taken = lock_times(host)
    vmm.start(0)
    host.timeline.advance(100)

    host.write("/t", "bus_lock.max", "5")
    host.timeline.advance(200)

    assert [now for now, _ in taken] == [10, 20, 110]


def test_vmm_and_cgroup_limits_overlap(host):
    # C.4: the VMM's sleep and the kernel's wait run side by side, they do not add up.
    host.mkdir("/t", "1 1000000")
    vmm = host.vm(locks(4, after_ns=0), cgroup="/t", bus_lock_ratelimit=1)
    taken = lock_times(host)
    host.timeline.advance(1)
    vmm.start(1)

    host.timeline.advance(4 * S)

    assert [now - 1 for now, _ in taken] == [0, S, 2 * S, 3 * S]


def test_run_once_returns_with_the_exit_unhandled(host):
    vmm = host.vm([Io(50, size=1), Hlt(1)])
    thread, done = vmm.threads[0], []

    thread.run_once(0, done.append)
    host.timeline.advance(1000)

    assert done == [50]
    assert thread.vcpu.run.exit_reason == Exit.IO
    assert thread.vcpu.run.io_data() == b"\0"
    assert vmm.statistics().threads[0].phase == "parked"


def test_run_once_of_a_running_thread_is_a_bug(host):
    vmm = host.vm([Hlt(1)])
    vmm.start(0)

    with pytest.raises(RuntimeError, match="vm/0 is ready"):
        vmm.threads[0].run_once(0, print)


def test_run_once_keeps_the_error(host):
    vmm = host.vm([Hlt(1)])
    thread, done = vmm.threads[0], []
    thread.vcpu.run.immediate_exit = 1

    thread.run_once(0, done.append)
    host.timeline.advance(1)

    assert done == [0]
    assert isinstance(thread.error, KvmError)


@pytest.mark.parametrize(
    "stop",
    [InKernel(), Io(data=b"x"), Hlt(wake_after_ns=0), BusLock()],
    ids=lambda s: type(s).__name__,
)
def test_guest_that_stops_for_ever_at_one_instant_is_ended(host, stop, monkeypatch):
    monkeypatch.setattr(vcpu_thread, "MAX_STOPS_AT_ONCE", 50)
    stuck = host.vm([stop], [stop], loop=0, name="stuck")
    other = host.vm([InKernel(after_ns=MS)], loop=0, name="other")
    stuck.start(0)
    other.start(0)

    assert host.timeline.advance(S, max_steps=10_000)

    state = stuck.statistics()
    assert state.state == "internal-error"
    assert state.error == "vCPU 0: 50 stops in a row took no time"
    assert [thread.phase for thread in state.threads] == ["parked", "parked"]
    assert other.statistics().work_ns == S


def test_many_stops_at_one_instant_between_which_time_passes_are_no_error(host, monkeypatch):
    monkeypatch.setattr(vcpu_thread, "MAX_STOPS_AT_ONCE", 50)
    vmm = host.vm([*[InKernel()] * 40, InKernel(after_ns=1)], loop=0)
    vmm.start(0)

    host.timeline.advance(10)

    assert vmm.statistics().state == "running"
