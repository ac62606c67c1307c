"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: the events of a vCPU as user space sees them.

Two capabilities change what is shown. Without KVM_CAP_EXCEPTION_PAYLOAD, looking at a pending
exception carries out its effects (DR6 changes at once) and shows it as injected. Without
KVM_CAP_X86_TRIPLE_FAULT_EVENT a pending triple fault is not shown.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS
from kvmsim.abi.regs import (
    KVM_VCPU_EVENTS,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import capabilities, debug, events
from kvmsim.kvm.dispatch import VcpuFile, handles
from kvmsim.kvm.events import QueuedException

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.events import Events
    from kvmsim.kvm.vcpu import Vcpu

NMI_VECTOR = 2
OF_VECTOR = 4
ALWAYS_VALID = (
    KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM
)
KNOWN_FLAGS = (
    ALWAYS_VALID
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT
)
#: Exceptions that the instruction raises again by itself.
SOFT = (3, OF_VECTOR)


def pack(vcpu: Vcpu) -> bytearray:
    """The bytes of ``kvm_vcpu_events``."""
    _fetch(vcpu)
    state = events.of(vcpu)
    switches = capabilities.of(vcpu.vm)
    debug.show_trap(vcpu)
    exception = state.exception
    if not switches.exception_payload and exception.pending:
        debug.apply_payload(vcpu, exception)
    state.settle_nmis()
    data = KVM_VCPU_EVENTS.pack(
        **{
            "interrupt.injected": int(state.interrupt and not state.interrupt_soft),
            "interrupt.nr": state.interrupt_nr,
            "interrupt.shadow": state.shadow,
            "nmi.injected": int(state.nmi_injected),
            "nmi.pending": state.nmi_pending,
            "nmi.masked": int(state.nmi_masked),
            "smi.latched_init": int(state.latched_init),
            "flags": ALWAYS_VALID,
        }
    )
    put = KVM_VCPU_EVENTS.put
    if exception.vector not in SOFT:
        injected = exception.injected or (exception.pending and not switches.exception_payload)
        put(data, "exception.injected", int(injected))
        put(data, "exception.pending", int(exception.pending))
    put(data, "exception.nr", exception.vector)
    put(data, "exception.has_error_code", int(exception.has_error_code))
    put(data, "exception.error_code", exception.error_code)
    put(data, "exception_has_payload", int(exception.has_payload))
    put(data, "exception_payload", exception.payload)
    if switches.exception_payload:
        put(data, "flags", KVM_VCPU_EVENTS.get(data, "flags") | KVM_VCPUEVENT_VALID_PAYLOAD)
    if switches.triple_fault_event:
        put(data, "flags", KVM_VCPU_EVENTS.get(data, "flags") | KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
        put(data, "triple_fault.pending", int(state.triple_fault))
    return data


def _fetch(vcpu: Vcpu) -> None:
    """Take over what only whoever executes the guest knows."""
    mirror = vcpu.mirror
    if mirror is not None and mirror.events_ahead:
        mirror.fetch_events()


def unpack(vcpu: Vcpu, data: bytes) -> None:
    """Take ``kvm_vcpu_events`` over.

    Raises:
        KvmError: EINVAL unknown flags, the payload's without its capability, a vector that is no
            exception's: nothing has changed. System management mode, or the triple fault's flag
            without its capability: everything before these has changed (6.12).
    """
    flags = KVM_VCPU_EVENTS.get(data, "flags")
    exception = _exception(vcpu, data, flags)
    _fetch(vcpu)
    smm = ("smi.smm", "smi.pending")
    entered = flags & KVM_VCPUEVENT_VALID_SMM and any(KVM_VCPU_EVENTS.get(data, n) for n in smm)
    if entered and vcpu.mp_state == caps.KVM_MP_STATE_INIT_RECEIVED:
        raise KvmError(EINVAL, "an INIT has been received")
    state = events.of(vcpu)
    state.settle_nmis()
    state.exception = exception
    try:
        _unpack_others(vcpu, state, data, flags)
    finally:
        arm(vcpu)


def _exception(vcpu: Vcpu, data: bytes, flags: int) -> QueuedException:
    """The exception, as far as the flags make it valid."""
    get = KVM_VCPU_EVENTS.get
    if flags & ~KNOWN_FLAGS:
        raise KvmError(EINVAL, f"flags {flags:#x} of kvm_vcpu_events")
    exception = QueuedException(
        get(data, "exception.nr"),
        bool(get(data, "exception.pending")),
        bool(get(data, "exception.injected")),
        bool(get(data, "exception.has_error_code")),
        get(data, "exception.error_code"),
        bool(get(data, "exception_has_payload")),
        get(data, "exception_payload"),
    )
    if not flags & KVM_VCPUEVENT_VALID_PAYLOAD:
        exception.pending = exception.has_payload = False
    elif not capabilities.of(vcpu.vm).exception_payload:
        raise KvmError(EINVAL, "KVM_CAP_EXCEPTION_PAYLOAD is off")
    elif exception.pending:
        exception.injected = False
    else:
        exception.has_payload = False
    vector = exception.vector
    if (exception.injected or exception.pending) and (vector > 31 or vector == NMI_VECTOR):
        raise KvmError(EINVAL, f"vector {vector} is no exception")
    return exception


def _unpack_others(vcpu: Vcpu, state: Events, data: bytes, flags: int) -> None:
    """Everything but the exception, in the kernel's order."""
    get = KVM_VCPU_EVENTS.get
    in_kernel_apic = vcpu.vm.irqchip
    state.interrupt = bool(get(data, "interrupt.injected"))
    state.interrupt_nr = get(data, "interrupt.nr")
    state.interrupt_soft = bool(get(data, "interrupt.soft"))
    if flags & KVM_VCPUEVENT_VALID_SHADOW:
        state.shadow = get(data, "interrupt.shadow") & 3
    state.nmi_injected = bool(get(data, "nmi.injected"))
    if flags & KVM_VCPUEVENT_VALID_NMI_PENDING:
        state.nmi_pending = get(data, "nmi.pending")
    state.nmi_masked = bool(get(data, "nmi.masked"))
    if flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR and in_kernel_apic:
        state.sipi_vector = get(data, "sipi_vector")
    if flags & KVM_VCPUEVENT_VALID_SMM:
        if any(get(data, f"smi.{name}") for name in ("smm", "pending", "smm_inside_nmi")):
            raise KvmError(EINVAL, "no system management mode")
        if in_kernel_apic:
            state.latched_init = bool(get(data, "smi.latched_init"))
    if flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        if not capabilities.of(vcpu.vm).triple_fault_event:
            raise KvmError(EINVAL, "KVM_CAP_X86_TRIPLE_FAULT_EVENT is off")
        state.triple_fault = bool(get(data, "triple_fault.pending"))


def arm(vcpu: Vcpu) -> None:
    """Make the next entry look at the events, if there are any."""
    waiting = events.of(vcpu).waiting
    if waiting or vcpu.debug is not None:
        debug.of(vcpu).queued = waiting


@handles(VcpuFile, KVM_GET_VCPU_EVENTS)
def get_vcpu_events(vcpu: Vcpu, call: Call) -> int:
    """Copy the events out."""
    call.write(pack(vcpu))
    return 0


@handles(VcpuFile, KVM_SET_VCPU_EVENTS)
def set_vcpu_events(vcpu: Vcpu, call: Call) -> int:
    """Take events over."""
    unpack(vcpu, call.read(KVM_VCPU_EVENTS.size_bytes))
    return 0
