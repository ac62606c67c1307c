"""What differs where the guest itself reads or writes a register.

User space may set what the guest finds; the guest may not change what describes its processor, and
has only what its CPUID shows. Linux 6.12 x86.c ``kvm_set_msr_common`` and ``kvm_get_msr_common``
with ``host_initiated`` false. Registers without a row here are the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmsim.abi import caps
from kvmsim.abi import cpuid as abi_cpuid
from kvmsim.abi import msrs as abi
from kvmsim.kvm import capabilities, cpuid, mce, msr_rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.msr_rules import Accept
    from kvmsim.kvm.vcpu import Vcpu

#: Of IA32_MISC_ENABLE: branch trace and PEBS unavailable, read only; performance monitoring, kept.
_MISC_ENABLE_FIXED = 1 << 11 | 1 << 12
_MISC_ENABLE_EMON = 1 << 7


def pv_has(vcpu: Vcpu, bit: int) -> bool:
    """Whether a guest has a paravirtual feature: all of them, unless its CPUID is enforced."""
    if not vcpu.enforces_pv_cpuid:
        return True
    return bool(cpuid.guest_register(vcpu, abi_cpuid.KVM_CPUID_FEATURES, "eax") >> bit & 1)


def _shows(leaf: int, register: str, bit: int, index: int = 0) -> Callable[[Vcpu], bool]:
    """A guest whose CPUID has a feature."""
    return lambda vcpu: bool(cpuid.guest_register(vcpu, leaf, register, index) >> bit & 1)


def _has_tsc_aux(vcpu: Vcpu) -> bool:
    rdtscp = cpuid.guest_register(vcpu, 0x80000001, "edx") >> 27
    return bool((rdtscp | cpuid.guest_register(vcpu, 7, "ecx") >> 22) & 1)


def _has_any(*features: str) -> Callable[[Vcpu], bool]:
    """A guest whose CPUID has one of some features."""
    shown = [_shows(*abi_cpuid.FEATURES[name]) for name in features]
    return lambda vcpu: any(one(vcpu) for one in shown)


def _sees_platform_info(vcpu: Vcpu) -> bool:
    return capabilities.of(vcpu.vm).platform_info


def _has_lmce_on(vcpu: Vcpu) -> bool:
    return bool(msr_rules.value_of(vcpu, abi.IA32_FEAT_CTL) & abi.FEAT_CTL_LMCE)


def _feature_control(vcpu: Vcpu, value: int) -> int | None:
    """Linux 6.12 vmx.c ``vmx_set_msr``: a locked register takes nothing from the guest."""
    locked = msr_rules.value_of(vcpu, abi.IA32_FEAT_CTL) & abi.FEAT_CTL_LOCKED
    lmce = abi.FEAT_CTL_LMCE if mce.of(vcpu).has(abi.MCG_LMCE_P) else 0
    return None if locked or value & ~(abi.FEAT_CTL_LOCKED | lmce) else value


def _refuse(vcpu: Vcpu, value: int) -> None:
    del vcpu, value


def _ignore(vcpu: Vcpu, value: int) -> int:
    del vcpu, value
    return msr_rules.IGNORED


def _misc_enable(vcpu: Vcpu, value: int) -> int | None:
    """Bits about performance monitoring stay as they are; MWAIT goes with SSE3, the quirk off."""
    old = msr_rules.value_of(vcpu, abi.IA32_MISC_ENABLE)
    quirk_off = capabilities.of(vcpu.vm).disabled_quirks & caps.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    fixed = _MISC_ENABLE_FIXED
    if quirk_off and not cpuid.guest_register(vcpu, 1, "ecx") & 1:
        fixed |= abi.MISC_ENABLE_MWAIT
    if (old ^ value) & fixed:
        return None
    return value & ~_MISC_ENABLE_EMON | old & _MISC_ENABLE_EMON


@dataclass(frozen=True, slots=True)
class GuestRule:
    """One register, as the guest has it.

    Attributes:
        has: whether a guest has it at all; None: every guest.
        reads: whether a guest that has it may read it.
        accept: like ``Rule.accept``; None: as for user space.
    """

    has: Callable[[Vcpu], bool] | None = None
    reads: Callable[[Vcpu], bool] | None = None
    accept: Accept | None = None


RULES: Final[dict[int, GuestRule]] = {
    abi.IA32_FEAT_CTL: GuestRule(accept=_feature_control),
    abi.IA32_MCG_EXT_CTL: GuestRule(has=_has_lmce_on),
    abi.IA32_ARCH_CAPABILITIES: GuestRule(has=_shows(7, "edx", 29), accept=_refuse),
    abi.IA32_SPEC_CTRL: GuestRule(has=_has_any("spec_ctrl", "amd_ibrs", "amd_stibp", "amd_ssbd")),
    abi.IA32_PRED_CMD: GuestRule(has=_has_any("spec_ctrl", "amd_ibpb")),
    abi.IA32_UCODE_REV: GuestRule(accept=_ignore),
    abi.PLATFORM_INFO: GuestRule(reads=_sees_platform_info, accept=_refuse),
    abi.SMI_COUNT: GuestRule(accept=_refuse),
    abi.IA32_MISC_ENABLE: GuestRule(accept=_misc_enable),
    abi.IA32_XSS: GuestRule(has=_shows(0xD, "eax", 3, 1)),
    abi.TSC_AUX: GuestRule(has=_has_tsc_aux),
    abi.AMD_VIRT_SPEC_CTRL: GuestRule(has=_shows(0x80000008, "ebx", 25)),
}

#: Register -> bit of the paravirtual feature that announces it, for user space as for the guest.
PARAVIRTUAL: Final = {
    abi.KVM_WALL_CLOCK: 0,
    abi.KVM_SYSTEM_TIME: 0,
    abi.KVM_WALL_CLOCK_NEW: 3,
    abi.KVM_SYSTEM_TIME_NEW: 3,
    abi.KVM_ASYNC_PF_EN: 4,
    abi.KVM_STEAL_TIME: 5,
    abi.KVM_PV_EOI_EN: 6,
    abi.KVM_POLL_CONTROL: 12,
    abi.KVM_ASYNC_PF_INT: 14,
    abi.KVM_ASYNC_PF_ACK: 14,
}


def may_read(vcpu: Vcpu, index: int) -> bool:
    """Whether the guest has a register and may read it."""
    rule = RULES.get(index)
    if rule is None:
        return True
    return not (rule.has and not rule.has(vcpu)) and not (rule.reads and not rule.reads(vcpu))


def accept(vcpu: Vcpu, index: int) -> Accept | None:
    """What decides about a value the guest writes; None: the rule for user space."""
    rule = RULES.get(index)
    if rule is None:
        return None
    return _refuse if rule.has is not None and not rule.has(vcpu) else rule.accept
