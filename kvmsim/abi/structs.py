"""Structures that ioctl arguments point at."""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

KVM_ENABLE_CAP: Final = Layout(
    "kvm_enable_cap",
    104,
    {
        "cap": Field(0, "u32"),
        "flags": Field(4, "u32"),
        "args": Field(8, "u64", 4),
        "pad": Field(40, "u8", 64),
    },
)

KVM_MP_STATE: Final = Layout("kvm_mp_state", 4, {"mp_state": Field(0, "u32")})

_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags"),
)
KVM_REGS: Final = Layout(
    "kvm_regs", 144, {name: Field(8 * index, "u64") for index, name in enumerate(_REGS)}
)

#: Header of the variable-length table; ``entries`` follow at offset 8.
KVM_CPUID2: Final = Layout("kvm_cpuid2", 8, {"nent": Field(0, "u32"), "padding": Field(4, "u32")})

KVM_CPUID_ENTRY2: Final = Layout(
    "kvm_cpuid_entry2",
    40,
    {
        "function": Field(0, "u32"),
        "index": Field(4, "u32"),
        "flags": Field(8, "u32"),
        "eax": Field(12, "u32"),
        "ebx": Field(16, "u32"),
        "ecx": Field(20, "u32"),
        "edx": Field(24, "u32"),
        "padding": Field(28, "u32", 3),
    },
)
#: The entry of the older KVM_SET_CPUID.
KVM_CPUID_ENTRY: Final = Layout(
    "kvm_cpuid_entry",
    24,
    {
        "function": Field(0, "u32"),
        "eax": Field(4, "u32"),
        "ebx": Field(8, "u32"),
        "ecx": Field(12, "u32"),
        "edx": Field(16, "u32"),
        "padding": Field(20, "u32"),
    },
)
KVM_MAX_CPUID_ENTRIES: Final = 256
KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1  # the kernel's own spelling

KVM_DEVICE_ATTR: Final = Layout(
    "kvm_device_attr",
    24,
    {
        "flags": Field(0, "u32"),
        "group": Field(4, "u32"),
        "attr": Field(8, "u64"),
        "addr": Field(16, "u64"),
    },
)
KVM_X86_GRP_SYSTEM: Final = 0
KVM_X86_XCOMP_GUEST_SUPP: Final = 0
KVM_X86_GRP_SEV: Final = 1
KVM_X86_SEV_VMSA_FEATURES: Final = 0

#: Header of the variable-length table; ``entries`` follow at offset 8.
KVM_MSRS: Final = Layout("kvm_msrs", 8, {"nmsrs": Field(0, "u32"), "pad": Field(4, "u32")})
KVM_MSR_ENTRY: Final = Layout(
    "kvm_msr_entry",
    16,
    {"index": Field(0, "u32"), "reserved": Field(4, "u32"), "data": Field(8, "u64")},
)
MAX_IO_MSRS: Final = 256
#: Header of the variable-length table; ``indices`` follow at offset 4.
KVM_MSR_LIST: Final = Layout("kvm_msr_list", 4, {"nmsrs": Field(0, "u32")})

KVM_MSR_FILTER_MAX_RANGES: Final = 16
KVM_MSR_FILTER_MAX_BITMAP_SIZE: Final = 0x600
KVM_MSR_FILTER_RANGE: Final = Layout(
    "kvm_msr_filter_range",
    24,
    {
        "flags": Field(0, "u32"),
        "nmsrs": Field(4, "u32"),
        "base": Field(8, "u32"),
        "bitmap": Field(16, "u64"),
    },
)
#: ``ranges`` follow at offset 8.
KVM_MSR_FILTER: Final = Layout("kvm_msr_filter", 392, {"flags": Field(0, "u32")})
KVM_MSR_FILTER_READ: Final = 1 << 0
KVM_MSR_FILTER_WRITE: Final = 1 << 1
KVM_MSR_FILTER_DEFAULT_DENY: Final = 1 << 0

#: Header of the variable-length table; ``events`` follow at offset 32.
KVM_PMU_EVENT_FILTER: Final = Layout(
    "kvm_pmu_event_filter",
    32,
    {
        "action": Field(0, "u32"),
        "nevents": Field(4, "u32"),
        "fixed_counter_bitmap": Field(8, "u32"),
        "flags": Field(12, "u32"),
    },
)
KVM_PMU_EVENT_FILTER_MAX_EVENTS: Final = 300
MSR_IA32_DEBUGCTL: Final = 0x1D9

KVM_DEBUGREGS: Final = Layout(
    "kvm_debugregs",
    128,
    {
        "db": Field(0, "u64", 4),
        "dr6": Field(32, "u64"),
        "dr7": Field(40, "u64"),
        "flags": Field(48, "u64"),
    },
)

KVM_GUEST_DEBUG: Final = Layout(
    "kvm_guest_debug",
    72,
    {"control": Field(0, "u32"), "pad": Field(4, "u32"), "arch": Field(8, "u64", 8)},
)
KVM_GUESTDBG_ENABLE: Final = 0x1
KVM_GUESTDBG_SINGLESTEP: Final = 0x2
KVM_GUESTDBG_USE_SW_BP: Final = 0x10000
KVM_GUESTDBG_USE_HW_BP: Final = 0x20000
KVM_GUESTDBG_INJECT_DB: Final = 0x40000
KVM_GUESTDBG_INJECT_BP: Final = 0x80000
KVM_GUESTDBG_BLOCKIRQ: Final = 0x100000
