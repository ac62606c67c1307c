from errno import EINTR

import pytest

from kvmsim.abi.exits import KVM_RUN_X86_BUS_LOCK, Exit
from kvmsim.engine.base import BusLock, Debug, Hlt, InKernel, Io, Mmio
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm.run import InGuest, Throttled
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304
TRAP = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\n'
FAULT = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
NONE = 'vendor = "intel"\n'
BOTH = pytest.mark.parametrize("toml", [TRAP, FAULT], ids=["trap", "fault"])


def run_to_exit(vcpu, now_ns=0):
    blocked = vcpu.kvm_run(now_ns)
    while blocked is not None:
        now_ns += blocked.guest_ns
        blocked = vcpu.resume(now_ns)
    return now_ns


def exits_of(vcpu, runs):
    """(reason, flag, RIP, locks taken) after each run."""
    seen = []
    for _ in range(runs):
        run_to_exit(vcpu)
        seen.append((vcpu.run.exit_reason, vcpu.run.flags, vcpu.rip, vcpu.bus_locks))
    return seen


def test_t_a_2_trap_like_100_locks_are_100_exits_each_after_its_lock(guest):
    vcpu = guest([BusLock(insn_len=4)] * 100)
    assert exits_of(vcpu, 101) == [
        *((33, 2, 0xFFF0 + 4 * k, k) for k in range(1, 101)),
        (5, 0, 0xFFF0 + 400, 100),
    ]


def test_t_a_2_fault_like_100_locks_are_100_exits_each_before_its_lock(guest):
    vcpu = guest([BusLock(insn_len=4)] * 100, FAULT)
    assert exits_of(vcpu, 101) == [
        *((33, 2, 0xFFF0 + 4 * (k - 1), k - 1) for k in range(1, 101)),
        (5, 0, 0xFFF0 + 400, 100),
    ]


def test_t_a_6_lock_riding_on_mmio_keeps_reason_6_and_the_next_run_clears_the_flag(guest):
    vcpu = guest([Mmio(gpa=0xFEB00000, data=b"\1\0\0\0", bus_lock=True), Mmio(gpa=0xFEB00000)])
    assert exits_of(vcpu, 2) == [(6, 2, 0xFFF0, 1), (6, 0, 0xFFF0, 1)]


def test_lock_riding_on_mmio_of_fault_like_hardware_is_an_exit_of_its_own_first(guest):
    vcpu = guest([Mmio(gpa=0xFEB00000, bus_lock=True, insn_len=3)], FAULT)
    assert exits_of(vcpu, 3) == [(33, 2, 0xFFF0, 0), (6, 0, 0xFFF0, 1), (5, 0, 0xFFF3, 1)]


@pytest.mark.parametrize("stop", [Io(port=0x3F8, data=b"x"), Debug()], ids=["io", "debug"])
def test_lock_riding_on_any_user_space_exit_keeps_its_reason(guest, stop):
    stop.bus_lock = True
    vcpu = guest([stop])
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason in {Exit.IO, Exit.DEBUG}
    assert vcpu.run.flags == KVM_RUN_X86_BUS_LOCK


def test_lock_riding_on_an_exit_the_kernel_handles_becomes_reason_33(guest):
    vcpu = guest([InKernel(bus_lock=True), InKernel(), Hlt()])
    assert exits_of(vcpu, 2) == [(33, 2, 0xFFF0, 1), (5, 0, 0xFFF0, 1)]


def test_lock_riding_on_a_halt_with_in_kernel_apic_exits_before_it_halts(guest):
    vcpu = guest([Hlt(bus_lock=True)], irqchip=True)
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.X86_BUS_LOCK
    vcpu.kvm_run(0)
    assert vcpu.statistics().phase == "halted"


def test_t_a_7_intel_arms_an_existing_vcpu_when_cpuid_is_set_before_its_first_run(kvm):
    vm = kvm(TRAP).create_vm(0, PID)
    vcpu = vm.create_vcpu(0)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    assert not vcpu.bus_lock_exit
    vcpu.ioctl(0x4008AE90, bytearray(8))
    assert vcpu.bus_lock_exit


def test_t_a_7_intel_vcpu_that_has_run_never_picks_the_change_up(kvm):
    vm = kvm(TRAP).create_vm(0, PID)
    vcpu = vm.create_vcpu(0)
    vcpu.engine = Scripted([Hlt(), BusLock(), Hlt()])
    run_to_exit(vcpu)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    vcpu.ioctl(0x4008AE90, bytearray(8))
    vcpu.init()
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.HLT
    assert vcpu.bus_locks == 1


def test_t_a_7_amd_arms_an_existing_vcpu_at_init_and_not_by_cpuid(kvm):
    vm = kvm(FAULT).create_vm(0, PID)
    vcpu = vm.create_vcpu(0)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    vcpu.ioctl(0x4008AE90, bytearray(8))
    assert not vcpu.bus_lock_exit
    vcpu.init()
    assert vcpu.bus_lock_exit


@BOTH
def test_t_a_8_off_after_exit_leaves_detection_on(kvm, toml):
    vm = kvm(toml).create_vm(0, PID)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    vm.enable_cap(KvmEnableCap(193, (1,)))
    vcpu = vm.create_vcpu(0)
    vcpu.engine = Scripted([BusLock()])
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.X86_BUS_LOCK


def test_off_turns_detection_off_without_the_quirk(kvm):
    vm = kvm(TRAP + "[quirks]\nsticky_bus_lock = false\n").create_vm(0, PID)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    vm.enable_cap(KvmEnableCap(193, (1,)))
    assert not vm.create_vcpu(0).bus_lock_exit


def test_t_a_9_fault_like_user_space_skips_the_instruction_without_lock_or_credit(guest):
    vcpu = guest([BusLock(insn_len=4), BusLock(insn_len=4)], FAULT)
    run_to_exit(vcpu)
    vcpu.rip += 4
    run_to_exit(vcpu)
    assert vcpu.bus_lock_counter == 0
    assert (vcpu.run.exit_reason, vcpu.rip, vcpu.bus_locks) == (33, 0xFFF4, 0)


def test_fault_like_credit_is_given_by_a_run_with_immediate_exit_and_then_stays(guest):
    vcpu = guest([BusLock(insn_len=4), BusLock(insn_len=4), BusLock(insn_len=4)], FAULT)
    run_to_exit(vcpu)
    vcpu.run.immediate_exit = 1
    with pytest.raises(KvmError) as error:
        vcpu.kvm_run(0)
    assert (error.value.errno, vcpu.bus_lock_counter) == (EINTR, 1)
    vcpu.run.immediate_exit = 0
    vcpu.rip += 4
    run_to_exit(vcpu)
    # The skipped instruction left its credit: the second lock passed unseen, the third exits.
    assert (vcpu.run.exit_reason, vcpu.rip, vcpu.bus_locks) == (33, 0xFFF8, 1)


def test_fault_like_encrypted_guest_always_looks_unmoved(kvm):
    toml = FAULT + "[sev]\nmax-asid = 5\nmin-sev-asid = 5\n"
    vm = kvm(toml).create_vm(3, PID)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    vm.encrypt()
    vcpu = vm.create_vcpu(0)
    vcpu.engine = Scripted([BusLock(insn_len=4)])
    run_to_exit(vcpu)
    vcpu.rip += 100
    run_to_exit(vcpu)
    assert vcpu.bus_locks == 1


def test_t_a_10_enabled_on_a_host_without_the_mechanism_gives_no_exit(guest):
    vcpu = guest([BusLock(), Mmio(bus_lock=True)], NONE)
    assert exits_of(vcpu, 2) == [(6, 0, 0xFFF0, 2), (5, 0, 0xFFF0, 2)]


def test_t_a_11_flags_are_per_vcpu(kvm):
    vm = kvm(TRAP).create_vm(0, PID)
    vm.enable_cap(KvmEnableCap(193, (2,)))
    locking, quiet = vm.create_vcpu(0), vm.create_vcpu(1)
    locking.engine, quiet.engine = Scripted([BusLock()]), Scripted([Hlt()])
    run_to_exit(locking)
    run_to_exit(quiet)
    assert (locking.run.flags, quiet.run.flags) == (2, 0)


@BOTH
def test_lock_nobody_detects_passes_and_is_counted(guest, toml, accounting):
    vcpu = guest([BusLock(after_ns=5)] * 3, toml, exits=False)
    assert run_to_exit(vcpu) == 15
    assert (vcpu.run.exit_reason, vcpu.bus_locks, accounting.admissions) == (5, 3, 0)


@BOTH
def test_every_lock_is_told_to_whoever_simulates_the_machine(guest, toml):
    vcpu = guest([BusLock(after_ns=5)] * 2, toml, exits=False)
    told = []
    vcpu.vm.on_bus_lock = lambda vcpu, now_ns: told.append((vcpu.id, now_ns))
    run_to_exit(vcpu)
    assert told == [(0, 5), (0, 10)]


@BOTH
def test_finite_limit_arms_detection_without_the_capability_and_makes_no_exit(
    guest, toml, accounting
):
    accounting.limited = True
    vcpu = guest([BusLock()] * 3, toml, exits=False)
    run_to_exit(vcpu)
    assert (vcpu.run.exit_reason, vcpu.run.flags) == (5, 0)
    assert (vcpu.bus_locks, accounting.admissions) == (3, 3)


def test_host_without_the_mechanism_cannot_be_limited(guest, accounting):
    accounting.limited = True
    vcpu = guest([BusLock()], NONE, exits=False)
    run_to_exit(vcpu)
    assert accounting.admissions == 0


def test_trap_like_throttled_guest_has_taken_the_lock_and_waits_to_enter(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock(after_ns=10), Hlt(after_ns=7)], exits=False)
    vcpu.kvm_run(0)
    assert vcpu.resume(10) == Throttled()
    assert (vcpu.bus_locks, vcpu.statistics().phase, vcpu.owed) == (1, "throttled", True)
    accounting.admit(500)
    assert vcpu.resume(500) == InGuest(7)
    assert (vcpu.throttled_ns, vcpu.owed) == (490, False)


def test_fault_like_throttled_guest_takes_the_lock_after_admission(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock(after_ns=10), Hlt(after_ns=7)], FAULT, exits=False)
    vcpu.kvm_run(0)
    assert vcpu.resume(10) == Throttled()
    assert vcpu.bus_locks == 0
    accounting.admit(500)
    assert vcpu.resume(500) == InGuest(7)
    assert vcpu.bus_locks == 1


@BOTH
def test_with_exit_enabled_reason_33_comes_first_and_the_next_run_waits(guest, toml, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock(after_ns=10)], toml)
    assert run_to_exit(vcpu) == 10
    assert vcpu.run.exit_reason == Exit.X86_BUS_LOCK
    assert accounting.queue == []
    assert vcpu.kvm_run(10) == Throttled()
    assert accounting.queue == [vcpu]


@BOTH
def test_signal_during_the_wait_is_eintr_and_the_event_stays_owed(guest, toml, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock()], toml)
    run_to_exit(vcpu)
    vcpu.kvm_run(0)
    with pytest.raises(KvmError) as error:
        vcpu.interrupt(300)
    assert (error.value.errno, vcpu.run.exit_reason, vcpu.run.flags) == (EINTR, Exit.INTR, 0)
    assert (accounting.queue, vcpu.owed, vcpu.throttled_ns) == ([], True, 300)
    assert vcpu.kvm_run(400) == Throttled()
    assert accounting.queue == [vcpu]


def test_admission_in_the_very_moment_of_a_signal_is_not_asked_for_again(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock()], exits=False)
    woken = []
    vcpu.on_wake = lambda vcpu, now_ns: woken.append(now_ns)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    accounting.bus_lock_withdraw = lambda waiter, now_ns: accounting.admit(now_ns)
    with pytest.raises(KvmError):
        vcpu.interrupt(9)
    assert (vcpu.owed, vcpu.throttled_ns, woken) == (False, 9, [])


@BOTH
def test_immediate_exit_does_not_queue_and_does_not_forgive(guest, toml, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock()], toml)
    run_to_exit(vcpu)
    vcpu.run.immediate_exit = 1
    with pytest.raises(KvmError):
        vcpu.kvm_run(0)
    assert (accounting.queue, vcpu.owed) == ([], True)


def test_detection_without_any_limit_is_still_reported_to_the_limiter(guest, accounting):
    vcpu = guest([BusLock()] * 2)
    run_to_exit(vcpu)
    run_to_exit(vcpu)
    assert accounting.admissions == 1


def test_admitted_vcpu_tells_its_scheduler_once(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock()], exits=False)
    woken = []
    vcpu.on_wake = lambda vcpu, now_ns: woken.append((vcpu.id, now_ns))
    vcpu.kvm_run(0)
    vcpu.resume(0)
    accounting.admit(77)
    assert woken == [(0, 77)]


@BOTH
def test_teardown_drops_the_owed_event(guest, toml, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock()], toml, exits=False)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    vcpu.vm.close(5)
    assert (accounting.cancelled, accounting.queue, vcpu.owed) == ([vcpu], [], False)


def test_move_of_the_process_takes_the_waiting_vcpu_along(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock()], exits=False)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    other = object()
    accounting.queue.append(other)
    vcpu.vm.moved(3)
    assert accounting.queue == [other, vcpu]


def test_statistics_are_a_snapshot_of_vm_and_vcpu(guest, accounting):
    accounting.limited, accounting.tokens = True, 1
    vcpu = guest([BusLock()] * 3, exits=False)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    vcpu.resume(0)
    accounting.admit(40)
    vcpu.resume(40)
    got = vcpu.vm.statistics()
    vcpu.resume(40)
    assert (got.bus_locks, got.throttled_ns, got.owed, got.state) == (2, 40, 0, "plain")
    assert got.vcpus[0].phase == "guest"
    assert vcpu.vm.statistics().owed == 1


def test_skipped_instruction_of_fault_like_hardware_owes_nothing(guest, accounting):
    vcpu = guest([BusLock(insn_len=4), Hlt(after_ns=9)], FAULT)
    run_to_exit(vcpu)
    accounting.limited, accounting.tokens = True, 0
    vcpu.rip += 4
    assert vcpu.kvm_run(0) == InGuest(9)


def test_instruction_executed_after_its_intercept_takes_no_guest_time_again(guest):
    vcpu = guest([Mmio(after_ns=50, bus_lock=True)], FAULT)
    assert run_to_exit(vcpu) == 50
    assert vcpu.kvm_run(60) == InGuest(0)


def test_lock_riding_on_another_exit_is_owed_as_well(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([Mmio(bus_lock=True)])
    run_to_exit(vcpu)
    assert vcpu.kvm_run(0) == Throttled()


def test_each_of_two_stops_brings_its_own_lock(guest):
    vcpu = guest([Mmio(bus_lock=True), Mmio(bus_lock=True)])
    assert [seen[:2] for seen in exits_of(vcpu, 2)] == [(6, 2), (6, 2)]
    assert vcpu.bus_locks == 2


@pytest.mark.parametrize("stop", [InKernel(bus_lock=True), Mmio(bus_lock=True)])
def test_riding_lock_of_a_limited_vm_without_the_capability_shows_no_sign(guest, accounting, stop):
    accounting.limited = True
    vcpu = guest([stop, Mmio()], exits=False)
    assert exits_of(vcpu, 1) == [(6, 0, 0xFFF0, 1)]
    run_to_exit(vcpu)
    assert accounting.admissions == 1


def test_credit_given_in_the_kernel_stays_when_rip_is_moved_during_a_signal(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock(insn_len=4), BusLock(insn_len=4), Hlt()], FAULT, exits=False)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    with pytest.raises(KvmError):
        vcpu.interrupt(0)
    vcpu.rip += 4
    accounting.tokens = 1
    run_to_exit(vcpu)
    assert (vcpu.run.exit_reason, vcpu.bus_locks, accounting.admissions) == (5, 1, 1)


def test_init_of_an_intercepted_vcpu_drops_its_lock(guest, accounting):
    vcpu = guest([BusLock(), Hlt(after_ns=3)], FAULT)
    run_to_exit(vcpu)
    vcpu.init()
    accounting.limited, accounting.tokens = True, 0
    assert vcpu.kvm_run(0) == InGuest(3)
    assert vcpu.bus_locks == 0


def test_init_of_a_vcpu_whose_wait_was_interrupted_leaves_nothing_owed(guest, accounting):
    accounting.limited, accounting.tokens = True, 0
    vcpu = guest([BusLock(), Hlt()], FAULT, exits=False)
    vcpu.kvm_run(0)
    assert vcpu.resume(0) == Throttled()
    with pytest.raises(KvmError):
        vcpu.interrupt(0)
    vcpu.init()
    assert accounting.cancelled == [vcpu]
    vcpu.vm.close()
    assert accounting.cancelled == [vcpu]
