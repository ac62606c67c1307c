"""What KVM_RUN reads from its page on the way in, and leaves there on every way out.

Besides the members for everybody these are whole register sets, exchanged in the page instead of
by ioctls (KVM_CAP_SYNC_REGS).
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi.regs import KVM_SREGS, KVM_VCPU_EVENTS
from kvmsim.abi.run import (
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    KVM_SYNC_X86_VALID_FIELDS,
    SYNC_EVENTS_OFFSET,
    SYNC_REGS_OFFSET,
    SYNC_SREGS_OFFSET,
)
from kvmsim.abi.structs import KVM_REGS
from kvmsim.errors import KvmError
from kvmsim.kvm import protected, sregs, vcpu_events
from kvmsim.kvm.page import (
    U16_READY_AND_IF,
    U64_APIC_BASE,
    U64_CR8,
    U64_DIRTY_REGS,
    U64_VALID_REGS,
)

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

CR8_MAX = 15


def _take_over_sets(vcpu: Vcpu, dirty: int) -> None:
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


def _store_sets(vcpu: Vcpu, valid: int) -> None:
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


def take_over_page(vcpu: Vcpu) -> None:
    """Read what user space left in the page for this run."""
    run = vcpu.run
    valid, dirty = run.u64[U64_VALID_REGS], run.u64[U64_DIRTY_REGS]
    if valid or dirty:
        hidden = protected.has_protected_state(vcpu.vm)
        if (valid | dirty) & ~(0 if hidden else KVM_SYNC_X86_VALID_FIELDS):
            store_page(vcpu)
            raise KvmError(EINVAL, "unsupported register set")
        if dirty:
            _apply(vcpu, dirty)
    if not vcpu.vm.irqchip:
        cr8 = run.u64[U64_CR8]
        if cr8 > CR8_MAX:
            store_page(vcpu)
            raise KvmError(EINVAL, f"CR8 {cr8:#x}")
        vcpu.cr8 = cr8


def _apply(vcpu: Vcpu, dirty: int) -> None:
    try:
        _take_over_sets(vcpu, dirty)
    except KvmError:
        store_page(vcpu)
        raise


def store_page(vcpu: Vcpu) -> None:
    """Fill the part of the page that is the same for every way out."""
    run = vcpu.run
    run.u16[U16_READY_AND_IF] = vcpu.ready_and_if
    run.u64[U64_CR8] = vcpu.cr8
    run.u64[U64_APIC_BASE] = vcpu.apic_base
    valid = run.u64[U64_VALID_REGS]
    if valid and not protected.has_vmsa(vcpu):
        _store_sets(vcpu, valid)
