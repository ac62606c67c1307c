"""CPUID leaves and feature bits, as far as KVM or its clients look at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Paravirtual leaves: "KVMKVMKVM" and its features.
KVM_CPUID_SIGNATURE: Final = 0x40000000
KVM_CPUID_FEATURES: Final = 0x40000001
KVM_SIGNATURE: Final = b"KVMKVMKVM\0\0\0"

#: By bit; "-" is no feature of a guest's.
_LEAF_1_EDX: Final = (
    *("fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "-", "sep", "mtrr"),
    *("pge", "mca", "cmov", "pat", "pse36", "-", "clflush", "-", "-", "-", "mmx", "fxsr"),
    *("sse", "sse2", "ss", "ht"),
)
#: Feature -> (leaf, register, bit); index 0.
FEATURES: Final[Mapping[str, tuple[int, str, int]]] = {
    **{name: (1, "edx", bit) for bit, name in enumerate(_LEAF_1_EDX) if name != "-"},
    "pni": (1, "ecx", 0),
    "pclmulqdq": (1, "ecx", 1),
    "ssse3": (1, "ecx", 9),
    "fma": (1, "ecx", 12),
    "cx16": (1, "ecx", 13),
    "pdcm": (1, "ecx", 15),
    "pcid": (1, "ecx", 17),
    "sse4_1": (1, "ecx", 19),
    "sse4_2": (1, "ecx", 20),
    "x2apic": (1, "ecx", 21),
    "movbe": (1, "ecx", 22),
    "popcnt": (1, "ecx", 23),
    "tsc_deadline_timer": (1, "ecx", 24),
    "aes": (1, "ecx", 25),
    "xsave": (1, "ecx", 26),
    "osxsave": (1, "ecx", 27),
    "avx": (1, "ecx", 28),
    "f16c": (1, "ecx", 29),
    "rdrand": (1, "ecx", 30),
    "hypervisor": (1, "ecx", 31),
    "fsgsbase": (7, "ebx", 0),
    "tsc_adjust": (7, "ebx", 1),
    "bmi1": (7, "ebx", 3),
    "avx2": (7, "ebx", 5),
    "smep": (7, "ebx", 7),
    "bmi2": (7, "ebx", 8),
    "erms": (7, "ebx", 9),
    "invpcid": (7, "ebx", 10),
    "rtm": (7, "ebx", 11),
    "rdseed": (7, "ebx", 18),
    "adx": (7, "ebx", 19),
    "smap": (7, "ebx", 20),
    "clflushopt": (7, "ebx", 23),
    "clwb": (7, "ebx", 24),
    "sha_ni": (7, "ebx", 29),
    "umip": (7, "ecx", 2),
    "rdpid": (7, "ecx", 22),
    "bus_lock_detect": (7, "ecx", 24),
    "fsrm": (7, "edx", 4),
    "spec_ctrl": (7, "edx", 26),
    "intel_stibp": (7, "edx", 27),
    "arch_capabilities": (7, "edx", 29),
    "spec_ctrl_ssbd": (7, "edx", 31),
    "lahf_lm": (0x80000001, "ecx", 0),
    "cmp_legacy": (0x80000001, "ecx", 1),
    "cr8_legacy": (0x80000001, "ecx", 4),
    "abm": (0x80000001, "ecx", 5),
    "sse4a": (0x80000001, "ecx", 6),
    "misalignsse": (0x80000001, "ecx", 7),
    "3dnowprefetch": (0x80000001, "ecx", 8),
    "topoext": (0x80000001, "ecx", 22),
    "syscall": (0x80000001, "edx", 11),
    "nx": (0x80000001, "edx", 20),
    "mmxext": (0x80000001, "edx", 22),
    "fxsr_opt": (0x80000001, "edx", 25),
    "pdpe1gb": (0x80000001, "edx", 26),
    "rdtscp": (0x80000001, "edx", 27),
    "lm": (0x80000001, "edx", 29),
    "constant_tsc": (0x80000007, "edx", 8),
    "clzero": (0x80000008, "ebx", 0),
    "xsaveerptr": (0x80000008, "ebx", 2),
    "wbnoinvd": (0x80000008, "ebx", 9),
    "amd_ibpb": (0x80000008, "ebx", 12),
    "amd_ibrs": (0x80000008, "ebx", 14),
    "amd_stibp": (0x80000008, "ebx", 15),
    "amd_ssbd": (0x80000008, "ebx", 24),
    "null_sel_clr_base": (0x80000021, "eax", 6),
    "lfence_rdtsc": (0x80000021, "eax", 2),
}

#: What every 64-bit server processor of this century's second decade has, as far as guests here
#: execute it: no instruction with a VEX prefix (AVX, FMA, F16C, BMI), no SHA, INVPCID or RDPID, and
#: neither process-context identifiers nor UMIP. XSAVE keeps the registers of AVX all the same.
COMMON_FEATURES: Final = (
    *("fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr"),
    *("pge", "mca", "cmov", "pat", "pse36", "clflush", "mmx", "fxsr", "sse", "sse2"),
    *("pni", "pclmulqdq", "ssse3", "cx16", "sse4_1", "sse4_2", "x2apic"),
    *("movbe", "popcnt", "tsc_deadline_timer", "aes", "xsave", "rdrand"),
    *("hypervisor", "fsgsbase", "tsc_adjust", "smep", "erms"),
    *("rdseed", "adx", "smap", "clflushopt", "clwb"),
    *("fsrm", "arch_capabilities", "lahf_lm", "abm", "3dnowprefetch", "syscall", "nx"),
    *("pdpe1gb", "rdtscp", "lm", "constant_tsc"),
    # KVM shows what controls speculation in both vendors' ways (Linux 6.12 cpuid.c).
    *("spec_ctrl", "intel_stibp", "spec_ctrl_ssbd", "amd_ibpb", "amd_ibrs", "amd_stibp"),
    "amd_ssbd",
)
VENDOR_FEATURES: Final[Mapping[str, tuple[str, ...]]] = {
    "amd": (
        *("cmp_legacy", "cr8_legacy", "sse4a", "misalignsse", "topoext", "mmxext", "fxsr_opt"),
        *("wbnoinvd", "null_sel_clr_base", "lfence_rdtsc"),
    ),
    "intel": ("ss",),
}
#: Bits AMD repeats from leaf 1 EDX in leaf 0x80000001 EDX.
AMD_REPEATED_EDX: Final = 0x0183F3FF

#: CLOCKSOURCE NOP_IO_DELAY CLOCKSOURCE2 ASYNC_PF STEAL_TIME PV_EOI PV_UNHALT PV_TLB_FLUSH
#: ASYNC_PF_VMEXIT PV_SEND_IPI POLL_CONTROL PV_SCHED_YIELD ASYNC_PF_INT, CLOCKSOURCE_STABLE.
KVM_FEATURES: Final = 0x01007EFB
