"""Model-specific registers: numbers, and the bits that rules look at."""

from __future__ import annotations

from typing import Final

IA32_TSC: Final = 0x10
KVM_WALL_CLOCK: Final = 0x11
KVM_SYSTEM_TIME: Final = 0x12
PLATFORM_ID: Final = 0x17
IA32_APICBASE: Final = 0x1B
EBL_CR_POWERON: Final = 0x2A
SMI_COUNT: Final = 0x34
IA32_FEAT_CTL: Final = 0x3A
IA32_TSC_ADJUST: Final = 0x3B
IA32_SPEC_CTRL: Final = 0x48
IA32_PRED_CMD: Final = 0x49
IA32_UCODE_WRITE: Final = 0x79
IA32_UCODE_REV: Final = 0x8B
PLATFORM_INFO: Final = 0xCE
MTRRCAP: Final = 0xFE
IA32_ARCH_CAPABILITIES: Final = 0x10A
MISC_FEATURES_ENABLES: Final = 0x140
IA32_SYSENTER_CS: Final = 0x174
IA32_SYSENTER_ESP: Final = 0x175
IA32_SYSENTER_EIP: Final = 0x176
IA32_MCG_CAP: Final = 0x179
IA32_MCG_STATUS: Final = 0x17A
IA32_MCG_CTL: Final = 0x17B
IA32_MCG_EXT_CTL: Final = 0x4D0
IA32_MISC_ENABLE: Final = 0x1A0
IA32_DEBUGCTL: Final = 0x1D9
LAST_BRANCH: Final = (0x1DB, 0x1DC, 0x1DD, 0x1DE)
IA32_POWER_CTL: Final = 0x1FC
MTRR_VARIABLE: Final = range(0x200, 0x210)
MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
IA32_CR_PAT: Final = 0x277
IA32_MC0_CTL2: Final = 0x280
MTRR_DEF_TYPE: Final = 0x2FF
IA32_PERF_CAPABILITIES: Final = 0x345
IA32_MC0_CTL: Final = 0x400
IA32_TSC_DEADLINE: Final = 0x6E0
X2APIC_FIRST: Final = 0x800
X2APIC_END: Final = 0x900
IA32_XSS: Final = 0xDA0
KVM_WALL_CLOCK_NEW: Final = 0x4B564D00
KVM_SYSTEM_TIME_NEW: Final = 0x4B564D01
KVM_ASYNC_PF_EN: Final = 0x4B564D02
KVM_STEAL_TIME: Final = 0x4B564D03
KVM_PV_EOI_EN: Final = 0x4B564D04
KVM_POLL_CONTROL: Final = 0x4B564D05
KVM_ASYNC_PF_INT: Final = 0x4B564D06
KVM_ASYNC_PF_ACK: Final = 0x4B564D07
EFER: Final = 0xC0000080
STAR: Final = 0xC0000081
LSTAR: Final = 0xC0000082
CSTAR: Final = 0xC0000083
SYSCALL_MASK: Final = 0xC0000084
FS_BASE: Final = 0xC0000100
GS_BASE: Final = 0xC0000101
KERNEL_GS_BASE: Final = 0xC0000102
TSC_AUX: Final = 0xC0000103
AMD_SYSCFG: Final = 0xC0010010
AMD_HWCR: Final = 0xC0010015
AMD_VM_CR: Final = 0xC0010114
AMD_VM_HSAVE_PA: Final = 0xC0010117
AMD_VIRT_SPEC_CTRL: Final = 0xC001011F
AMD_DE_CFG: Final = 0xC0011029

MCG_CTL_P: Final = 1 << 8
MCG_CMCI_P: Final = 1 << 10
MCG_SER_P: Final = 1 << 24
MCG_LMCE_P: Final = 1 << 27
FEAT_CTL_LOCKED: Final = 1 << 0
FEAT_CTL_LMCE: Final = 1 << 20
"""Of IA32_FEAT_CTL: no more changes; machine checks may be for one processor alone."""
MCI_STATUS_VAL: Final = 1 << 63
MCI_STATUS_OVER: Final = 1 << 62
MCI_STATUS_UC: Final = 1 << 61
MCG_STATUS_MCIP: Final = 1 << 2
"""Bits of the machine check registers."""

#: Registers of old processors that old guests read: a constant, and no write.
READ_ONLY: Final = {
    **dict.fromkeys((0x0, 0x1), 0),  # P5 machine checks
    PLATFORM_ID: 0,
    EBL_CR_POWERON: 0,
    0x2C: 1 << 24,  # EBC_FREQUENCY_ID
    0xCD: 3,  # FSB_FREQ
    MTRRCAP: 0x508,
    0x198: 4 << 40 | 1000,  # IA32_PERF_STATUS
    0x199: 0,  # IA32_PERF_CTL
    **dict.fromkeys((0x606, 0x611, 0x619, 0x639, 0x641), 0),  # running average power limit
    AMD_SYSCFG: 0,
    0xC0010055: 0,  # INT_PENDING_MSG
    **dict.fromkeys((0xC0010112, 0xC0010113), 0),  # TSEG
}
#: The same, but writes are accepted without effect.
WRITES_IGNORED: Final = {
    **dict.fromkeys((0xC1, 0xC2, 0x186, 0x187), 0),  # P6 counters
    0x11E: 0xBE702111,  # BBL_CR_CTL3
    **dict.fromkeys(range(0xC0010000, 0xC0010008), 0),  # K7 counters
    0xC001001B: 0x20000000,  # K7_CLK_CTL
    **dict.fromkeys((0xC001001F, 0xC0011022, 0xC0011023, 0xC001102A, 0xC001102C), 0),
}
#: Microcode updates and commands to predictors: accepted without effect, and cannot be read.
WRITE_ONLY: Final = (IA32_UCODE_WRITE, 0xC0010020, IA32_PRED_CMD)
MMIO_CONF_BASE: Final = 0xC0010058

PAT_RESET: Final = 0x0007040600070406
MISC_ENABLE_FAST_STRING: Final = 1
SPEC_CTRL_BITS: Final = 0x7
"""IBRS, STIBP, SSBD."""
PRED_CMD_IBPB: Final = 1
MISC_ENABLE_MWAIT: Final = 1 << 18
PLATFORM_INFO_CPUID_FAULT: Final = 1 << 31
ARCH_CAPABILITIES_HOST: Final = 0x6B
"""RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, MDS_NO, PSCHANGE_MC_NO: what a host here is free of."""

HWCR_KEPT: Final = 1 << 18 | 1 << 24
HWCR_IGNORED: Final = 1 << 3 | 1 << 6 | 1 << 8

#: KVM_GET_MSR_INDEX_LIST, in the kernel's order: the processor's, then KVM's own.
_SAVED_COMMON: Final = (
    *(IA32_SYSENTER_CS, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP, STAR, CSTAR, KERNEL_GS_BASE),
    *(SYSCALL_MASK, LSTAR, IA32_TSC, IA32_CR_PAT),
)
_EMULATED_BEFORE_LMCE: Final = (
    *(KVM_WALL_CLOCK, KVM_SYSTEM_TIME, KVM_WALL_CLOCK_NEW, KVM_SYSTEM_TIME_NEW),
    *(KVM_ASYNC_PF_EN, KVM_ASYNC_PF_INT, KVM_ASYNC_PF_ACK, KVM_STEAL_TIME, KVM_PV_EOI_EN),
    *(IA32_TSC_ADJUST, IA32_TSC_DEADLINE, IA32_ARCH_CAPABILITIES, IA32_PERF_CAPABILITIES),
    *(IA32_MISC_ENABLE, IA32_MCG_STATUS, IA32_MCG_CTL),
)
_EMULATED_AFTER_LMCE: Final = (
    *(SMI_COUNT, PLATFORM_INFO),
    *(MISC_FEATURES_ENABLES, IA32_POWER_CTL, IA32_UCODE_REV, KVM_POLL_CONTROL),
)
SAVED: Final = {
    "amd": (
        *_SAVED_COMMON,
        *(AMD_VM_HSAVE_PA, TSC_AUX, IA32_SPEC_CTRL, IA32_DEBUGCTL, *LAST_BRANCH),
        *_EMULATED_BEFORE_LMCE,
        *_EMULATED_AFTER_LMCE,
        *(AMD_VIRT_SPEC_CTRL, AMD_HWCR),
    ),
    "intel": (
        *_SAVED_COMMON,
        *(IA32_FEAT_CTL, TSC_AUX, IA32_SPEC_CTRL, IA32_DEBUGCTL, *LAST_BRANCH),
        *_EMULATED_BEFORE_LMCE,
        IA32_MCG_EXT_CTL,
        *_EMULATED_AFTER_LMCE,
    ),
}
#: KVM_GET_MSR_FEATURE_INDEX_LIST: vendor -> number -> what the host has.
FEATURES: Final = {
    "amd": {
        AMD_DE_CFG: 1 << 1,  # LFENCE is dispatch serialising
        IA32_UCODE_REV: 0x01000065,
        IA32_ARCH_CAPABILITIES: ARCH_CAPABILITIES_HOST,
        IA32_PERF_CAPABILITIES: 0,
        PLATFORM_INFO: PLATFORM_INFO_CPUID_FAULT,
    },
    "intel": {
        IA32_UCODE_REV: 0x1_0000_0000,
        IA32_ARCH_CAPABILITIES: ARCH_CAPABILITIES_HOST,
        IA32_PERF_CAPABILITIES: 0,
        PLATFORM_INFO: PLATFORM_INFO_CPUID_FAULT,
    },
}
