"""One guest, several VMs: mirroring and moving an encryption context (kvm.md D.7, D.8).

A mirror shares the guest of its owner and keeps the owner alive; it is charged nothing. A move
takes the guest out of a VM, which is dead from then on; the charge goes along::

    A (ASID 3, charged to /x)     move to B, the caller in /x     the charge is B's
                                  move to B, the caller in /y     /y is charged, then /x uncharged

Calls do not overlap here, so the EBUSY of two that meet, and EINTR, cannot happen. MODEL: where
Linux waits for vCPUs to leave KVM_RUN, a move is EBUSY. Source: Linux 6.12
``sev_vm_copy_enc_context_from``, ``sev_vm_move_enc_context_from``.
"""

from __future__ import annotations

from errno import EBADF, EBUSY, EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.errors import KvmError
from kvmsim.kvm import sev_private
from kvmsim.kvm.dispatch import VmFile, enables
from kvmsim.kvm.protected import has_vmsa
from kvmsim.kvm.sev_command import info
from kvmsim.kvm.sev_vmsa import transfer

if TYPE_CHECKING:
    from kvmsim.host.accounting import AsidCharge
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.vm import KvmEnableCap, Vm


@enables(caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM)
def copy_from(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Make a VM a mirror of another.

    Raises:
        KvmError: EBADF, no VM descriptor; EINVAL, the two do not fit.
    """
    source = _source(vm, enable, client)
    unusable = not source.sev_active or source.vm_type == caps.KVM_X86_SNP_VM
    if vm.sev_active or unusable or info(source).owner is not None or vm.vcpus:
        raise KvmError(EINVAL, "only an SEV VM that is no mirror can be mirrored, to a fresh VM")
    source.get()
    theirs, ours = info(source), info(vm)
    ours.owner = source
    theirs.mirrors.append(vm)
    ours.asid, ours.handle, ours.fd = theirs.asid, theirs.handle, theirs.fd
    vm.sev_active = True
    vm.es_active = source.es_active
    vm.needs_init = False
    if not vm.machine.quirks.mirror_drops_vmsa_features:
        vm.vmsa_features = source.vmsa_features
    return 0


@enables(caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM)
def move_from(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Move the guest of another VM, or what a mirror has of it, into this one.

    Raises:
        KvmError: EBADF, no VM descriptor; EINVAL, the two do not fit; EBUSY, the caller's cgroup
            cannot take the charge, or a vCPU is in KVM_RUN.
    """
    source = _source(vm, enable, client)
    unusable = not source.sev_active or source.vm_type == caps.KVM_X86_SNP_VM
    if vm.vm_type != source.vm_type or vm.sev_active or unusable:
        raise KvmError(EINVAL, "only an SEV VM can be moved, to a VM of its type that is none")
    charge = _charge(source, client.pid)
    try:
        _check_vcpus(vm, source)
    except KvmError:
        if charge is not None:
            vm.system.keys.cancel(charge)
        raise
    sev_private.settle(source)
    _move_guest(vm, source)
    _move_key(vm, source, charge)
    _move_mirrors(vm, source)
    source.dead = True
    return 0


def _source(vm: Vm, enable: KvmEnableCap, client: Client) -> Vm:
    """The VM behind the descriptor, of which only 32 bits count."""
    if vm.machine.preset.vendor == "intel":
        raise KvmError(EINVAL, "the vendor's part of KVM has no such operation")
    number = enable.arg0 & 0xFFFF_FFFF
    source = client.file(number - (1 << 32) if number >> 31 else number)
    if not isinstance(source, VmFile):
        raise KvmError(EBADF, f"descriptor {number} is not a VM")
    if source is vm:
        raise KvmError(EINVAL, "source and destination are one VM")
    return source  # type: ignore[return-value]  # every VmFile is a Vm


def _charge(source: Vm, pid: int) -> AsidCharge | None:
    """Charge the caller's cgroup if it is another than the source's."""
    keys, quirks = source.system.keys, source.machine.quirks
    key = source.key
    if key is None:
        # A mirror. Linux compares with no cgroup at all, and charges.
        if quirks.move_mirror_leaks_charge:
            real = "sev_es" if source.es_active else "sev"
            keys.charge(pid, "sev" if quirks.move_charges_wrong_type else real)
        return None
    if keys.is_charged_to(pid, key):
        return None
    return keys.charge(pid, "sev" if quirks.move_charges_wrong_type else key.kind)


def _check_vcpus(vm: Vm, source: Vm) -> None:
    """Nobody runs, and an SEV-ES guest takes its vCPUs along, one by one."""
    if any(vcpu.phase for vcpu in (*vm.vcpus.values(), *source.vcpus.values())):
        raise KvmError(EBUSY, "a vCPU is in KVM_RUN")
    if not source.es_active:
        return
    if len(vm.vcpus) != len(source.vcpus):
        raise KvmError(EINVAL, "the numbers of vCPUs differ")
    if not all(has_vmsa(vcpu) for vcpu in source.vcpus.values()):
        raise KvmError(EINVAL, "a vCPU of the source has no VMSA")


def _move_guest(vm: Vm, source: Vm) -> None:
    """Everything but the charge; the descriptor number of ``/dev/sev`` stays behind."""
    ours, theirs = info(vm), info(source)
    vm.sev_active, source.sev_active = True, False
    vm.es_active, source.es_active = source.es_active, False
    vm.vmsa_features = source.vmsa_features
    vm.ghcb_version = source.ghcb_version
    if not vm.machine.quirks.move_keeps_need_init:
        vm.needs_init = False
    ours.asid, theirs.asid = theirs.asid, 0
    ours.handle, theirs.handle = theirs.handle, 0
    ours.pages_locked, theirs.pages_locked = theirs.pages_locked, 0
    ours.regions, theirs.regions = theirs.regions, []
    ours.private, theirs.private = theirs.private, []
    if vm.es_active:
        for new, old in zip(vm.vcpus.values(), source.vcpus.values(), strict=True):
            transfer(old, new)


def _move_key(vm: Vm, source: Vm, charge: AsidCharge | None) -> None:
    key, source.key = source.key, None
    vm.key = key
    if key is not None and charge is not None:
        wrong = vm.machine.quirks.move_charges_wrong_type
        vm.system.keys.recharge(key, charge, uncharge_as="sev" if wrong else None)


def _move_mirrors(vm: Vm, source: Vm) -> None:
    """References of mirrors now keep the destination alive; a moved mirror keeps its owner."""
    ours, theirs = info(vm), info(source)
    ours.mirrors, theirs.mirrors = theirs.mirrors, []
    for mirror in ours.mirrors:
        vm.get()
        source.put()
        info(mirror).owner = vm
    ours.owner, theirs.owner = theirs.owner, None
    if ours.owner is not None:
        siblings = info(ours.owner).mirrors
        siblings[siblings.index(source)] = vm
