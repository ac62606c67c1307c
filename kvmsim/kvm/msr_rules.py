"""What each stored register holds after reset and takes from user space.

Linux 6.12 x86.c ``kvm_set_msr_common``, svm.c ``svm_set_msr``, vmx.c ``vmx_set_msr``. Values are
64 bits wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmsim.abi import msrs as abi
from kvmsim.kvm import cpuid, memslots
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.vcpu import Vcpu

    Accept = Callable[[Vcpu, int], int | None]


class Msrs:
    """The registers of one vCPU that are plain storage, as far as they were written.

    Attributes:
        values: number -> value.
        changed: numbers written since whoever executes the guest looked; it clears them.
    """

    __slots__ = ("changed", "values")

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.values: dict[int, int] = {}
        self.changed: set[int] = set()

    def keep(self, index: int, value: int) -> None:
        """Store a value."""
        self.values[index] = value
        self.changed.add(index)


def stored(vcpu: Vcpu, index: int) -> int:
    """What was written to a register, 0 if nothing."""
    return state_of(vcpu, Msrs).values.get(index, 0)


def value_of(vcpu: Vcpu, index: int) -> int:
    """What a register with a rule holds."""
    value = state_of(vcpu, Msrs).values.get(index)
    return RULES[index].reset if value is None else value


#: Accepted without effect.
IGNORED: Final = -1
#: Memory types: UC, WC, WT, WP, WB; PAT knows UC- besides.
MTRR_TYPES = frozenset({0, 1, 4, 5, 6})
PAT_TYPES = MTRR_TYPES | {7}
ASYNC_PF_RESERVED = 0x30
#: Enabled, and announced by an interrupt.
ASYNC_PF_ON = 0x9
STEAL_TIME_RESERVED = 0x3E
U32_MAX = 0xFFFF_FFFF


def canonical(address: int) -> bool:
    """Whether an address of 48 bits is sign-extended to 64."""
    return address >> 47 in {0, 0x1FFFF}


def _any(vcpu: Vcpu, value: int) -> int:
    del vcpu
    return value


def _ignore(vcpu: Vcpu, value: int) -> int:
    del vcpu, value
    return IGNORED


def _refuse(vcpu: Vcpu, value: int) -> None:
    del vcpu, value


def _in_memory(vcpu: Vcpu, address: int) -> bool:
    """Whether a slot is behind a guest address that KVM is to write to."""
    return memslots.of(vcpu.vm).find(address) is not None


def _arch_capabilities(vcpu: Vcpu, value: int) -> int | None:
    """Anything, for a guest whose CPUID shows the register."""
    has = cpuid.guest_register(vcpu, 7, "edx") >> 29 & 1
    return value if has or not value else None


def _canonical(vcpu: Vcpu, value: int) -> int | None:
    del vcpu
    return value if canonical(value) else None


def _made_canonical(vcpu: Vcpu, value: int) -> int:
    """Sign-extended, as AMD does with addresses of SYSENTER and KVM for both."""
    del vcpu
    low = value & (1 << 48) - 1
    return low | (0xFFFF << 48 if low >> 47 else 0)


def _bits(mask: int) -> Accept:
    """A register with just these bits."""

    def accept(vcpu: Vcpu, value: int) -> int | None:
        del vcpu
        return None if value & ~mask else value

    return accept


def _types(allowed: frozenset[int]) -> Accept:
    """Eight memory types, one per byte."""

    def accept(vcpu: Vcpu, value: int) -> int | None:
        del vcpu
        return value if all(kind in allowed for kind in value.to_bytes(8, "little")) else None

    return accept


def _mtrr_default(vcpu: Vcpu, value: int) -> int | None:
    del vcpu
    return None if value & ~0xCFF or value & 0xFF not in MTRR_TYPES else value


def _mtrr_base(vcpu: Vcpu, value: int) -> int | None:
    reserved = 0xF00 | -1 << cpuid.guest_physical_bits(vcpu)
    return None if value & reserved or value & 0xFF not in MTRR_TYPES else value


def _mtrr_mask(vcpu: Vcpu, value: int) -> int | None:
    return None if value & (0x7FF | -1 << cpuid.guest_physical_bits(vcpu)) else value


def _hwcr(vcpu: Vcpu, value: int) -> int | None:
    del vcpu
    value &= ~abi.HWCR_IGNORED
    return None if value & ~abi.HWCR_KEPT else value


def _async_pf(vcpu: Vcpu, value: int) -> int | None:
    """Asynchronous page faults need a local APIC in the kernel to be announced."""
    if value & ASYNC_PF_RESERVED or (value and not vcpu.vm.irqchip):
        return None
    on = value & ASYNC_PF_ON == ASYNC_PF_ON
    return None if on and not _in_memory(vcpu, value & ~0x3F) else value


def _async_pf_int(vcpu: Vcpu, value: int) -> int | None:
    """The vector of the announcement: not even 0 without a local APIC in the kernel."""
    return None if value >> 8 or not vcpu.vm.irqchip else value


def _pv_eoi(vcpu: Vcpu, value: int) -> int | None:
    return None if value & 2 or (value & 1 and not _in_memory(vcpu, value & ~1)) else value


def _tsc_aux(vcpu: Vcpu, value: int) -> int | None:
    """Intel refuses what is wider than 32 bits, AMD drops it; the guest's CPUID says which."""
    amd = cpuid.guest_register(vcpu, 0, "ebx") == int.from_bytes(b"Auth", "little")
    return None if value > U32_MAX and not amd else value & U32_MAX


def _only_zero(vcpu: Vcpu, value: int) -> int | None:
    del vcpu
    return None if value else 0


def _predictor_command(vcpu: Vcpu, value: int) -> int | None:
    """Barriers have nothing to do here; unknown ones are refused."""
    del vcpu
    return None if value & ~abi.PRED_CMD_IBPB else IGNORED


def _cpuid_faulting(vcpu: Vcpu, value: int) -> int | None:
    del vcpu
    return None if value & ~1 else value


@dataclass(frozen=True, slots=True)
class Rule:
    """One register.

    Attributes:
        reset: what it holds until it is written.
        accept: the value to keep for one written, ``IGNORED``, or None to refuse.
        vendor: the only one that has it; None: both.
        of_host: after reset it is what the host has (``abi.FEATURES``).
    """

    reset: int = 0
    accept: Accept = _any
    vendor: str | None = None
    of_host: bool = False


RULES: Final[dict[int, Rule]] = {
    **{index: Rule(value, accept=_refuse) for index, value in abi.READ_ONLY.items()},
    **{index: Rule(value, accept=_ignore) for index, value in abi.WRITES_IGNORED.items()},
    **{index: Rule(accept=_ignore) for index in abi.WRITE_ONLY},
    abi.IA32_PRED_CMD: Rule(accept=_predictor_command),
    abi.IA32_SPEC_CTRL: Rule(accept=_bits(abi.SPEC_CTRL_BITS)),
    abi.MMIO_CONF_BASE: Rule(accept=_only_zero),
    abi.IA32_POWER_CTL: Rule(),
    abi.SMI_COUNT: Rule(),
    abi.IA32_FEAT_CTL: Rule(vendor="intel", accept=_bits(abi.FEAT_CTL_LOCKED | abi.FEAT_CTL_LMCE)),
    abi.IA32_MCG_EXT_CTL: Rule(vendor="intel", accept=_bits(0x1)),
    abi.IA32_UCODE_REV: Rule(of_host=True),
    abi.PLATFORM_INFO: Rule(abi.PLATFORM_INFO_CPUID_FAULT),
    abi.IA32_ARCH_CAPABILITIES: Rule(accept=_arch_capabilities),
    abi.MISC_FEATURES_ENABLES: Rule(accept=_cpuid_faulting),
    abi.IA32_SYSENTER_CS: Rule(),
    abi.IA32_SYSENTER_ESP: Rule(accept=_made_canonical),
    abi.IA32_SYSENTER_EIP: Rule(accept=_made_canonical),
    abi.IA32_MISC_ENABLE: Rule(abi.MISC_ENABLE_FAST_STRING),
    abi.IA32_CR_PAT: Rule(abi.PAT_RESET, accept=_types(PAT_TYPES)),
    abi.MTRR_DEF_TYPE: Rule(accept=_mtrr_default),
    **{index: Rule(accept=_types(MTRR_TYPES)) for index in abi.MTRR_FIXED},
    **{index: Rule(accept=_mtrr_mask if index & 1 else _mtrr_base) for index in abi.MTRR_VARIABLE},
    abi.IA32_XSS: Rule(accept=_only_zero),
    abi.KVM_ASYNC_PF_EN: Rule(accept=_async_pf),
    abi.KVM_STEAL_TIME: Rule(accept=_bits(~STEAL_TIME_RESERVED)),
    abi.KVM_PV_EOI_EN: Rule(accept=_pv_eoi),
    abi.KVM_POLL_CONTROL: Rule(1, accept=_bits(1)),
    abi.KVM_ASYNC_PF_INT: Rule(accept=_async_pf_int),
    abi.KVM_ASYNC_PF_ACK: Rule(accept=_ignore),
    abi.STAR: Rule(),
    abi.LSTAR: Rule(accept=_canonical),
    abi.CSTAR: Rule(accept=_canonical),
    abi.SYSCALL_MASK: Rule(),
    abi.KERNEL_GS_BASE: Rule(accept=_canonical),
    abi.TSC_AUX: Rule(accept=_tsc_aux),
    abi.AMD_HWCR: Rule(vendor="amd", accept=_hwcr),
    abi.AMD_VM_CR: Rule(vendor="amd", accept=_only_zero),
    abi.AMD_VM_HSAVE_PA: Rule(vendor="amd"),
    abi.AMD_VIRT_SPEC_CTRL: Rule(vendor="amd", accept=_bits(1 << 2)),
    abi.AMD_DE_CFG: Rule(vendor="amd", accept=_bits(1 << 1)),
}
