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
from kvmsim.kvm import debug, protected, sregs

if TYPE_CHECKING:
    from kvmsim.kvm.sregs import Sregs
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
_SREGS_AT = {
    "gdt.limit": 0x64,
    "gdt.base": 0x68,
    "idt.limit": 0x84,
    "idt.base": 0x88,
    "efer": 0xD0,
    "cr4": 0x148,
    "cr3": 0x150,
    "cr0": 0x158,
    "cr2": 0x240,
}
_SEGMENTS_AT = {
    "es": 0x00,
    "cs": 0x10,
    "ss": 0x20,
    "ds": 0x30,
    "fs": 0x40,
    "gs": 0x50,
    "ldt": 0x70,
    "tr": 0x90,
}
#: Member of ``kvm_segment`` -> its bit in the attributes of a segment.
_ATTRIBUTES = {"type": 0, "s": 4, "dpl": 5, "present": 7, "avl": 8, "l": 9, "db": 10, "g": 11}
_CPL_AT = 0xCB
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
    special = sregs.of(vcpu)
    values |= {at: special.get(name) for name, at in _SREGS_AT.items()}
    for at, value in values.items():
        struct.pack_into("<Q", data, at, value)
    for name, at in _SEGMENTS_AT.items():
        struct.pack_into("<HHIQ", data, at, *_segment(special, name))
    data[_CPL_AT] = special.get("ss.dpl")
    return bytes(data)


def _segment(special: Sregs, name: str) -> tuple[int, int, int, int]:
    """Selector, attributes, limit and base."""
    get = special.get
    attributes = sum(get(f"{name}.{member}") << bit for member, bit in _ATTRIBUTES.items())
    return get(f"{name}.selector"), attributes, get(f"{name}.limit"), get(f"{name}.base")


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
    sregs.of(target).data[:] = sregs.of(source).data
    protected.protect(target)
    protected.unprotect(source)
