"""The local APIC of a vCPU, where it is in the kernel, and events user space sends a vCPU."""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOTTY, ENXIO
from struct import pack_into, unpack_from
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
from kvmsim.kvm import events, irqchip, memslots, vcpu_events
from kvmsim.kvm.dispatch import VcpuFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

APIC_ID = 0x20
APIC_LVR = 0x30
APIC_TASKPRI = 0x80
APIC_DFR = 0xE0
APIC_SPIV = 0xF0
APIC_SPIV_ENABLED = 1 << 8
APIC_IRR = 0x200
APIC_LVT0 = 0x350
#: Timer, thermal, performance counter, LINT0, LINT1, error.
LVT_REGISTERS = (0x320, 0x330, 0x340, APIC_LVT0, 0x360, 0x370)
LVT_MASKED = 1 << 16
VERSION = 0x00050014
DELIVERY_EXTINT = 0x700
X2APIC_ENABLE = 1 << 10


class Lapic:
    """One local APIC.

    Args:
        vcpu: whose.

    Attributes:
        regs: the register page, first KiB.
        vapic_addr: guest address of the task priority the VMM shares, 0 without.
        tpr_reporting: accesses to the task priority are exits.
        external: vector a split irqchip's user space has queued; None: none.
    """

    __slots__ = ("_vcpu", "external", "regs", "tpr_reporting", "vapic_addr")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.vapic_addr = 0
        self.tpr_reporting = False
        self.external: int | None = None
        self.reset()

    def reset(self) -> None:
        """Registers after power-on; LINT0 of the boot CPU takes the PIC's interrupts."""
        regs = self.regs = bytearray(KVM_LAPIC_STATE.size_bytes)
        self._put(APIC_ID, (self._vcpu.id & 0xFF) << 24)
        self._put(APIC_LVR, VERSION)
        self._put(APIC_DFR, 0xFFFF_FFFF)
        self._put(APIC_SPIV, 0xFF)
        for register in LVT_REGISTERS:
            self._put(register, LVT_MASKED)
        if self._vcpu.id == irqchip.of(self._vcpu.vm).boot_cpu:
            pack_into("<I", regs, APIC_LVT0, DELIVERY_EXTINT)

    @property
    def enabled(self) -> bool:
        """Whether the guest switched it on, by software; off after reset."""
        return bool(self.get(APIC_SPIV) & APIC_SPIV_ENABLED)

    def request(self, vector: int) -> None:
        """An interrupt arrives."""
        offset = APIC_IRR + vector // 32 * 16
        self._put(offset, self.get(offset) | 1 << vector % 32)

    def get(self, register: int) -> int:
        """Read a register by its offset."""
        value: int = unpack_from("<I", self.regs, register)[0]
        return value

    def _put(self, register: int, value: int) -> None:
        pack_into("<I", self.regs, register, value)


def of(vcpu: Vcpu) -> Lapic:
    """The local APIC of a vCPU."""
    return state_of(vcpu, Lapic)


def _in_kernel(vcpu: Vcpu) -> Lapic:
    """The local APIC; KvmError EINVAL when user space has it."""
    if not vcpu.vm.irqchip:
        raise KvmError(EINVAL, "no local APIC in the kernel")
    return of(vcpu)


@handles(VcpuFile, KVM_GET_LAPIC)
def get_lapic(vcpu: Vcpu, call: Call) -> int:
    """Copy the register page out."""
    lapic = _in_kernel(vcpu)
    data = bytearray(lapic.regs)
    pack_into("<I", data, APIC_TASKPRI, vcpu.cr8 << 4)
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_LAPIC)
def set_lapic(vcpu: Vcpu, call: Call) -> int:
    """Take a register page over; in x2APIC mode its id must be the vCPU's."""
    lapic = _in_kernel(vcpu)
    data = bytearray(call.read(KVM_LAPIC_STATE.size_bytes))
    (apic_id,) = unpack_from("<I", data, APIC_ID)
    if vcpu.apic_base & X2APIC_ENABLE and apic_id not in {vcpu.id, vcpu.id << 24}:
        raise KvmError(EINVAL, f"x2APIC id {apic_id:#x}")
    pack_into("<I", data, APIC_LVR, VERSION)
    vcpu.cr8 = data[APIC_TASKPRI] >> 4
    lapic.regs = data
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
        return 0
    if irqchip.of(vcpu.vm).full:
        raise KvmError(ENXIO, "the PIC is in the kernel")
    lapic = of(vcpu)
    if lapic.external is not None:
        raise KvmError(EEXIST, "an interrupt is queued")
    lapic.external = vector
    vcpu.wake(call.now_ns)
    return 0


@handles(VcpuFile, KVM_NMI)
def nmi(vcpu: Vcpu, call: Call) -> int:
    """Queue a non-maskable interrupt; two at most are pending."""
    state = events.of(vcpu)
    state.nmi_pending += 1
    state.settle_nmis()
    vcpu_events.arm(vcpu)
    vcpu.wake(call.now_ns)
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
    of(vcpu).tpr_reporting = bool(KVM_TPR_ACCESS_CTL.get(data, "enabled"))
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_VAPIC_ADDR)
def set_vapic_addr(vcpu: Vcpu, call: Call) -> int:
    """Share the task priority with user space through guest memory."""
    _in_kernel(vcpu)
    address = KVM_VAPIC_ADDR.get(call.read(KVM_VAPIC_ADDR.size_bytes), "vapic_addr")
    if address and memslots.of(vcpu.vm).find(address) is None:
        raise KvmError(EINVAL, f"no guest memory at {address:#x}")
    of(vcpu).vapic_addr = address
    return 0
