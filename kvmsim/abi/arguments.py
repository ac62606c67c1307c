"""What the third argument of each request points at, for tools that show it.

Requests without an entry take a number or nothing. A table whose entries follow its header is
listed by the header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmsim.abi import ioctls, irq, memory, regs, sev, structs
from kvmsim.abi.layout import Field, Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

_U64 = Layout("u64", 8, {"value": Field(0, "u64")})

#: Request number -> the structure.
ARGUMENTS: Final[Mapping[int, Layout]] = {
    ioctls.KVM_GET_MSR_INDEX_LIST: structs.KVM_MSR_LIST,
    ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST: structs.KVM_MSR_LIST,
    ioctls.KVM_GET_SUPPORTED_CPUID: structs.KVM_CPUID2,
    ioctls.KVM_GET_EMULATED_CPUID: structs.KVM_CPUID2,
    ioctls.KVM_GET_SUPPORTED_HV_CPUID: structs.KVM_CPUID2,
    ioctls.KVM_X86_GET_MCE_CAP_SUPPORTED: _U64,
    ioctls.KVM_GET_DEVICE_ATTR: structs.KVM_DEVICE_ATTR,
    ioctls.KVM_SET_DEVICE_ATTR: structs.KVM_DEVICE_ATTR,
    ioctls.KVM_HAS_DEVICE_ATTR: structs.KVM_DEVICE_ATTR,
    ioctls.KVM_GET_DIRTY_LOG: memory.KVM_DIRTY_LOG,
    ioctls.KVM_CLEAR_DIRTY_LOG: memory.KVM_CLEAR_DIRTY_LOG,
    ioctls.KVM_SET_USER_MEMORY_REGION: memory.KVM_USERSPACE_MEMORY_REGION,
    ioctls.KVM_SET_USER_MEMORY_REGION2: memory.KVM_USERSPACE_MEMORY_REGION2,
    ioctls.KVM_SET_IDENTITY_MAP_ADDR: _U64,
    ioctls.KVM_IRQ_LINE: irq.KVM_IRQ_LEVEL,
    ioctls.KVM_IRQ_LINE_STATUS: irq.KVM_IRQ_LEVEL,
    ioctls.KVM_GET_IRQCHIP: irq.KVM_IRQCHIP,
    ioctls.KVM_SET_IRQCHIP: irq.KVM_IRQCHIP,
    ioctls.KVM_CREATE_PIT2: irq.KVM_PIT_CONFIG,
    ioctls.KVM_GET_PIT: irq.KVM_PIT_STATE,
    ioctls.KVM_SET_PIT: irq.KVM_PIT_STATE,
    ioctls.KVM_GET_PIT2: irq.KVM_PIT_STATE2,
    ioctls.KVM_SET_PIT2: irq.KVM_PIT_STATE2,
    ioctls.KVM_REINJECT_CONTROL: irq.KVM_REINJECT_CONTROL,
    ioctls.KVM_REGISTER_COALESCED_MMIO: memory.KVM_COALESCED_MMIO_ZONE,
    ioctls.KVM_UNREGISTER_COALESCED_MMIO: memory.KVM_COALESCED_MMIO_ZONE,
    ioctls.KVM_SET_GSI_ROUTING: irq.KVM_IRQ_ROUTING,
    ioctls.KVM_IRQFD: irq.KVM_IRQFD,
    ioctls.KVM_IOEVENTFD: irq.KVM_IOEVENTFD,
    ioctls.KVM_SET_CLOCK: irq.KVM_CLOCK_DATA,
    ioctls.KVM_GET_CLOCK: irq.KVM_CLOCK_DATA,
    ioctls.KVM_SIGNAL_MSI: irq.KVM_MSI,
    ioctls.KVM_SET_PMU_EVENT_FILTER: structs.KVM_PMU_EVENT_FILTER,
    ioctls.KVM_MEMORY_ENCRYPT_OP: sev.KVM_SEV_CMD,
    ioctls.KVM_MEMORY_ENCRYPT_REG_REGION: memory.KVM_ENC_REGION,
    ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION: memory.KVM_ENC_REGION,
    ioctls.KVM_X86_SET_MSR_FILTER: structs.KVM_MSR_FILTER,
    ioctls.KVM_SET_MEMORY_ATTRIBUTES: memory.KVM_MEMORY_ATTRIBUTES,
    ioctls.KVM_CREATE_GUEST_MEMFD: memory.KVM_CREATE_GUEST_MEMFD,
    ioctls.KVM_CREATE_DEVICE: irq.KVM_CREATE_DEVICE,
    ioctls.KVM_ENABLE_CAP: structs.KVM_ENABLE_CAP,
    ioctls.KVM_GET_REGS: structs.KVM_REGS,
    ioctls.KVM_SET_REGS: structs.KVM_REGS,
    ioctls.KVM_GET_SREGS: regs.KVM_SREGS,
    ioctls.KVM_SET_SREGS: regs.KVM_SREGS,
    ioctls.KVM_GET_SREGS2: regs.KVM_SREGS2,
    ioctls.KVM_SET_SREGS2: regs.KVM_SREGS2,
    ioctls.KVM_TRANSLATE: regs.KVM_TRANSLATION,
    ioctls.KVM_INTERRUPT: regs.KVM_INTERRUPT,
    ioctls.KVM_GET_MSRS: structs.KVM_MSRS,
    ioctls.KVM_SET_MSRS: structs.KVM_MSRS,
    ioctls.KVM_SET_CPUID: structs.KVM_CPUID2,
    ioctls.KVM_SET_CPUID2: structs.KVM_CPUID2,
    ioctls.KVM_GET_CPUID2: structs.KVM_CPUID2,
    ioctls.KVM_SET_SIGNAL_MASK: regs.KVM_SIGNAL_MASK,
    ioctls.KVM_GET_FPU: regs.KVM_FPU,
    ioctls.KVM_SET_FPU: regs.KVM_FPU,
    ioctls.KVM_GET_LAPIC: regs.KVM_LAPIC_STATE,
    ioctls.KVM_SET_LAPIC: regs.KVM_LAPIC_STATE,
    ioctls.KVM_TPR_ACCESS_REPORTING: regs.KVM_TPR_ACCESS_CTL,
    ioctls.KVM_SET_VAPIC_ADDR: regs.KVM_VAPIC_ADDR,
    ioctls.KVM_GET_MP_STATE: structs.KVM_MP_STATE,
    ioctls.KVM_SET_MP_STATE: structs.KVM_MP_STATE,
    ioctls.KVM_SET_GUEST_DEBUG: structs.KVM_GUEST_DEBUG,
    ioctls.KVM_X86_SETUP_MCE: _U64,
    ioctls.KVM_X86_SET_MCE: regs.KVM_X86_MCE,
    ioctls.KVM_GET_VCPU_EVENTS: regs.KVM_VCPU_EVENTS,
    ioctls.KVM_SET_VCPU_EVENTS: regs.KVM_VCPU_EVENTS,
    ioctls.KVM_GET_DEBUGREGS: structs.KVM_DEBUGREGS,
    ioctls.KVM_SET_DEBUGREGS: structs.KVM_DEBUGREGS,
    ioctls.KVM_GET_XSAVE: regs.KVM_XSAVE,
    ioctls.KVM_SET_XSAVE: regs.KVM_XSAVE,
    ioctls.KVM_GET_XSAVE2: regs.KVM_XSAVE,
    ioctls.KVM_GET_XCRS: regs.KVM_XCRS,
    ioctls.KVM_SET_XCRS: regs.KVM_XCRS,
}
