"""Reading and setting local APICs, and events user space sends a vCPU."""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOTTY, ENXIO
from struct import unpack_from
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import (
    KVM_GET_LAPIC,
    KVM_INTERRUPT,
    KVM_NMI,
    KVM_SET_LAPIC,
    KVM_SET_VAPIC_ADDR,
    KVM_SMI,
    KVM_TPR_ACCESS_REPORTING,
)
from kvmsim.abi.regs import (
    KVM_INTERRUPT as INTERRUPT_STRUCT,
)
from kvmsim.abi.regs import (
    KVM_LAPIC_STATE,
    KVM_NR_INTERRUPTS,
    KVM_TPR_ACCESS_CTL,
    KVM_VAPIC_ADDR,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import capabilities, events, irqchip, lapic, memslots, vcpu_events
from kvmsim.kvm.dispatch import VcpuFile, handles

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.lapic import Lapic
    from kvmsim.kvm.vcpu import Vcpu


def _in_kernel(vcpu: Vcpu) -> Lapic:
    """The local APIC; KvmError EINVAL when user space has it."""
    if not vcpu.vm.irqchip:
        raise KvmError(EINVAL, "no local APIC in the kernel")
    return lapic.of(vcpu)


@handles(VcpuFile, KVM_GET_LAPIC)
def get_lapic(vcpu: Vcpu, call: Call) -> int:
    """Copy the register page out."""
    call.write(_in_kernel(vcpu).page(call.now_ns))
    return 0


@handles(VcpuFile, KVM_SET_LAPIC)
def set_lapic(vcpu: Vcpu, call: Call) -> int:
    """Take a register page over; an x2APIC's id must be the vCPU's where ids have 32 bits."""
    apic = _in_kernel(vcpu)
    data = call.read(KVM_LAPIC_STATE.size_bytes)
    wide = capabilities.of(vcpu.vm).x2apic_api & 1
    if apic.x2apic and wide and unpack_from("<I", data, lapic.ID)[0] != vcpu.id:
        raise KvmError(EINVAL, "id of an x2APIC")
    apic.load(data, call.now_ns)
    vcpu.kick(call.now_ns)
    return 0


@handles(VcpuFile, KVM_INTERRUPT)
def interrupt(vcpu: Vcpu, call: Call) -> int:
    """Queue an external interrupt for a vCPU whose PIC is in user space."""
    vector = INTERRUPT_STRUCT.get(call.read(INTERRUPT_STRUCT.size_bytes), "irq")
    if vector >= KVM_NR_INTERRUPTS:
        raise KvmError(EINVAL, f"vector {vector}")
    if not vcpu.vm.irqchip:
        events.of(vcpu).queue_interrupt(vector)
        vcpu_events.arm(vcpu)
        vcpu.ready_and_if &= ~1
        return 0
    if irqchip.of(vcpu.vm).full:
        raise KvmError(ENXIO, "the PIC is in the kernel")
    apic = lapic.of(vcpu)
    if apic.external is not None:
        raise KvmError(EEXIST, "an interrupt is queued")
    apic.external = vector
    vcpu.kick(call.now_ns)
    return 0


@handles(VcpuFile, KVM_NMI)
def nmi(vcpu: Vcpu, call: Call) -> int:
    """Queue a non-maskable interrupt; two at most are pending."""
    state = events.of(vcpu)
    state.nmi_pending += 1
    state.settle_nmis()
    vcpu_events.arm(vcpu)
    vcpu.kick(call.now_ns)
    return 0


@handles(VcpuFile, KVM_SMI)
def smi(vcpu: Vcpu, call: Call) -> int:
    """There is no system management mode."""
    del vcpu, call
    raise KvmError(ENOTTY, "no system management mode")


@handles(VcpuFile, KVM_TPR_ACCESS_REPORTING)
def tpr_access_reporting(vcpu: Vcpu, call: Call) -> int:
    """Ask for exits at accesses to the task priority."""
    data = call.read(KVM_TPR_ACCESS_CTL.size_bytes)
    if KVM_TPR_ACCESS_CTL.get(data, "flags"):
        raise KvmError(EINVAL, "flags of KVM_TPR_ACCESS_REPORTING")
    lapic.of(vcpu).tpr_reporting = bool(KVM_TPR_ACCESS_CTL.get(data, "enabled"))
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_VAPIC_ADDR)
def set_vapic_addr(vcpu: Vcpu, call: Call) -> int:
    """Share the task priority with user space through guest memory."""
    _in_kernel(vcpu)
    address = KVM_VAPIC_ADDR.get(call.read(KVM_VAPIC_ADDR.size_bytes), "vapic_addr")
    if address and memslots.of(vcpu.vm).find(address) is None:
        raise KvmError(EINVAL, f"no guest memory at {address:#x}")
    lapic.of(vcpu).vapic_addr = address
    return 0
