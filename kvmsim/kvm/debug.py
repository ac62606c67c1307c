"""Debug exceptions of a guest: DR6 and DR7, the bus lock #DB, a debugger in user space.

DR6 bit 11 says "bus lock" when it is **clear**; hardware clears it and the guest sets it again. A
#DB carries its cause as a payload of opposite, active-high polarity (kvm.md B.1)::

    DR6 before   payload   DR6 after
    FFFF0FF0     0800      FFFF07F0    a bus lock
    FFFF07F0     4000      FFFF47F0    a single step; the handler had not set bit 11 again

The exception belongs to locks taken above CPL 0 by Intel guests that have the feature and enabled
it. It is a trap: it is delivered when the guest is entered next, after any exit to user space.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi.exits import Exit
from kvmsim.abi.ioctls import KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_SET_GUEST_DEBUG
from kvmsim.abi.structs import (
    KVM_CPUID_ENTRY2,
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_DEBUGREGS,
    KVM_GUEST_DEBUG,
    KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
)
from kvmsim.engine.base import Debug
from kvmsim.engine.x86.breakpoints import Debugger, dr6_after
from kvmsim.errors import KvmError
from kvmsim.kvm import capabilities, events, exits, protected
from kvmsim.kvm.dispatch import VcpuFile, handles
from kvmsim.kvm.events import DB_VECTOR, QueuedException

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.lbr import GuestLbr
    from kvmsim.kvm.vcpu import Vcpu

DR6_ACTIVE_LOW = exits.DR6_ACTIVE_LOW
DR6_VOLATILE = 0x0001E80F
DR6_FIXED_1 = 0xFFFE07F0
DR6_BUS_LOCK = exits.DR6_BUS_LOCK
DR6_RTM = 1 << 16
DR7_RESET = 0x400
DR7_GD = 1 << 13
DEBUGCTL_BUS_LOCK = 1 << 2

FN7_EBX_RTM = 1 << 11
FN7_ECX_BUS_LOCK_DETECT = 1 << 24
U32_MAX = 0xFFFF_FFFF


class GuestDebug:
    """The debug state of one vCPU; made when something of it is first used.

    Attributes:
        dr: DR0 to DR3.
        dr6: debug status.
        dr7: debug control.
        debugctl: ``IA32_DEBUGCTL`` as the guest reads it.
        control: what ``KVM_SET_GUEST_DEBUG`` asked for; 0 without a debugger.
        breakpoints: DR0 to DR3 and DR7 of a debugger that uses them; None: the guest's count.
        trap: payload of a #DB the processor still has to deliver, 0 without one.
        queued: some event waits for the next entry; ``kvmsim.kvm.events`` has it.
        delivered: #DBs the guest has got.
        lbr: its last-branch records; None: it never used them.
    """

    __slots__ = (
        "breakpoints",
        "control",
        "debugctl",
        "delivered",
        "dr",
        "dr6",
        "dr7",
        "lbr",
        "queued",
        "trap",
    )

    def __init__(self) -> None:
        self.control = 0
        self.breakpoints: tuple[int, int, int, int, int] | None = None
        self.delivered = 0
        self.lbr: GuestLbr | None = None
        self.reset()

    def reset(self) -> None:
        """Power-on or INIT; a debugger stays."""
        self.dr = [0, 0, 0, 0]
        self.dr6 = DR6_ACTIVE_LOW
        self.dr7 = DR7_RESET
        self.debugctl = 0
        self.trap = 0
        self.queued = False


def of(vcpu: Vcpu) -> GuestDebug:
    """The debug state of a vCPU."""
    if vcpu.debug is None:
        vcpu.debug = GuestDebug()
    return vcpu.debug


# -- registers -----------------------------------------------------------------------------------


def dr6_written(value: int, *, bus_lock_detect: bool, rtm: bool) -> int:
    """What DR6 holds after the guest wrote a 32-bit value (a wider one is #GP)."""
    fixed = DR6_FIXED_1
    fixed |= 0 if rtm else DR6_RTM
    fixed |= 0 if bus_lock_detect else DR6_BUS_LOCK
    return (value & DR6_VOLATILE) | fixed


def has_bus_lock_detect(vcpu: Vcpu) -> bool:
    """Whether the guest has the bus lock #DB: Intel, by the host's and the guest's CPUID."""
    return _host_detects(vcpu) and bool(_leaf_7(vcpu, "ecx") & FN7_ECX_BUS_LOCK_DETECT)


def has_rtm(vcpu: Vcpu) -> bool:
    """Whether the guest's CPUID shows transactional memory."""
    return bool(_leaf_7(vcpu, "ebx") & FN7_EBX_RTM)


def _host_detects(vcpu: Vcpu) -> bool:
    preset = vcpu.vm.machine.preset
    return preset.vendor == "intel" and preset.bus_lock.detect


def _leaf_7(vcpu: Vcpu, register: str) -> int:
    """Subleaf 0 (Linux 6.12 cpuid.c cpuid_entry2_find: an index counts only if flagged)."""
    size = KVM_CPUID_ENTRY2.size_bytes
    for at in range(0, len(vcpu.cpuid), size):
        entry = vcpu.cpuid[at : at + size]
        if KVM_CPUID_ENTRY2.get(entry, "function") == 7 and not (
            KVM_CPUID_ENTRY2.get(entry, "flags") & KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            and KVM_CPUID_ENTRY2.get(entry, "index")
        ):
            return KVM_CPUID_ENTRY2.get(entry, register)
    return 0


def write_dr6(vcpu: Vcpu, value: int) -> bool:
    """The guest's MOV to DR6; False: #GP."""
    if value > U32_MAX:
        return False
    detect, rtm = has_bus_lock_detect(vcpu), has_rtm(vcpu)
    of(vcpu).dr6 = dr6_written(value, bus_lock_detect=detect, rtm=rtm)
    return True


def debugger_of(debug: GuestDebug) -> Debugger | None:
    """What the debugger in user space wants of an engine that executes code; None: nothing."""
    control = debug.control
    if not control:
        return None
    return Debugger(
        single_step=bool(control & KVM_GUESTDBG_SINGLESTEP),
        int3=bool(control & KVM_GUESTDBG_USE_SW_BP),
        registers=debug.breakpoints,
        blocks_interrupts=bool(control & KVM_GUESTDBG_BLOCKIRQ),
    )


# -- delivery ------------------------------------------------------------------------------------


def bus_lock(debug: GuestDebug, cpl: int) -> None:
    """A bus lock was taken: a #DB is due if the guest wants one for this privilege level."""
    if cpl and debug.debugctl & DEBUGCTL_BUS_LOCK:
        debug.trap |= DR6_BUS_LOCK


def take_trap(vcpu: Vcpu, debug: GuestDebug) -> int:
    """Payload of the #DB that is due, all its causes together; then none is."""
    payload, debug.trap = debug.trap, 0
    if not payload:
        return 0
    # What an engine with code of its own is about to raise goes along.
    take_traps = getattr(vcpu.engine, "take_traps", None)
    if take_traps is not None:
        payload |= take_traps()
    return payload


def show_trap(vcpu: Vcpu) -> None:
    """A #DB the processor still has to deliver is a pending exception like any other."""
    debug = vcpu.debug
    state = events.of(vcpu)
    if debug is None or not debug.trap or state.exception.pending:
        return
    state.exception = QueuedException(
        DB_VECTOR, pending=True, has_payload=True, payload=take_trap(vcpu, debug)
    )
    debug.queued = True


def deliver(vcpu: Vcpu, debug: GuestDebug) -> int | None:
    """Entering the guest: what is pending arrives. An exit reason, if that ends the run."""
    if debug.lbr is not None:
        debug.lbr.enter(debug.debugctl)
    if debug.queued and (reason := _deliver_queued(vcpu, debug)) is not None:
        return reason
    payload = take_trap(vcpu, debug)
    if not payload:
        return None
    if debug.control & (KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP):
        exits.report_debug(vcpu, Debug(exception=DB_VECTOR, dr6=payload, dr7=debug.dr7))
        return Exit.DEBUG
    debug.dr6 = dr6_after(debug.dr6, payload)
    debug.dr7 &= ~DR7_GD
    debug.delivered += 1
    return None


def _deliver_queued(vcpu: Vcpu, debug: GuestDebug) -> int | None:
    state = events.of(vcpu)
    if state.triple_fault:
        state.triple_fault = False
        return exits.shutdown(vcpu)
    # An engine with code of its own has handlers for them.
    deliver_events = getattr(vcpu.engine, "deliver_events", None)
    if deliver_events is not None:
        deliver_events()
        arrived = state.take_exception()
    else:
        arrived = state.delivered()
    if arrived is not None and arrived.vector == DB_VECTOR:
        apply_payload(vcpu, arrived)
        debug.dr7 &= ~DR7_GD
        debug.delivered += 1
    debug.queued = state.waiting
    return None


def apply_payload(vcpu: Vcpu, exception: QueuedException) -> None:
    """What a pending exception does to other registers happens now: a #DB changes DR6."""
    if not (exception.pending and exception.has_payload):
        return
    if exception.vector == DB_VECTOR:
        debug = of(vcpu)
        debug.dr6 = dr6_after(debug.dr6, exception.payload)
    exception.has_payload = False
    exception.payload = 0


# -- ioctls --------------------------------------------------------------------------------------


@handles(VcpuFile, KVM_GET_DEBUGREGS)
def get_debugregs(vcpu: Vcpu, call: Call) -> int:
    """Copy the debug registers out. Without KVM_CAP_EXCEPTION_PAYLOAD a pending #DB shows."""
    protected.refuse(vcpu)
    debug = of(vcpu)
    if not capabilities.of(vcpu.vm).exception_payload:
        show_trap(vcpu)
        apply_payload(vcpu, events.of(vcpu).exception)
    data = KVM_DEBUGREGS.pack(dr6=debug.dr6, dr7=debug.dr7)
    for index, address in enumerate(debug.dr):
        KVM_DEBUGREGS.put(data, "db", address, index)
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_DEBUGREGS)
def set_debugregs(vcpu: Vcpu, call: Call) -> int:
    """Take debug registers over. The fixed bits of DR6 are not applied (kvm.md B.1)."""
    protected.refuse(vcpu)
    data = call.read(KVM_DEBUGREGS.size_bytes)
    dr6, dr7 = KVM_DEBUGREGS.get(data, "dr6"), KVM_DEBUGREGS.get(data, "dr7")
    if KVM_DEBUGREGS.get(data, "flags") or dr6 > U32_MAX or dr7 > U32_MAX:
        raise KvmError(EINVAL, "flags, or DR6 or DR7 wider than 32 bits")
    debug = of(vcpu)
    debug.dr = [KVM_DEBUGREGS.get(data, "db", index) for index in range(4)]
    debug.dr6, debug.dr7 = dr6, dr7
    return 0


@handles(VcpuFile, KVM_SET_GUEST_DEBUG)
def set_guest_debug(vcpu: Vcpu, call: Call) -> int:
    """A debugger comes, changes its mind or goes. Unknown control bits are accepted."""
    if protected.has_vmsa(vcpu):
        raise KvmError(EINVAL, "a debugger needs registers that are not encrypted")
    data = call.read(KVM_GUEST_DEBUG.size_bytes)
    control = KVM_GUEST_DEBUG.get(data, "control")
    debug = of(vcpu)
    if control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP):
        if events.of(vcpu).exception.pending:
            raise KvmError(EBUSY, "an exception is pending")
        # Without a payload: DR6 stays as it is.
        vector = DB_VECTOR if control & KVM_GUESTDBG_INJECT_DB else events.BP_VECTOR
        events.queue_exception(vcpu, vector)
        debug.queued = True
    debug.control = control if control & KVM_GUESTDBG_ENABLE else 0
    uses = debug.control & KVM_GUESTDBG_USE_HW_BP
    values = [KVM_GUEST_DEBUG.get(data, "arch", index) for index in range(8)]
    debug.breakpoints = (values[0], values[1], values[2], values[3], values[7]) if uses else None
    return 0
