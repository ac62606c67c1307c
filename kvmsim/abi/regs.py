"""Register state of a vCPU as structures: ``kvm_sregs``, ``kvm_fpu``, ``kvm_vcpu_events`` and kin.

Members of inner structures are named with a dot, as C reaches them: ``cs.base``.
"""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
SEGMENT_BYTES: Final = 24
_SEGMENT = {
    "base": (0, "u64"),
    "limit": (8, "u32"),
    "selector": (12, "u16"),
    "type": (14, "u8"),
    "present": (15, "u8"),
    "dpl": (16, "u8"),
    "db": (17, "u8"),
    "s": (18, "u8"),
    "l": (19, "u8"),
    "g": (20, "u8"),
    "avl": (21, "u8"),
    "unusable": (22, "u8"),
}
_COMMON = {
    **{
        f"{segment}.{name}": Field(SEGMENT_BYTES * index + offset, ctype)
        for index, segment in enumerate(SEGMENTS)
        for name, (offset, ctype) in _SEGMENT.items()
    },
    "gdt.base": Field(192, "u64"),
    "gdt.limit": Field(200, "u16"),
    "idt.base": Field(208, "u64"),
    "idt.limit": Field(216, "u16"),
    "cr0": Field(224, "u64"),
    "cr2": Field(232, "u64"),
    "cr3": Field(240, "u64"),
    "cr4": Field(248, "u64"),
    "cr8": Field(256, "u64"),
    "efer": Field(264, "u64"),
    "apic_base": Field(272, "u64"),
}
#: What ``kvm_sregs`` and ``kvm_sregs2`` have in common, in bytes.
SREGS_COMMON_BYTES: Final = 280

KVM_SREGS: Final = Layout("kvm_sregs", 312, {**_COMMON, "interrupt_bitmap": Field(280, "u64", 4)})
KVM_SREGS2: Final = Layout(
    "kvm_sregs2", 320, {**_COMMON, "flags": Field(280, "u64"), "pdptrs": Field(288, "u64", 4)}
)
KVM_SREGS2_FLAGS_PDPTRS_VALID: Final = 1

KVM_FPU: Final = Layout(
    "kvm_fpu",
    416,
    {
        "fpr": Field(0, "u8", 128),
        "fcw": Field(128, "u16"),
        "fsw": Field(130, "u16"),
        "ftwx": Field(132, "u8"),
        "last_opcode": Field(134, "u16"),
        "last_ip": Field(136, "u64"),
        "last_dp": Field(144, "u64"),
        "xmm": Field(152, "u8", 256),
        "mxcsr": Field(408, "u32"),
    },
)
KVM_XSAVE: Final = Layout("kvm_xsave", 4096, {"region": Field(0, "u32", 1024)})

KVM_MAX_XCRS: Final = 16
KVM_XCRS: Final = Layout(
    "kvm_xcrs",
    392,
    {
        "nr_xcrs": Field(0, "u32"),
        "flags": Field(4, "u32"),
        "xcrs": Field(8, "u64", 32),
    },
)

KVM_LAPIC_STATE: Final = Layout("kvm_lapic_state", 1024, {"regs": Field(0, "u8", 1024)})

KVM_VCPU_EVENTS: Final = Layout(
    "kvm_vcpu_events",
    64,
    {
        "exception.injected": Field(0, "u8"),
        "exception.nr": Field(1, "u8"),
        "exception.has_error_code": Field(2, "u8"),
        "exception.pending": Field(3, "u8"),
        "exception.error_code": Field(4, "u32"),
        "interrupt.injected": Field(8, "u8"),
        "interrupt.nr": Field(9, "u8"),
        "interrupt.soft": Field(10, "u8"),
        "interrupt.shadow": Field(11, "u8"),
        "nmi.injected": Field(12, "u8"),
        "nmi.pending": Field(13, "u8"),
        "nmi.masked": Field(14, "u8"),
        "sipi_vector": Field(16, "u32"),
        "flags": Field(20, "u32"),
        "smi.smm": Field(24, "u8"),
        "smi.pending": Field(25, "u8"),
        "smi.smm_inside_nmi": Field(26, "u8"),
        "smi.latched_init": Field(27, "u8"),
        "triple_fault.pending": Field(28, "u8"),
        "exception_has_payload": Field(55, "u8"),
        "exception_payload": Field(56, "u64"),
    },
)
KVM_VCPUEVENT_VALID_NMI_PENDING: Final = 0x1
KVM_VCPUEVENT_VALID_SIPI_VECTOR: Final = 0x2
KVM_VCPUEVENT_VALID_SHADOW: Final = 0x4
KVM_VCPUEVENT_VALID_SMM: Final = 0x8
KVM_VCPUEVENT_VALID_PAYLOAD: Final = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Final = 0x20

KVM_INTERRUPT: Final = Layout("kvm_interrupt", 4, {"irq": Field(0, "u32")})
KVM_NR_INTERRUPTS: Final = 256
KVM_SIGNAL_MASK: Final = Layout("kvm_signal_mask", 4, {"len": Field(0, "u32")})

KVM_TRANSLATION: Final = Layout(
    "kvm_translation",
    24,
    {
        "linear_address": Field(0, "u64"),
        "physical_address": Field(8, "u64"),
        "valid": Field(16, "u8"),
        "writeable": Field(17, "u8"),
        "usermode": Field(18, "u8"),
    },
)

KVM_X86_MCE: Final = Layout(
    "kvm_x86_mce",
    64,
    {
        "status": Field(0, "u64"),
        "addr": Field(8, "u64"),
        "misc": Field(16, "u64"),
        "mcg_status": Field(24, "u64"),
        "bank": Field(32, "u8"),
    },
)
KVM_TPR_ACCESS_CTL: Final = Layout(
    "kvm_tpr_access_ctl", 40, {"enabled": Field(0, "u32"), "flags": Field(4, "u32")}
)
KVM_VAPIC_ADDR: Final = Layout("kvm_vapic_addr", 8, {"vapic_addr": Field(0, "u64")})

# Control register and EFER bits the rules of this package look at.
CR0_PE: Final = 1 << 0
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_UMIP: Final = 1 << 11
CR4_LA57: Final = 1 << 12
CR4_VMXE: Final = 1 << 13
CR4_FSGSBASE: Final = 1 << 16
CR4_PCIDE: Final = 1 << 17
CR4_OSXSAVE: Final = 1 << 18
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
CR4_PKE: Final = 1 << 22
#: VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT: every processor here has them.
CR4_ALWAYS: Final = 0x7FF
EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11
EFER_FFXSR: Final = 1 << 14
RFLAGS_IF: Final = 1 << 9
