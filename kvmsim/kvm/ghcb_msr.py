"""Registers of encrypted guests: SEV_STATUS, and the GHCB MSR by which an SEV-ES guest asks.

A guest that is not encrypted has neither. Writing the GHCB MSR does nothing by itself: the guest
then executes VMGEXIT and finds the answer in the register (kvm.md D.11).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmsim.abi import caps
from kvmsim.engine.base import SystemEvent
from kvmsim.kvm import cpuid_guest, msrs, protected
from kvmsim.kvm.dispatch import state_of
from kvmsim.sev import ghcb

if TYPE_CHECKING:
    from kvmsim.engine.base import Stop
    from kvmsim.kvm.vcpu import Vcpu

SEV_STATUS: Final = 0xC0010131
STATUS_SEV, STATUS_ES, STATUS_SNP = 1 << 0, 1 << 1, 1 << 2


class Ghcb:
    """The GHCB MSR of one vCPU.

    Args:
        vcpu: whose.

    Attributes:
        value: what the guest reads.
    """

    __slots__ = ("value",)

    def __init__(self, vcpu: Vcpu) -> None:
        self.value = ghcb.reset_value(_c_bit(vcpu), vcpu.vm.ghcb_version)


def _c_bit(vcpu: Vcpu) -> int:
    hardware = vcpu.vm.machine.preset.sev
    return 0 if hardware is None else hardware.c_bit


def vmgexit(vcpu: Vcpu) -> Stop | None:
    """An SEV-ES guest asks; None: the answer is in the register."""
    state = state_of(vcpu, Ghcb)
    vm = vcpu.vm
    answer = ghcb.reply(
        state.value,
        c_bit=_c_bit(vcpu),
        version=vm.ghcb_version,
        cpuid=lambda leaf: cpuid_guest.read(vcpu, leaf, 0),
        snp=vm.vm_type == caps.KVM_X86_SNP_VM,
    )
    if isinstance(answer, ghcb.Terminate):
        return SystemEvent(kind=ghcb.KVM_SYSTEM_EVENT_SEV_TERM, data=(answer.data,))
    if isinstance(answer, ghcb.Answer):
        state.value = answer.value
    else:
        # MODEL: nobody starts the processor again, for INIT and SIPI do not come by here.
        state.value = ghcb.AP_RESET_HOLD_RESPONSE
    return None


def _status(vcpu: Vcpu, now_ns: int) -> int | None:
    del now_ns
    vm = vcpu.vm
    if not vm.sev_active:
        return None
    snp = vm.vm_type == caps.KVM_X86_SNP_VM
    return STATUS_SEV | (STATUS_ES if vm.es_active else 0) | (STATUS_SNP if snp else 0)


def _read_ghcb(vcpu: Vcpu, now_ns: int) -> int | None:
    del now_ns
    return state_of(vcpu, Ghcb).value if protected.has_vmsa(vcpu) else None


def _write_ghcb(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    del now_ns
    if not protected.has_vmsa(vcpu):
        return False
    state_of(vcpu, Ghcb).value = value
    return True


def _nobody_reads(vcpu: Vcpu, now_ns: int) -> None:
    """User space never has these registers."""
    del vcpu, now_ns


def _nobody_writes(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    del vcpu, value, now_ns
    return False


msrs.SPECIAL[SEV_STATUS] = msrs.Special(_nobody_reads, _nobody_writes, guest_read=_status)
msrs.SPECIAL[ghcb.MSR_AMD64_SEV_ES_GHCB] = msrs.Special(
    _nobody_reads, _nobody_writes, guest_read=_read_ghcb, guest_write=_write_ghcb
)
