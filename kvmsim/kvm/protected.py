"""Whose registers are encrypted, and what that closes to user space.

Once a VMSA was measured the vCPU is protected. Getting and setting its registers is refused for
the VM types made for it only (``vcpu.state_protected``); a VM of the default type made SEV-ES by
the old command answers with what user space set last. A debugger is refused for both. Source:
Linux 6.12 x86.c, ``kvm->arch.has_protected_state`` and ``vcpu->arch.guest_state_protected``.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import caps, msrs
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm


#: Registers an SEV-ES guest reads and writes without KVM: they are part of the VMSA
#: (Linux 6.12 svm.c ``direct_access_msrs``, ``sev_es_init_vmcb``).
DIRECT_MSRS = frozenset(
    {
        *(msrs.STAR, msrs.LSTAR, msrs.CSTAR, msrs.SYSCALL_MASK),
        *(msrs.FS_BASE, msrs.GS_BASE, msrs.KERNEL_GS_BASE),
        *(msrs.IA32_SYSENTER_CS, msrs.EFER, msrs.IA32_CR_PAT),
    }
)


class Vmsa:
    """The encrypted registers of a vCPU.

    Attributes:
        exists: they are encrypted: ``guest_state_protected``.
    """

    __slots__ = ("exists",)

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.exists = False


def has_vmsa(vcpu: Vcpu) -> bool:
    """Whether the registers of a vCPU are encrypted."""
    return state_of(vcpu, Vmsa).exists


def has_protected_state(vm: Vm) -> bool:
    """Whether the type of a VM is one whose registers user space loses.

    Such a VM has no ``KVM_CAP_SYNC_REGS`` either.
    """
    return vm.vm_type in {caps.KVM_X86_SEV_ES_VM, caps.KVM_X86_SNP_VM}


def protect(vcpu: Vcpu) -> None:
    """The VMSA was measured."""
    state_of(vcpu, Vmsa).exists = True
    vcpu.state_protected = has_protected_state(vcpu.vm)


def unprotect(vcpu: Vcpu) -> None:
    """The VMSA is another vCPU's now."""
    state_of(vcpu, Vmsa).exists = False
    vcpu.state_protected = False


def refuse(vcpu: Vcpu) -> None:
    """Refuse to get or set registers user space has lost.

    Raises:
        KvmError: EINVAL.
    """
    if vcpu.state_protected:
        raise KvmError(EINVAL, f"the registers of vCPU {vcpu.id} are encrypted")


def hides_msr(vcpu: Vcpu, index: int) -> bool:
    """Whether a model-specific register is inside the VMSA, out of reach.

    Linux 6.12 ``sev_es_prevent_msr_access``: it is refused for the types made for it; otherwise it
    reads as 0 and writes are dropped.
    """
    return index in DIRECT_MSRS and has_vmsa(vcpu)
