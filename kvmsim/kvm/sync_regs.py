"""Registers exchanged in the ``kvm_run`` page instead of by ioctls (KVM_CAP_SYNC_REGS)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.regs import KVM_SREGS, KVM_VCPU_EVENTS
from kvmsim.abi.run import (
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    SYNC_EVENTS_OFFSET,
    SYNC_REGS_OFFSET,
    SYNC_SREGS_OFFSET,
)
from kvmsim.abi.structs import KVM_REGS
from kvmsim.kvm import sregs, vcpu_events
from kvmsim.kvm.page import U64_DIRTY_REGS

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu


def take_over(vcpu: Vcpu, dirty: int) -> None:
    """Apply the sets user space changed, one after the other; what is applied is not dirty.

    Raises:
        KvmError: EINVAL, a set that its ioctl would refuse. Those before it stay applied.
    """
    run = vcpu.run
    # User space may write there at any time: every set is copied before it is checked.
    if dirty & KVM_SYNC_X86_REGS:
        end = SYNC_REGS_OFFSET + KVM_REGS.size_bytes
        vcpu.set_regs(bytes(run.memory[SYNC_REGS_OFFSET:end]))
        run.u64[U64_DIRTY_REGS] &= ~KVM_SYNC_X86_REGS
    if dirty & KVM_SYNC_X86_SREGS:
        end = SYNC_SREGS_OFFSET + KVM_SREGS.size_bytes
        sregs.unpack(vcpu, bytes(run.memory[SYNC_SREGS_OFFSET:end]))
        run.u64[U64_DIRTY_REGS] &= ~KVM_SYNC_X86_SREGS
    if dirty & KVM_SYNC_X86_EVENTS:
        end = SYNC_EVENTS_OFFSET + KVM_VCPU_EVENTS.size_bytes
        vcpu_events.unpack(vcpu, bytes(run.memory[SYNC_EVENTS_OFFSET:end]))
        run.u64[U64_DIRTY_REGS] &= ~KVM_SYNC_X86_EVENTS


def store(vcpu: Vcpu, valid: int) -> None:
    """Show the sets user space wants to see."""
    memory = vcpu.run.memory
    if valid & KVM_SYNC_X86_REGS:
        memory[SYNC_REGS_OFFSET : SYNC_REGS_OFFSET + KVM_REGS.size_bytes] = vcpu.get_regs()
    if valid & KVM_SYNC_X86_SREGS:
        data = sregs.pack(vcpu)
        memory[SYNC_SREGS_OFFSET : SYNC_SREGS_OFFSET + len(data)] = data
    if valid & KVM_SYNC_X86_EVENTS:
        data = vcpu_events.pack(vcpu)
        memory[SYNC_EVENTS_OFFSET : SYNC_EVENTS_OFFSET + len(data)] = data
