from __future__ import annotations

from errno import EBUSY, EINVAL, ENOTSUP

import pytest

from cgfs.errors import ChargeRefused
from kvmsim.abi import caps
from kvmsim.engine.base import BusLock, Debug, Hlt, InKernel, InternalError, Io, IrqWindow, Shutdown
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.vmm.vmm import RunState

S = 1_000_000_000


def test_ratelimit_enables_detection(host):
    vmm = host.vm(bus_lock_ratelimit=7)

    assert vmm.vm.bus_lock_detection
    assert vmm.limit.quota == 7


def test_ratelimit_without_the_mechanism_fails_with_qemus_words(make_host):
    host = make_host("plain-amd")

    with pytest.raises(KvmError, match="kvm: bus lock detection unsupported") as refused:
        host.vm(bus_lock_ratelimit=1)

    assert refused.value.errno == ENOTSUP
    assert not host.system.vms


def test_no_ratelimit_needs_no_mechanism(make_host):
    vmm = make_host("plain-amd").vm([BusLock(1)])

    assert vmm.limit is None


def test_cap_that_cannot_be_enabled_is_reported_with_qemus_words(host, monkeypatch):
    def refuse(vm, enable):
        raise KvmError(EINVAL)

    monkeypatch.setattr("kvmsim.kvm.vm.Vm.enable_cap", refuse)

    with pytest.raises(KvmError, match="Failed to enable bus lock detection cap: Invalid argument"):
        host.vm(bus_lock_ratelimit=1)

    assert not host.system.vms


def test_refused_asid_leaves_nothing_behind(make_host):
    host = make_host("lab-amd")
    host.mkdir("/t")
    host.write("/t", "misc.max", "sev 0")

    with pytest.raises(KvmError) as refused:
        host.vm(cgroup="/t", vm_type=caps.KVM_X86_SEV_VM)

    assert refused.value.errno == EBUSY
    assert isinstance(refused.value.__cause__, ChargeRefused)
    assert not host.system.vms


def test_shutdown_of_the_guest_ends_the_vm_and_gives_its_asid_back(make_host):
    host = make_host("lab-amd")
    host.mkdir("/t")
    vmm = host.vm([Shutdown(10)], [InKernel(100)], cgroup="/t", vm_type=caps.KVM_X86_SEV_VM)
    ended = []
    vmm.on_stopped = lambda vm, now_ns: ended.append((vm.name, now_ns))
    vmm.start(0)
    used = host.read("/t", "misc.current")

    host.timeline.advance(S)

    assert used.startswith("sev 1\n")
    assert host.read("/t", "misc.current").startswith("sev 0\n")
    assert vmm.state is RunState.SHUTDOWN
    assert ended == [("vm", 10)]
    assert [thread.phase for thread in vmm.statistics().threads] == ["stopped", "stopped"]


def test_internal_error_pauses_every_vcpu_and_says_why(host):
    vmm = host.vm([InternalError(10, suberror=3)], [InKernel(100)])
    vmm.start(0)

    host.timeline.advance(S)

    statistics = vmm.statistics()
    assert statistics.state == "internal-error"
    assert statistics.error == "KVM internal error. Suberror: 3"
    assert [thread.phase for thread in statistics.threads] == ["parked", "parked"]
    assert statistics.threads[1].work_ns == 10


def test_exit_nobody_asked_for_stops_the_vm(host):
    vmm = host.vm([Debug(10)])
    vmm.start(0)

    host.timeline.advance(S)

    assert vmm.statistics().error == "KVM: unknown exit, reason 4"


def test_error_of_kvm_run_stops_the_vm(host):
    vmm = host.vm([Hlt(10)])
    vmm.threads[0].vcpu.run.kvm_valid_regs = 1 << 20
    vmm.start(0)

    host.timeline.advance(S)

    assert vmm.statistics().error == "error: kvm run failed Invalid argument"


def test_exits_without_consequences_let_the_guest_go_on(host):
    vmm = host.vm([Io(1, data=b"x"), IrqWindow(1), Io(1), BusLock(1), Io(1, data=b"y")])
    vmm.threads[0].vcpu.run.request_interrupt_window = 1
    vmm.start(0)

    host.timeline.advance(S)

    statistics = vmm.statistics()
    assert (statistics.state, statistics.nr_runs, statistics.work_ns) == ("running", 4, 5)


def test_frozen_cgroup_stops_the_guest_and_thaw_lets_it_go_on(host):
    host.mkdir("/t")
    vmm = host.vm([InKernel(100)], cgroup="/t", loop=0)
    vmm.start(0)
    host.timeline.advance(30)

    host.write("/t", "cgroup.freeze", "1")
    host.timeline.advance(1000)
    frozen = vmm.statistics()
    host.write("/t", "cgroup.freeze", "0")
    host.timeline.advance(1050)

    assert (frozen.state, frozen.frozen, frozen.work_ns) == ("running", True, 30)
    assert vmm.statistics().work_ns == 80


def test_pause_under_a_frozen_cgroup_outlasts_the_thaw(host):
    vmm = host.vm([InKernel(100)], loop=0)
    vmm.start(0)
    vmm.frozen(True, 0)
    vmm.pause(0)

    vmm.frozen(False, 10)
    host.timeline.advance(100)

    assert vmm.statistics().work_ns == 0
    assert vmm.state is RunState.PAUSED


def test_killed_cgroup_ends_the_vm(host):
    host.mkdir("/t")
    vmm = host.vm([InKernel(100)], cgroup="/t", loop=0)
    vmm.start(0)

    host.write("/t", "cgroup.kill", "1")

    assert vmm.state is RunState.SHUTDOWN
    assert host.timeline.next_due_ns() is None


def test_frozen_vm_still_owes_the_bus_lock_it_was_waiting_for(host):
    host.mkdir("/t", "1 1000000")
    vmm = host.vm([BusLock(10)] * 3, cgroup="/t")
    vmm.start(0)
    host.timeline.advance(100)

    host.write("/t", "cgroup.freeze", "1")
    host.timeline.advance(5 * S)
    frozen = (vmm.threads[0].vcpu.owed, vmm.statistics().nr_bus_locks)
    host.write("/t", "cgroup.freeze", "0")
    host.timeline.advance(5 * S + 10)

    assert frozen == (True, 2)
    assert vmm.statistics().nr_bus_locks == 3
    assert "nr_cancelled 0\n" in host.read("/t", "bus_lock.stat")


def test_killed_vm_drops_the_bus_lock_it_was_waiting_for(host):
    host.mkdir("/t", "1 1000000")
    host.vm([BusLock(10)] * 3, cgroup="/t").start(0)
    host.timeline.advance(100)

    host.write("/t", "cgroup.kill", "1")

    assert "nr_cancelled 1\n" in host.read("/t", "bus_lock.stat")


def test_moved_vm_waits_in_its_new_cgroup(host):
    host.mkdir("/slow", "1 1000000")
    host.mkdir("/fast")
    vmm = host.vm([BusLock(10), BusLock(10), BusLock(10)], cgroup="/slow")
    vmm.start(0)
    host.timeline.advance(100)
    throttled = vmm.statistics().threads[0].phase

    host.write("/fast", "cgroup.procs", str(vmm.vm.creator.pid))
    host.timeline.advance(200)

    assert throttled == "throttled"
    assert vmm.statistics().nr_bus_locks == 3
    # Without a limit on its new cgroup the third lock is not even detected.
    assert host.read("/fast", "bus_lock.stat").startswith("nr_events 1\n")


def test_vm_stops_once(host):
    vmm = host.vm([InKernel(100)])
    vmm.start(0)
    ended = []
    vmm.on_stopped = lambda *_: ended.append(1)

    vmm.stop(1)
    vmm.stop(2)

    assert ended == [1]


def test_halt_without_kernel_apic_waits_in_the_vmm_for_an_interrupt(host):
    vmm = host.vm()
    vmm.vm.irqchip = False
    thread = vmm.add_vcpu(Scripted([Hlt(10), Io(5, data=b"x"), Hlt(1)]))
    vmm.start(0)
    host.timeline.advance(100)
    halted = (thread.nr_runs, vmm.statistics().threads[0].phase)

    thread.interrupt_guest(100)
    host.timeline.advance(105)

    assert halted == (1, "halted")
    assert thread.nr_runs == 2
