"""VMSA: the page that holds a vCPU's registers once they are encrypted.

The page has the layout of the hardware (AMD APM volume 2, table B-4), with the general registers,
control registers and segments this model keeps; the rest is zeros. It is what a launch measures.
"""

from __future__ import annotations

import struct
from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.structs import KVM_REGS
from kvmsim.errors import KvmError
from kvmsim.kvm import debug, protected

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

PAGE_BYTES = 4096
#: Member of ``kvm_regs`` -> offset in the page.
_REGS_AT = {
    "rflags": 0x170,
    "rip": 0x178,
    "rsp": 0x1D8,
    "rax": 0x1F8,
    "rcx": 0x308,
    "rdx": 0x310,
    "rbx": 0x318,
    "rbp": 0x328,
    "rsi": 0x330,
    "rdi": 0x338,
} | {f"r{number}": 0x300 + 8 * number for number in range(8, 16)}
_DR7_AT = 0x160
_DR6_AT = 0x168
_SEV_FEATURES_AT = 0x3B0
#: Set in the features of every SNP guest.
_SNP_ACTIVE = 1


def page(vcpu: Vcpu) -> bytes:
    """The registers of a vCPU as a VMSA page."""
    data = bytearray(PAGE_BYTES)
    regs = vcpu.get_regs()
    values = {at: KVM_REGS.get(regs, name) for name, at in _REGS_AT.items()}
    state = debug.of(vcpu)
    values |= {_DR6_AT: state.dr6, _DR7_AT: state.dr7}
    snp = vcpu.vm.vm_type == caps.KVM_X86_SNP_VM
    values[_SEV_FEATURES_AT] = vcpu.vm.vmsa_features | (_SNP_ACTIVE if snp else 0)
    for at, value in values.items():
        struct.pack_into("<Q", data, at, value)
    return bytes(data)


def check_can_be_protected(vcpu: Vcpu) -> None:
    """Refuse a vCPU whose registers cannot be encrypted now.

    Raises:
        KvmError: EINVAL: a debugger is on, breakpoints are set, or they are encrypted already.
    """
    state = debug.of(vcpu)
    if state.control or state.dr7 != debug.DR7_RESET or protected.has_vmsa(vcpu):
        raise KvmError(EINVAL, f"vCPU {vcpu.id} is debugged, or protected already")


def transfer(source: Vcpu, target: Vcpu) -> None:
    """The protected registers of one vCPU become another's, with a move of the guest."""
    target.set_regs(source.get_regs())
    protected.protect(target)
    protected.unprotect(source)
