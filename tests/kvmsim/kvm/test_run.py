from errno import EAGAIN, EINTR, EINVAL, EIO

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.abi.ioctls import KVM_RUN, KVM_SET_MP_STATE, KVM_SET_REGS
from kvmsim.abi.structs import KVM_REGS
from kvmsim.engine.base import (
    BusLock,
    Debug,
    Executing,
    Hlt,
    InKernel,
    InternalError,
    Io,
    IrqWindow,
    Mmio,
    Shutdown,
)
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm.page import KvmRun
from kvmsim.kvm.run import Halted, InGuest

PID = 4194304
INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\n'
AMD = 'vendor = "amd"\n'


def run_to_exit(vcpu, now_ns=0):
    blocked = vcpu.kvm_run(now_ns)
    while blocked is not None:
        now_ns += blocked.guest_ns
        blocked = vcpu.resume(now_ns)
    return now_ns


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def test_hlt_without_in_kernel_apic_is_reason_5_and_the_next_run_continues(guest):
    vcpu = guest([Hlt(after_ns=5, insn_len=1), Shutdown()])
    assert run_to_exit(vcpu) == 5
    assert (vcpu.run.exit_reason, vcpu.rip) == (Exit.HLT, 0xFFF1)
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.SHUTDOWN


def test_exits_the_kernel_handles_only_cost_time(guest):
    vcpu = guest([InKernel(after_ns=5), InKernel(after_ns=6), Hlt(after_ns=7)])
    assert run_to_exit(vcpu) == 18
    assert vcpu.run.exit_reason == Exit.HLT


def test_out_fills_the_page_and_rip_moves_with_the_next_run(guest):
    vcpu = guest([Io(port=0x3F8, data=b"x", insn_len=1)])
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.IO
    assert vcpu.run.io == (1, 1, 0x3F8, 1)
    assert vcpu.run.u64[5] == 4096
    assert (vcpu.run.io_data(), vcpu.rip) == (b"x", 0xFFF0)
    run_to_exit(vcpu)
    assert vcpu.rip == 0xFFF1


def test_string_output_goes_out_one_element_at_a_time(guest):
    vcpu = guest([Io(port=1, size=2, data=b"abcdef", insn_len=3)])
    seen = []
    for _ in range(3):
        run_to_exit(vcpu)
        seen.append((vcpu.run.io, vcpu.run.io_data(), vcpu.rip))
    assert seen == [((1, 2, 1, 1), part, 0xFFF0) for part in (b"ab", b"cd", b"ef")]
    run_to_exit(vcpu)
    assert (vcpu.run.exit_reason, vcpu.rip) == (Exit.HLT, 0xFFF3)


def test_second_string_output_starts_at_its_first_element(guest):
    vcpu = guest([Io(port=1, data=b"ab"), Io(port=1, data=b"cd")])
    seen = []
    for _ in range(4):
        run_to_exit(vcpu)
        seen.append(vcpu.run.io_data())
    assert seen == [b"a", b"b", b"c", b"d"]


def test_exit_reason_is_0_while_the_guest_runs(guest):
    vcpu = guest([Shutdown(), Hlt()])
    run_to_exit(vcpu)
    vcpu.kvm_run(0)
    assert vcpu.run.exit_reason == 0


def test_lock_of_a_string_output_rides_on_its_first_element_only(guest):
    vcpu = guest([Io(port=1, data=b"ab", bus_lock=True)])
    flags = []
    for _ in range(2):
        run_to_exit(vcpu)
        flags.append(vcpu.run.flags)
    assert (flags, vcpu.bus_locks) == ([2, 0], 1)


def test_in_is_completed_even_by_a_run_with_immediate_exit(guest):
    vcpu = guest([Io(port=0x60, size=2, count=2, insn_len=2)])
    run_to_exit(vcpu)
    assert vcpu.run.io == (0, 2, 0x60, 2)
    vcpu.run.io_data(b"abcd")
    vcpu.run.immediate_exit = 1
    assert errno_of(vcpu.kvm_run, 0) == EINTR
    assert (vcpu.input, vcpu.rip, vcpu.run.exit_reason) == (b"abcd", 0xFFF2, Exit.IO)


def test_io_is_abandoned_when_user_space_moved_rip(guest):
    vcpu = guest([Io(port=0x60, insn_len=2)])
    run_to_exit(vcpu)
    vcpu.rip = 0x1000
    run_to_exit(vcpu)
    assert (vcpu.input, vcpu.rip, vcpu.run.exit_reason) == (b"", 0x1000, Exit.HLT)


def test_mmio_read_takes_the_answer_at_the_next_run(guest):
    vcpu = guest([Mmio(gpa=0xFEE00000, size=4)])
    run_to_exit(vcpu)
    assert (vcpu.run.exit_reason, vcpu.run.mmio) == (Exit.MMIO, (0xFEE00000, bytes(4), 0))
    vcpu.run.answer_mmio(b"\1\2\3\4")
    run_to_exit(vcpu)
    assert vcpu.input == b"\1\2\3\4"


def test_mmio_write_shows_its_bytes(guest):
    vcpu = guest([Mmio(gpa=0xFEE00000, data=b"\1\2")])
    run_to_exit(vcpu)
    assert vcpu.run.mmio == (0xFEE00000, b"\1\2", 1)


def test_internal_error_carries_its_words(guest):
    vcpu = guest([InternalError(suberror=4, data=(7, 9))])
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.INTERNAL_ERROR
    assert (vcpu.run.u32[8], vcpu.run.u32[9], vcpu.run.u64[5], vcpu.run.u64[6]) == (4, 2, 7, 9)


@pytest.mark.parametrize(
    ("toml", "dr6"),
    [
        (INTEL, 0xFFFF0FF0),
        (INTEL + "[quirks]\ndebug_exit_hides_bus_lock = false\n", 0xFFFF07F0),
        (AMD, 0xFFFF07F0),
    ],
    ids=["intel", "intel without the quirk", "amd"],
)
def test_debug_exit_reports_a_bus_lock_db_as_the_vendor_does(guest, toml, dr6):
    vcpu = guest([Debug(dr6=0x800)], toml)
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.DEBUG
    assert (vcpu.run.u32[8], vcpu.run.u64[6], vcpu.run.u64[7]) == (1, dr6, 0x400)


def test_debug_exit_after_a_single_step_reports_its_bit(guest):
    vcpu = guest([Debug(dr6=0x4000)])
    run_to_exit(vcpu)
    assert vcpu.run.u64[6] == 0xFFFF4FF0


def test_irq_window_is_an_exit_only_when_asked_for(guest):
    vcpu = guest([IrqWindow(), IrqWindow()])
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.HLT
    vcpu = guest([IrqWindow()])
    vcpu.run.request_interrupt_window = 1
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.IRQ_WINDOW_OPEN
    assert (vcpu.run.ready_for_interrupt_injection, vcpu.run.if_flag) == (1, 1)


def test_immediate_exit_clears_the_flags_and_leaves_the_exit_reason(guest):
    vcpu = guest([])
    vcpu.run.flags = 0xFFFF
    vcpu.run.u32[2] = 17
    vcpu.run.immediate_exit = 1
    assert errno_of(vcpu.kvm_run, 0) == EINTR
    assert (vcpu.run.flags, vcpu.run.exit_reason) == (0, 17)


def test_argument_and_dead_vm_fail_before_the_flags_are_cleared(guest):
    vcpu = guest([])
    vcpu.run.flags = 7
    assert errno_of(vcpu.ioctl, KVM_RUN, 1) == EINVAL
    vcpu.vm.dead = True
    assert errno_of(vcpu.kvm_run, 0) == EIO
    assert vcpu.run.flags == 7


def test_unsupported_register_set_fails_after_the_flags_are_cleared(guest):
    vcpu = guest([])
    vcpu.run.flags = 7
    vcpu.run.kvm_valid_regs = 1 << 20
    assert errno_of(vcpu.kvm_run, 0) == EINVAL
    assert vcpu.run.flags == 0


def test_valid_and_dirty_regs_go_through_the_page(guest):
    vcpu = guest([Hlt(insn_len=1)])
    vcpu.run.memory[304 : 304 + 144] = KVM_REGS.pack(rip=0x5000, rax=7)
    vcpu.run.kvm_dirty_regs = 1
    vcpu.run.kvm_valid_regs = 1
    run_to_exit(vcpu)
    regs = bytes(vcpu.run.memory[304 : 304 + 144])
    assert (KVM_REGS.get(regs, "rip"), KVM_REGS.get(regs, "rax")) == (0x5001, 7)
    assert vcpu.run.kvm_dirty_regs == 0


def test_run_ioctl_returns_0_or_how_it_is_blocked(guest):
    vcpu = guest([Hlt(after_ns=3)])
    assert vcpu.ioctl(KVM_RUN, 0, now_ns=10) == InGuest(3)
    vcpu.resume(13)
    assert vcpu.vm.create_vcpu(1).ioctl(KVM_RUN) == InGuest(0)


def test_signal_in_the_guest_is_reason_10_and_the_rest_of_the_time_remains(guest):
    vcpu = guest([Hlt(after_ns=100)])
    vcpu.kvm_run(1000)
    assert errno_of(vcpu.interrupt, 1030) == EINTR
    assert vcpu.run.exit_reason == Exit.INTR
    assert vcpu.kvm_run(5000) == InGuest(70)


def test_signal_counts_only_the_guest_time_the_scheduler_says(guest):
    vcpu = guest([Hlt(after_ns=100)])
    vcpu.kvm_run(1000)
    assert errno_of(vcpu.interrupt, 1500, 40) == EINTR
    assert vcpu.kvm_run(5000) == InGuest(60)


def test_signal_after_the_last_moment_leaves_no_time(guest):
    vcpu = guest([Hlt(after_ns=100)])
    vcpu.kvm_run(0)
    assert errno_of(vcpu.interrupt, 300) == EINTR
    assert vcpu.kvm_run(300) == InGuest(0)


def test_init_abandons_pending_io(guest):
    vcpu = guest([Io(port=1), Shutdown()])
    run_to_exit(vcpu)
    vcpu.init()
    run_to_exit(vcpu)
    assert (vcpu.run.exit_reason, vcpu.input) == (Exit.SHUTDOWN, b"")


def test_init_abandons_the_rest_of_a_string_of_outs(guest):
    vcpu = guest([Io(data=b"abc"), Io(data=b"x")])
    for _ in range(2):
        run_to_exit(vcpu)
    vcpu.init()
    run_to_exit(vcpu)
    assert vcpu.run.io_data() == b"x"


def test_hlt_with_in_kernel_apic_waits_in_kvm_until_its_timer(guest):
    vcpu = guest([Hlt(after_ns=10, wake_after_ns=90), Shutdown()], irqchip=True)
    woken = []
    vcpu.on_wake = lambda vcpu, now_ns: woken.append(now_ns)
    vcpu.kvm_run(0)
    assert vcpu.resume(10) == Halted(90)
    vcpu.wake(100)
    assert woken == [100]
    assert vcpu.resume(100) == InGuest(0)
    assert vcpu.resume(100) is None
    assert vcpu.run.exit_reason == Exit.SHUTDOWN


def test_signal_during_a_halt_leaves_it_halted_for_the_rest(guest):
    vcpu = guest([Hlt(wake_after_ns=90)], irqchip=True)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    assert errno_of(vcpu.interrupt, 30) == EINTR
    assert (vcpu.run.exit_reason, vcpu.mp_state) == (Exit.INTR, 3)
    assert vcpu.kvm_run(50) == Halted(40)


def test_wake_of_a_vcpu_in_user_space_lets_its_next_run_go_on(guest):
    vcpu = guest([Hlt(), Shutdown()], irqchip=True)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    errno_of(vcpu.interrupt, 0)
    vcpu.wake(5)
    assert vcpu.kvm_run(9) == InGuest(0)


def test_wake_of_a_running_vcpu_does_nothing(guest):
    vcpu = guest([Hlt(after_ns=4)])
    vcpu.kvm_run(0)
    vcpu.wake(1)
    assert vcpu.resume(4) is None


def test_application_processor_waits_for_its_sipi_then_eagain(guest):
    first = guest([], irqchip=True)
    ap = first.vm.create_vcpu(1)
    assert (first.mp_state, ap.mp_state) == (0, 1)
    assert ap.kvm_run(0) == Halted()
    ap.sipi(4)
    assert errno_of(ap.resume, 4) == EAGAIN
    assert ap.kvm_run(4) == InGuest(0)


def test_application_processor_with_immediate_exit_or_signal_is_eintr(guest):
    ap = guest([], irqchip=True).vm.create_vcpu(1)
    ap.run.immediate_exit = 1
    assert errno_of(ap.kvm_run, 0) == EINTR
    ap.run.immediate_exit = 0
    ap.kvm_run(0)
    assert errno_of(ap.interrupt, 0) == EINTR
    assert ap.run.exit_reason == Exit.INTR


def test_application_processor_made_runnable_by_user_space_runs(guest):
    ap = guest([], irqchip=True).vm.create_vcpu(1)
    ap.ioctl(KVM_SET_MP_STATE, bytearray(4))
    assert ap.kvm_run(0) == InGuest(0)


def test_cr8_comes_from_the_page_without_in_kernel_apic(guest):
    vcpu = guest([Hlt()])
    vcpu.run.cr8 = 5
    run_to_exit(vcpu)
    assert (vcpu.cr8, vcpu.run.cr8, vcpu.run.apic_base) == (5, 5, 0xFEE00900)


def test_cr8_of_the_page_is_output_only_with_in_kernel_apic(guest):
    vcpu = guest([Shutdown()], irqchip=True)
    vcpu.run.cr8 = 5
    run_to_exit(vcpu)
    assert (vcpu.cr8, vcpu.run.cr8) == (0, 0)


def test_second_run_at_once_is_a_bug_of_the_caller(guest):
    vcpu = guest([Hlt(after_ns=5)])
    vcpu.kvm_run(0)
    with pytest.raises(RuntimeError, match="in KVM_RUN already"):
        vcpu.kvm_run(0)


def test_resume_and_interrupt_need_a_run(guest):
    vcpu = guest([])
    with pytest.raises(RuntimeError, match="nothing to go on with"):
        vcpu.resume(0)
    with pytest.raises(RuntimeError, match="not in KVM_RUN"):
        vcpu.interrupt(0)


def test_run_page_can_be_memory_of_another_process(kvm):
    shared = bytearray(12288)
    vcpu = kvm().create_vm(0, PID).create_vcpu(0, KvmRun(shared))
    run_to_exit(vcpu)
    assert shared[8] == Exit.HLT


def test_vcpu_without_an_engine_halts(kvm):
    vcpu = kvm().create_vm(0, PID).create_vcpu(0)
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.HLT


def test_rip_set_through_regs_is_where_the_guest_goes_on(kvm):
    vcpu = kvm().create_vm(0, PID).create_vcpu(0)
    vcpu.ioctl(KVM_SET_REGS, KVM_REGS.pack(rip=0x7C00))
    vcpu.engine = Scripted([Hlt(insn_len=1)])
    run_to_exit(vcpu)
    assert vcpu.rip == 0x7C01


def test_init_forgets_what_the_guest_was_doing(guest):
    vcpu = guest([BusLock(insn_len=2), Hlt()])
    run_to_exit(vcpu)
    vcpu.init()
    assert vcpu.rip == 0xFFF0
    run_to_exit(vcpu)
    assert vcpu.run.exit_reason == Exit.HLT


def test_guest_that_executes_elsewhere_is_entered_again_afterwards(guest):
    stop = Executing()
    vcpu = guest([stop, Hlt()])
    blocked = vcpu.kvm_run(0)
    assert (blocked.work, blocked.guest_ns) == (stop, 0)
    blocked = vcpu.resume(0)
    assert blocked.work is None
    assert vcpu.resume(0) is None
    assert vcpu.run.exit_reason == Exit.HLT


def test_signal_ends_what_executes_elsewhere_and_the_guest_is_asked_anew(guest):
    ended = []
    vcpu = guest([Executing(end=lambda: ended.append(True)), Hlt()])
    vcpu.kvm_run(0)
    assert errno_of(vcpu.interrupt, 5) == EINTR
    assert ended == [True]
    assert vcpu.kvm_run(5).work is None
    assert vcpu.resume(5) is None
    assert vcpu.run.exit_reason == Exit.HLT
