"""KVM_RUN: enter the guest, stop, fill the page, finish pending I/O on the way back in.

The model may not sleep, so one KVM_RUN is a sequence of steps the caller makes: :func:`kvm_run`
starts it, and while it answers a :data:`Blocked`, whoever schedules lets that much time pass and
calls :func:`resume`; ``None`` ends it like a return value of 0, with the exit in the page::

    blocked = vcpu.kvm_run(now)
    while blocked is not None:
        now = ...                       # InGuest: guest_ns of guest time; else until on_wake
        blocked = vcpu.resume(now)      # or vcpu.interrupt(now): EINTR
    vcpu.run.exit_reason

Order of the checks: kvm.md F.4. Bus locks: ``kvmsim.kvm.bus_lock``.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EAGAIN, EFAULT, EINTR, EINVAL, EIO
from typing import TYPE_CHECKING, NoReturn

from kvmsim.abi.caps import (
    KVM_MP_STATE_AP_RESET_HOLD,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
)
from kvmsim.abi.exits import KVM_RUN_X86_BUS_LOCK, Exit
from kvmsim.abi.ioctls import KVM_RUN
from kvmsim.engine.base import (
    BusLock,
    Debug,
    Executing,
    Hlt,
    Hypercall,
    InKernel,
    InternalError,
    Io,
    IrqWindow,
    Mmio,
    Rdmsr,
    Shutdown,
    Signal,
    SplitLockAc,
    SystemEvent,
    TprLowered,
    Wrmsr,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import bus_lock, debug, delegated, exits, interrupts, lbr, sev, split_lock
from kvmsim.kvm.dispatch import VcpuFile, handles
from kvmsim.kvm.page import (
    U16_FLAGS,
    U16_WISHES,
    U32_EXIT_REASON,
)
from kvmsim.kvm.sync_regs import store_page, take_over_page

if TYPE_CHECKING:
    from kvmsim.engine.base import Stop
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu


@dataclass(slots=True)
class InGuest:
    """The guest executes. One object per vCPU, valid until the next call on that vCPU.

    Attributes:
        guest_ns: guest time until it stops, stalls excluded.
        work: the guest executes in ``work.work()``, which any thread may call; ``resume`` when it
            has returned. None: the guest has got there already.
        deadline_ns: when KVM wants the vCPU back that executes in ``work``: its next timer; None:
            never.
    """

    guest_ns: int = 0
    work: Executing | None = None
    deadline_ns: int | None = None


@dataclass(slots=True)
class Halted:
    """The vCPU waits inside KVM: HLT with an in-kernel APIC, an AP for its SIPI, a split lock.

    Attributes:
        wake_after_ns: when the guest's own timer ends it (the caller then calls ``vcpu.wake``);
            ``None``: only an event from outside does.
    """

    wake_after_ns: int | None = None


@dataclass(slots=True)
class Throttled:
    """The vCPU waits for the admission of a bus lock; ``vcpu.admitted`` ends it."""


Blocked = InGuest | Halted | Throttled

THROTTLED = Throttled()

# Every exit comes by here, and to look a member up takes Python 3.11 some 50 ns.
INTR, BUS_LOCK_EXIT = int(Exit.INTR), int(Exit.X86_BUS_LOCK)
MEMORY_FAULT = int(Exit.MEMORY_FAULT)

#: What the processor reports when it cannot enter the guest (AMD, VMEXIT_INVALID).
SVM_EXIT_ERR = 0xFFFF_FFFF_FFFF_FFFF

# Where a vCPU is. Plain numbers: they are compared at every step.
OUT = 0  # in user space
GUEST = 1
HALTED = 2
WAIT_SIPI = 3
QUEUED = 4  # for admission of a bus lock
READY = 5  # woken or admitted; resume() goes on
SIPI = 6  # started; resume() returns EAGAIN
ASLEEP = 7  # for a split lock

#: Multiprocessing states that a SIPI ends.
WAIT_FOR_SIPI = (
    KVM_MP_STATE_UNINITIALIZED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_AP_RESET_HOLD,
)

PHASES = ("user", "guest", "halted", "wait-sipi", "throttled", "ready", "ready", "asleep")


@handles(VcpuFile, KVM_RUN)
def run_ioctl(vcpu: Vcpu, call: Call) -> int | Blocked:
    """KVM_RUN as an ioctl: 0, or how it is blocked."""
    if call.value != 0:
        raise KvmError(EINVAL, "KVM_RUN takes no argument")
    blocked = kvm_run(vcpu, call.now_ns)
    return 0 if blocked is None else blocked


def kvm_run(vcpu: Vcpu, now_ns: int) -> Blocked | None:
    """Start KVM_RUN.

    Returns:
        What the vCPU is doing, or None: KVM_RUN returned 0 and the page says why.

    Raises:
        KvmError: EIO dead VM; EINTR immediate_exit; EINVAL unsupported register sets, or a VM that
            is not initialised yet.
    """
    vm = vcpu.vm
    if vm.dead or vcpu.closed:
        raise KvmError(EIO, "the VM is gone")
    if vcpu.phase != OUT:
        msg = f"vCPU {vcpu.id} is in KVM_RUN already"
        raise RuntimeError(msg)
    run = vcpu.run
    wishes = run.u16[U16_WISHES]
    immediate_exit = wishes >> 8
    run.u16[U16_FLAGS] = 0
    if vcpu.mp_state == KVM_MP_STATE_UNINITIALIZED:
        if immediate_exit:
            store_page(vcpu)
            raise KvmError(EINTR, "immediate_exit")
        return _wait_for_start(vcpu)
    take_over_page(vcpu)
    if vcpu.pending is not None and _complete(vcpu, now_ns):
        return None
    if vcpu.compare_due:
        bus_lock.compare_rip(vcpu)
    if immediate_exit:
        store_page(vcpu)
        raise KvmError(EINTR, "immediate_exit")
    if (vm.needs_init or vm.sev_active) and not _may_enter_encrypted(vcpu):
        return None
    run.u32[U32_EXIT_REASON] = 0
    vcpu.has_run = True
    if wishes and vcpu.ready_and_if == exits.READY_AND_IF and not vm.irqchip:
        leave(vcpu, Exit.IRQ_WINDOW_OPEN, 0)
        return None
    return enter(vcpu, now_ns)


def _may_enter_encrypted(vcpu: Vcpu) -> bool:
    """Whether an encrypted VM is ready; False: the exit is in the page."""
    if vcpu.vm.needs_init:
        store_page(vcpu)
        raise KvmError(EINVAL, "an encrypted VM runs after KVM_SEV_INIT2")
    if sev.may_enter(vcpu.vm):
        return True
    leave(vcpu, exits.fail_entry(vcpu, SVM_EXIT_ERR), 0)
    return False


def resume(vcpu: Vcpu, now_ns: int) -> Blocked | None:
    """Go on with KVM_RUN: the guest time is over, or the wait is.

    Raises:
        KvmError: EAGAIN, an AP got its SIPI; EINTR, a signal of the guest's script. Call KVM_RUN
            again.
    """
    phase = vcpu.phase
    if phase == GUEST:
        stop = vcpu.stop
        assert stop is not None
        if type(stop) is BusLock:
            if bus_lock.taken(vcpu, stop, now_ns):
                leave(vcpu, BUS_LOCK_EXIT, KVM_RUN_X86_BUS_LOCK)
                return None
            return enter(vcpu, now_ns)
        return _stopped(vcpu, stop, now_ns)
    if phase in {READY, HALTED}:
        return enter(vcpu, now_ns)
    if phase == SIPI:
        _started(vcpu)
    msg = f"vCPU {vcpu.id} has nothing to go on with: {PHASES[phase]}"
    raise RuntimeError(msg)


def _wait_for_start(vcpu: Vcpu) -> Halted:
    """A processor that was never started waits for its first INIT or SIPI."""
    if interrupts.awake(vcpu):
        _started(vcpu)
    vcpu.phase = WAIT_SIPI
    return Halted()


def _started(vcpu: Vcpu) -> NoReturn:
    """An INIT or SIPI came for a vCPU that waits for its first; KVM_RUN is to be called again."""
    interrupts.accept_signals(vcpu)
    vcpu.phase = OUT
    store_page(vcpu)
    raise KvmError(EAGAIN, "started")


def interrupt(vcpu: Vcpu, now_ns: int, guest_ns: int | None = None) -> None:
    """A signal, or a kick by another thread, while KVM_RUN is blocked.

    The stop the guest was on its way to stays; so does an owed bus lock. Where the guest executes
    in ``work()``, that must have returned, or never have been called.

    Args:
        vcpu: the vCPU.
        now_ns: when.
        guest_ns: guest time it got since it entered; the time that passed, by default.

    Raises:
        KvmError: EINTR, always; the exit reason is KVM_EXIT_INTR.
    """
    phase = vcpu.phase
    if phase == OUT:
        msg = f"vCPU {vcpu.id} is not in KVM_RUN"
        raise RuntimeError(msg)
    if phase == GUEST:
        ran_ns = now_ns - vcpu.since_ns if guest_ns is None else guest_ns
        vcpu.remaining_ns = max(0, vcpu.remaining_ns - ran_ns)
        if vcpu.in_guest.work is not None:
            vcpu.in_guest.work.end()
            vcpu.in_guest.work = vcpu.stop = None
    vcpu.phase = OUT
    if phase == ASLEEP:
        split_lock.interrupted(vcpu)
    if phase == QUEUED:
        vcpu.vm.accounting.bus_lock_withdraw(vcpu, now_ns)
        if vcpu.owed:  # not admitted in the last moment
            vcpu.throttled_ns += now_ns - vcpu.since_ns
    vcpu.run.u32[U32_EXIT_REASON] = INTR
    vcpu.exits[INTR] += 1
    store_page(vcpu)
    raise KvmError(EINTR, "signal")


def wake(vcpu: Vcpu, now_ns: int) -> None:
    """The time of a halt is over. Nothing, if not halted.

    A guest that executes code goes on only if one of its timers brought an interrupt it takes; the
    caller calls ``resume`` in any case.
    """
    if vcpu.phase == ASLEEP:
        vcpu.phase = READY
    if vcpu.mp_state != KVM_MP_STATE_HALTED:
        return
    if interrupts.executes_code(vcpu):
        interrupts.advance(vcpu, now_ns)
        kick(vcpu, now_ns)
        return
    vcpu.mp_state = KVM_MP_STATE_RUNNABLE
    if vcpu.phase == HALTED:
        _go_on(vcpu, READY, now_ns)


def kick(vcpu: Vcpu, now_ns: int) -> None:
    """Something waits for the next entry: have the vCPU look, soon if it executes.

    Whoever queues an event for a vCPU calls this.
    """
    phase = vcpu.phase
    if phase == GUEST:
        if vcpu.in_guest.work is not None:
            vcpu.in_guest.work.kick()
    elif phase in {HALTED, WAIT_SIPI} and interrupts.awake(vcpu):
        _go_on(vcpu, READY if phase == HALTED else SIPI, now_ns)


def _go_on(vcpu: Vcpu, phase: int, now_ns: int) -> None:
    """A wait inside KVM_RUN is over."""
    vcpu.phase = phase
    if vcpu.on_wake is not None:
        vcpu.on_wake(vcpu, now_ns)


def sipi(vcpu: Vcpu, now_ns: int) -> None:
    """Start an application processor. Nothing, if it is not waiting for that."""
    if vcpu.mp_state not in WAIT_FOR_SIPI:
        return
    vcpu.mp_state = KVM_MP_STATE_RUNNABLE
    if vcpu.phase in {WAIT_SIPI, HALTED}:
        _go_on(vcpu, SIPI if vcpu.phase == WAIT_SIPI else READY, now_ns)


def admitted(vcpu: Vcpu, now_ns: int) -> None:
    """The bus lock this vCPU waits for is admitted; the limiter calls this."""
    vcpu.owed = False
    vcpu.throttled_ns += now_ns - vcpu.since_ns
    if vcpu.phase == QUEUED:  # not interrupted at this very moment
        _go_on(vcpu, READY, now_ns)


def enter(vcpu: Vcpu, now_ns: int) -> Blocked | None:
    """Get into the guest: past a halt, past the limiter, up to the next stop."""
    in_kernel_apic = vcpu.vm.irqchip
    reason = interrupts.entering(vcpu, now_ns) if in_kernel_apic else None
    if reason is None:
        if vcpu.mp_state or vcpu.owed or vcpu.asleep_until_ns is not None:
            waits = _waits(vcpu, now_ns)
            if waits is not None:
                return waits
        if vcpu.intercepted:
            bus_lock.execute_intercepted(vcpu, now_ns)
        state = vcpu.debug
        if state is not None and (state.trap or state.queued or state.lbr is not None):
            reason = debug.deliver(vcpu, state)
            if state.queued and not in_kernel_apic:
                interrupts.offer(vcpu, now_ns)
    if reason is not None:
        leave(vcpu, reason, 0)
        return None
    return _execute(vcpu, now_ns)


def _waits(vcpu: Vcpu, now_ns: int) -> Blocked | None:
    """What keeps a vCPU out of the guest; None: nothing any more."""
    if vcpu.mp_state:  # halted, or reset and waiting for its SIPI
        vcpu.phase = HALTED
        lbr.scheduled_out(vcpu)
        return Halted(interrupts.wake_after_ns(vcpu, now_ns))
    if vcpu.owed:
        # Set first: asking may admit others, whose schedulers look at every vCPU.
        vcpu.phase = QUEUED
        vcpu.since_ns = now_ns
        if not vcpu.vm.accounting.bus_lock(vcpu.pid, vcpu, now_ns):
            lbr.scheduled_out(vcpu)
            return THROTTLED
        vcpu.owed = False
    if vcpu.asleep_until_ns is not None and (rest_ns := split_lock.rest_ns(vcpu, now_ns)):
        vcpu.phase = ASLEEP
        lbr.scheduled_out(vcpu)
        return Halted(rest_ns)
    return None


def _execute(vcpu: Vcpu, now_ns: int) -> InGuest:
    """Let the guest execute up to its next stop, or its next timer."""
    vcpu.since_ns = now_ns
    in_guest = vcpu.in_guest
    if vcpu.vm.irqchip:
        in_guest.deadline_ns = deadline_ns = interrupts.deadline_ns(vcpu)
        vcpu.allowance_ns = None if deadline_ns is None else max(1, deadline_ns - now_ns)
    stop = vcpu.stop
    if stop is None:
        stop = vcpu.stop = vcpu.engine.next_stop(vcpu)
        vcpu.remaining_ns = stop.after_ns
        vcpu.lock_done = False
    vcpu.phase = GUEST
    in_guest.guest_ns = vcpu.remaining_ns
    in_guest.work = stop if type(stop) is Executing else None
    return in_guest


def leave(vcpu: Vcpu, reason: int, flags: int) -> None:
    """Return from KVM_RUN with an exit reason."""
    run = vcpu.run
    run.u32[U32_EXIT_REASON] = reason
    run.u16[U16_FLAGS] = flags
    vcpu.exits[reason] += 1
    vcpu.phase = OUT
    store_page(vcpu)


def _stopped(vcpu: Vcpu, stop: Stop, now_ns: int) -> Blocked | None:
    """The guest stopped for another reason than a bus lock, which may still ride on it."""
    detected = False
    if stop.bus_lock and not vcpu.lock_done:
        if vcpu.fault_like and bus_lock.intercepts(vcpu):
            if bus_lock.intercept(vcpu):
                leave(vcpu, BUS_LOCK_EXIT, KVM_RUN_X86_BUS_LOCK)
                return None
            return enter(vcpu, now_ns)
        detected = bus_lock.ride(vcpu, stop.cpl, now_ns)
    reason = _exit_reason(vcpu, stop, now_ns)
    if reason is None:
        # Linux 6.12 vmx.c handle_bus_lock_vmexit path: a kernel-handled exit that carries a
        # detection goes to user space after all.
        if detected and vcpu.bus_lock_exit:
            leave(vcpu, BUS_LOCK_EXIT, KVM_RUN_X86_BUS_LOCK)
            return None
        return enter(vcpu, now_ns)
    leave(vcpu, reason, KVM_RUN_X86_BUS_LOCK if detected and vcpu.bus_lock_exit else 0)
    if reason == INTR:
        raise KvmError(EINTR, "signal")
    if reason == MEMORY_FAULT:
        raise KvmError(EFAULT, "no memory behind a slot")
    return None


def _exit_reason(vcpu: Vcpu, stop: Stop, now_ns: int) -> int | None:
    """Do what KVM does for a stop; None when the guest goes on."""
    reason: int | None = None
    match stop:
        case Io():
            reason = exits.io(vcpu, stop, now_ns)
        case Mmio():
            reason = exits.mmio(vcpu, stop, now_ns)
        case Hlt():
            reason = exits.hlt(vcpu, stop, now_ns)
        case InKernel() | BusLock():
            interrupts.before_reset(vcpu, stop)
            exits.retire(vcpu, stop)
        case IrqWindow():
            reason = exits.irq_window(vcpu, stop)
        case Signal():
            vcpu.stop = None
            reason = INTR
        case Shutdown() | InternalError() | Debug():
            reason = exits.ended(vcpu, stop)
        case SplitLockAc():
            reason = split_lock.raised(vcpu, stop, now_ns)
        case Rdmsr() | Wrmsr() | Hypercall() | SystemEvent() | TprLowered():
            reason = delegated.leave(vcpu, stop)
    return reason


def _complete(vcpu: Vcpu, now_ns: int) -> bool:
    """Finish the I/O of the previous exit: the answer goes in and RIP moves on.

    Returns:
        Whether the instruction has something else to say, which is in the page.
    """
    stop, vcpu.pending = vcpu.pending, None
    if vcpu.rip != vcpu.pending_rip:
        # User space went elsewhere: the instruction is abandoned (kvm.md F.4).
        vcpu.stop = None
        vcpu.io_done = 0
        return False
    if isinstance(stop, Io):
        exits.complete_io(vcpu, stop)
    elif isinstance(stop, Mmio):
        exits.complete_mmio(vcpu, stop)
    elif isinstance(stop, Rdmsr | Wrmsr | Hypercall):
        delegated.complete(vcpu, stop)
    # An engine with an instruction in the middle ends it now, not at entry: user space may look at
    # the registers in between.
    settle = getattr(vcpu.engine, "settle", None)
    if settle is None:
        return False
    # An instruction with several accesses: the next one is due also for a run that does not enter
    # (Linux 6.12 x86.c complete_emulated_mmio).
    while (rest := settle(vcpu)) is not None:
        vcpu.stop = rest
        reason = _exit_reason(vcpu, rest, now_ns)
        if reason is not None:
            leave(vcpu, reason, 0)
            return True
    return False
