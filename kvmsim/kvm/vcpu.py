"""The vCPU descriptor: state of one vCPU and the calls that read and set it."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, EIO
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvmsim.abi import caps
from kvmsim.abi.exits import NR_EXITS, Exit
from kvmsim.abi.ioctls import (
    KVM_ENABLE_CAP,
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_SET_MP_STATE,
    KVM_SET_REGS,
    KVM_SET_SIGNAL_MASK,
)
from kvmsim.abi.regs import KVM_SIGNAL_MASK, RFLAGS_IF
from kvmsim.abi.structs import KVM_ENABLE_CAP as ENABLE_CAP_STRUCT
from kvmsim.abi.structs import KVM_MP_STATE, KVM_REGS
from kvmsim.engine.base import Parked
from kvmsim.errors import KvmError
from kvmsim.kvm import bus_lock, events, interrupts, irqchip, lbr, pmu, protected, run, sregs
from kvmsim.kvm.dispatch import VcpuFile, handles
from kvmsim.kvm.page import KvmRun

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmsim.engine.base import GuestEngine, Stop
    from kvmsim.engine.x86.lbr import LastBranches
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.debug import GuestDebug
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.mirror import Mirror
    from kvmsim.kvm.vm import Vm

RESET_RIP = 0xFFF0
RESET_RDX = 0x600
RESET_RFLAGS = 0x2
APIC_BASE = 0xFEE00800
APIC_BASE_BSP = 0x100
SIGSET_BYTES = 8
MP_STATES = frozenset(
    {*range(caps.KVM_MP_STATE_SIPI_RECEIVED + 1), caps.KVM_MP_STATE_AP_RESET_HOLD}
)

_PARKED = Parked()


@dataclass(frozen=True, slots=True)
class VcpuStatistics:
    """What one vCPU has done so far.

    Attributes:
        id: its id.
        phase: ``user``, ``guest``, ``halted``, ``wait-sipi``, ``throttled``, ``ready`` or
            ``asleep``.
        exits: ``KVM_EXIT_*`` name -> how often KVM_RUN returned with it; only those that occurred.
        bus_locks: bus locks its guest has taken, seen or not.
        throttled_ns: time it waited for admission, waits that are over.
        owed: whether a bus lock is still to be admitted before it enters the guest.
    """

    id: int
    phase: str
    exits: Mapping[str, int]
    bus_locks: int
    throttled_ns: int
    owed: bool


@runtime_checkable
class ResetPart(Protocol):
    """A part of a vCPU's state that power-on and INIT set back; others survive INIT."""

    def reset(self) -> None:
        """Back to the values after reset."""


class Vcpu(VcpuFile):
    """One vCPU.

    Args:
        vm: its VM.
        vcpu_id: its id.
        page: the ``kvm_run`` page; a private one by default.

    Attributes:
        vm: its VM.
        id: its id.
        pid: whose cgroup its bus locks count for.
        engine: what makes its guest move; set by the VMM before the first KVM_RUN.
        run: the ``kvm_run`` page.
        on_wake: called with (vcpu, now_ns) when a wait inside KVM_RUN is over; then ``resume``.
        data: free for whoever schedules the vCPU.
        closed: the descriptor was closed.
        mp_state: ``KVM_MP_STATE_*``.
        rip: instruction pointer.
        input: what the last completed IN or MMIO read brought.
        cpuid: the table as set, as bytes of ``kvm_cpuid_entry2``.
        has_run: CPUID is fixed from here on.
        bus_lock_exit: detection is armed and exits to user space.
        bus_lock_counter: credit of fault-like hardware.
        owed: a bus lock is to be admitted before the guest is entered.
        bus_locks: bus locks taken so far.
        throttled_ns: time spent waiting for admission.
        exits: returns of KVM_RUN by exit reason.
        debug: its debug registers; None: never used, all as after reset.
        state: parts that belong to one subsystem each; see ``state_of``.
        enforces_pv_cpuid: the guest has only the paravirtual features its CPUID shows.
        allowance_ns: guest time until the next timer is due; None: there is none.
        signal_mask: signals blocked while it is in KVM_RUN, bit 0 for number 1; None: as outside.
        asleep_until_ns: the host makes its thread sleep for a split lock; None: it does not.
        on_signal: called with (vcpu, number) when KVM queues a signal for the thread that runs it.
        mirror: who has newer registers than KVM, for a vCPU that executes code.
        state_protected: its registers are encrypted; user space reads and sets them no more.
    """

    __slots__ = (
        *("vm", "id", "pid", "engine", "run", "on_wake", "data", "closed", "has_run"),
        *("mp_state", "rip", "cr8", "apic_base", "input", "cpuid", "_regs", "ready_and_if"),
        *("phase", "since_ns", "wake_at_ns", "in_guest", "stop", "remaining_ns", "lock_done"),
        *("pending", "pending_rip", "io_done", "exits", "bus_locks", "throttled_ns"),
        *("detects", "fault_like", "bus_lock_exit", "bus_lock_counter", "owed"),
        *("intercepted", "intercepted_rip", "compare_due", "debug", "state", "state_protected"),
        *(
            "allowance_ns",
            "enforces_pv_cpuid",
            "mirror",
            "signal_mask",
            "asleep_until_ns",
            "on_signal",
        ),
    )

    def __init__(self, vm: Vm, vcpu_id: int, page: KvmRun | None = None) -> None:
        mechanism = vm.machine.bus_lock_exit
        self.vm = vm
        self.id = vcpu_id
        self.pid = vm.creator.pid
        self.engine: GuestEngine = _PARKED
        self.run = page if page is not None else KvmRun()
        self.on_wake: Callable[[Vcpu, int], None] | None = None
        self.data: object = None
        self.closed = False
        self.has_run = False
        self.mp_state = caps.KVM_MP_STATE_RUNNABLE
        boots = vcpu_id == irqchip.of(vm).boot_cpu
        if vm.irqchip and not boots:
            self.mp_state = caps.KVM_MP_STATE_UNINITIALIZED
        self.cr8 = 0
        self.apic_base: int = APIC_BASE | (APIC_BASE_BSP if boots else 0)
        self.input = b""
        self.cpuid = b""
        self.phase: int = run.OUT
        self.since_ns = 0
        self.wake_at_ns: int | None = None
        self.in_guest = run.InGuest()
        self.stop: Stop | None = None
        self.remaining_ns = 0
        self.lock_done = False
        self.pending: Stop | None = None
        self.pending_rip = 0
        self.io_done = 0
        self.exits: list[int] = [0] * NR_EXITS
        self.bus_locks: int = 0
        self.throttled_ns: int = 0
        self.detects = mechanism != "none"
        self.fault_like = mechanism == "fault"
        self.bus_lock_exit = False
        self.bus_lock_counter = 0
        self.owed = False
        self.intercepted = False
        self.intercepted_rip = 0
        self.compare_due = False
        self.debug: GuestDebug | None = None
        self.state: dict[Callable[[Vcpu], object], object] = {}
        self.state_protected = False
        self.enforces_pv_cpuid = False
        self.signal_mask: int | None = None
        self.allowance_ns: int | None = None
        self.mirror: Mirror | None = None
        self.asleep_until_ns: int | None = None
        self.on_signal: Callable[[Vcpu, int], None] | None = None
        self._power_on()

    kvm_run = run.kvm_run
    resume = run.resume
    interrupt = run.interrupt
    wake = run.wake
    kick = run.kick
    sipi = run.sipi
    admitted = run.admitted

    @property
    def creator(self) -> Client:
        """Who made the VM."""
        return self.vm.creator

    @property
    def link_name(self) -> str:
        """See :attr:`KvmFile.link_name`."""
        return f"kvm-vcpu:{self.id}"

    @property
    def records(self) -> LastBranches | None:
        """Where the branches it takes in the guest are recorded; None: nowhere."""
        return lbr.recording(self)

    def check(self, client: Client) -> None:
        """Refuse callers from another address space, and a dead VM.

        Raises:
            KvmError: EIO.
        """
        if client.mm != self.vm.creator.mm or self.vm.dead or self.closed:
            raise KvmError(EIO, "not the creator's address space, or a dead VM")

    def _power_on(self) -> None:
        """Registers and controls after reset."""
        if self.mirror is not None:
            self.mirror.reset()
        self._regs = KVM_REGS.pack(rdx=RESET_RDX, rflags=RESET_RFLAGS)
        self.rip = RESET_RIP
        self._note_interrupt_flag()
        self.bus_lock_counter = 0
        for part in self.state.values():
            if isinstance(part, ResetPart):
                part.reset()
        if self.debug is not None:
            self.debug.reset()
        bus_lock.arm(self)

    def init(self) -> None:
        """The INIT signal. The instruction it was at, and what is pending, are gone.

        AMD initialises the VMCB again, so detection enabled meanwhile is armed now; Intel's control
        stays as power-on left it (kvm.md A.3).
        """
        armed = self.bus_lock_exit
        self._power_on()
        if self.vm.machine.preset.vendor == "intel":
            self.bus_lock_exit = armed
        self.stop = self.pending = None
        self.io_done = 0
        if self.intercepted:
            # The lock it was about to take is not coming; it may have been asked for already.
            if self.owed and not self.compare_due:
                self.vm.accounting.bus_lock_cancel(self.pid, self, self.since_ns)
            self.intercepted = self.compare_due = self.owed = False

    def cpuid_changed(self) -> None:
        """The CPUID table was set with effect: Intel computes its controls again (kvm.md A.3)."""
        pmu.refresh(self)
        if self.vm.machine.preset.vendor == "intel":
            bus_lock.arm(self)

    # -- registers -------------------------------------------------------------------------

    def get_regs(self) -> bytes:
        """KVM_GET_REGS: the bytes of ``kvm_regs``."""
        mirror = self.mirror
        if mirror is not None and mirror.regs_ahead:
            self._regs = bytearray(mirror.fetch_regs())
        KVM_REGS.put(self._regs, "rip", self.rip)
        return bytes(self._regs)

    def set_regs(self, data: bytes) -> None:
        """KVM_SET_REGS. Flags bit 1 always reads as one; a pending exception is forgotten."""
        self._regs = bytearray(data)
        if self.mirror is not None:
            self.mirror.regs_ahead = False
        self.rip = KVM_REGS.get(data, "rip")
        KVM_REGS.put(self._regs, "rflags", KVM_REGS.get(data, "rflags") | RESET_RFLAGS)
        self._note_interrupt_flag()
        waiting = self.state.get(events.Events)
        if isinstance(waiting, events.Events):
            waiting.exception.pending = False

    def _note_interrupt_flag(self) -> None:
        """What the page says about interrupts; an in-kernel PIC injects them itself."""
        self.note_interrupt_flag(bool(KVM_REGS.get(self._regs, "rflags") & RFLAGS_IF), held=False)

    def note_interrupt_flag(self, enabled: bool, *, held: bool) -> None:
        """What the page says about interrupts; an in-kernel PIC injects them itself.

        Args:
            enabled: the guest's interrupt flag.
            held: something keeps an interrupt out all the same.
        """
        ready = 1 if self.vm.irqchip or (enabled and not held) else 0
        self.ready_and_if = ready | (1 << 8 if enabled else 0)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE.

        Raises:
            KvmError: EINVAL, a state that does not exist, or one without an in-kernel APIC.
        """
        if state not in MP_STATES or (state and not self.vm.irqchip):
            raise KvmError(EINVAL, f"mp_state {state}")
        self.wake_at_ns = None
        if state == caps.KVM_MP_STATE_SIPI_RECEIVED:
            # Nobody stays there: KVM starts the processor at once.
            self.rip = 0
            sregs.start_at(self, events.of(self).sipi_vector)
            state = caps.KVM_MP_STATE_RUNNABLE
        self.mp_state = state

    # -- end and statistics ----------------------------------------------------------------

    def release(self, now_ns: int = 0) -> None:
        """The last descriptor of the vCPU was closed. Its owed bus lock is dropped."""
        if self.closed:
            return
        self.closed = True
        if self.owed:
            self.vm.accounting.bus_lock_cancel(self.pid, self, max(now_ns, self.since_ns))
            self.owed = False
        self.phase = run.OUT
        self.vm.put()

    def statistics(self) -> VcpuStatistics:
        """Take a snapshot."""
        return VcpuStatistics(
            id=self.id,
            phase=run.PHASES[self.phase],
            exits={Exit(reason).name: n for reason, n in enumerate(self.exits) if n},
            bus_locks=self.bus_locks,
            throttled_ns=self.throttled_ns,
            owed=self.owed,
        )


@handles(VcpuFile, KVM_GET_REGS)
def get_regs(vcpu: Vcpu, call: Call) -> int:
    """Copy the registers out."""
    protected.refuse(vcpu)
    call.write(vcpu.get_regs())
    return 0


@handles(VcpuFile, KVM_SET_REGS)
def set_regs(vcpu: Vcpu, call: Call) -> int:
    """Take registers over."""
    protected.refuse(vcpu)
    vcpu.set_regs(call.read(KVM_REGS.size_bytes))
    return 0


@handles(VcpuFile, KVM_GET_MP_STATE)
def get_mp_state(vcpu: Vcpu, call: Call) -> int:
    """Copy the multiprocessing state out; an INIT or SIPI that waits happens before that."""
    if vcpu.vm.irqchip:
        interrupts.accept_signals(vcpu)
    call.write(KVM_MP_STATE.pack(mp_state=vcpu.mp_state))
    return 0


@handles(VcpuFile, KVM_SET_MP_STATE)
def set_mp_state(vcpu: Vcpu, call: Call) -> int:
    """Set the multiprocessing state."""
    vcpu.set_mp_state(KVM_MP_STATE.get(call.read(KVM_MP_STATE.size_bytes), "mp_state"))
    return 0


@handles(VcpuFile, KVM_ENABLE_CAP)
def enable_cap(vcpu: Vcpu, call: Call) -> int:
    """Of the capabilities of vCPUs only the paravirtual one; Hyper-V's are not there.

    Raises:
        KvmError: EFAULT; EINVAL.
    """
    data = call.read(ENABLE_CAP_STRUCT.size_bytes)
    cap = ENABLE_CAP_STRUCT.get(data, "cap")
    if ENABLE_CAP_STRUCT.get(data, "flags") or cap != caps.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
        raise KvmError(EINVAL, f"capability {cap} is not one of vCPU {vcpu.id}")
    vcpu.enforces_pv_cpuid = bool(ENABLE_CAP_STRUCT.get(data, "args"))
    return 0


@handles(VcpuFile, KVM_SET_SIGNAL_MASK)
def set_signal_mask(vcpu: Vcpu, call: Call) -> int:
    """Choose which signals are blocked during KVM_RUN; a null pointer: as outside."""
    if call.arg == 0:
        vcpu.signal_mask = None
        return 0
    size_bytes = KVM_SIGNAL_MASK.get(call.read(KVM_SIGNAL_MASK.size_bytes), "len")
    if size_bytes != SIGSET_BYTES:
        raise KvmError(EINVAL, f"a signal set of {size_bytes} bytes")
    mask = call.read(SIGSET_BYTES, KVM_SIGNAL_MASK.size_bytes)
    vcpu.signal_mask = int.from_bytes(mask, "little")
    return 0
