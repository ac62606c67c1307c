"""SNP_LAUNCH_*: the launch of an SNP guest (kvm.md D.4)."""

from __future__ import annotations

from errno import EFAULT, EINVAL, EIO, ENOTTY
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.kvm import memslots, protected, sev_vmsa
from kvmsim.kvm.sev_command import (
    PAGE_BYTES,
    Params,
    copy_blob,
    direct,
    firmware_of,
    info,
    issue,
    issue_known,
)
from kvmsim.sev.snp import VMSA_GPA, VMSA_PAGE_TYPE

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.sev_command import SevCmd
    from kvmsim.kvm.vm import Vm
    from kvmsim.sev.snp import SnpGuest

_PAGE_TYPES = {
    abi.KVM_SEV_SNP_PAGE_TYPE_NORMAL,
    abi.KVM_SEV_SNP_PAGE_TYPE_ZERO,
    abi.KVM_SEV_SNP_PAGE_TYPE_UNMEASURED,
    abi.KVM_SEV_SNP_PAGE_TYPE_SECRETS,
    abi.KVM_SEV_SNP_PAGE_TYPE_CPUID,
}


def is_snp(vm: Vm) -> bool:
    """Whether a VM is an initialised SNP guest."""
    return vm.sev_active and vm.vm_type == caps.KVM_X86_SNP_VM


def launch_start(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SNP_LAUNCH_START: a context, bound to the ASID."""
    if not is_snp(vm):
        raise KvmError(ENOTTY, "not an SNP guest")
    params = Params(cmd, client, abi.KVM_SEV_SNP_LAUNCH_START_STRUCT)
    sev, snp, policy = info(vm), firmware_of(vm).snp, params["policy"]
    if sev.snp is not None or params["flags"] or not _policy_fits(policy):
        raise KvmError(EINVAL, f"a second launch, flags, or policy {policy:#x}")
    try:
        guest = issue(cmd, client, cmd.sev_fd, snp.create)
    except KvmError as error:
        raise KvmError(ENOTTY, f"no context: {error}") from error
    try:
        issue(cmd, client, cmd.sev_fd, snp.launch_start, guest, policy)
        direct(cmd, snp.activate, guest, sev.asid)
    except KvmError:
        snp.decommission(guest)
        raise
    sev.snp = guest
    sev.fd = cmd.sev_fd


def _policy_fits(policy: int) -> bool:
    """Linux 6.12: what it does not know, a single socket, or SMT not allowed: no."""
    wanted = abi.SNP_POLICY_SMT | abi.SNP_POLICY_RESERVED_ONE
    single = policy & abi.SNP_POLICY_SINGLE_SOCKET
    return not policy & ~abi.SNP_POLICY_VALID and policy & wanted == wanted and not single


def launch_update(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SNP_LAUNCH_UPDATE: pages into private memory, each of them measured.

    MODEL: the memory slot has to hold all the pages; private memory itself keeps no bytes here.
    """
    guest = info(vm).snp
    if not is_snp(vm) or guest is None:
        raise KvmError(EINVAL, "no SNP guest that was started")
    params = Params(cmd, client, abi.KVM_SEV_SNP_LAUNCH_UPDATE_STRUCT)
    length, page_type = params["len"], params["type"]
    if not length or length % PAGE_BYTES or params["flags"] or page_type not in _PAGE_TYPES:
        raise KvmError(EINVAL, f"{length} bytes of pages of type {page_type}")
    if not _private_slot(vm, params["gfn_start"]):
        raise KvmError(EINVAL, f"no private memory at frame {params['gfn_start']:#x}")
    pages = length // PAGE_BYTES
    try:
        for _ in range(pages):
            _add_page(vm, cmd, client, params, guest)
    except KvmError as error:
        raise KvmError(EIO, str(error)) from error
    params.write_back()


def _private_slot(vm: Vm, gfn: int) -> bool:
    """Whether a guest page frame is in a slot that has private memory."""
    slot = memslots.of(vm).find(gfn * PAGE_BYTES)
    return slot is not None and slot.guest_memfd is not None


def _add_page(vm: Vm, cmd: SevCmd, client: Client, params: Params, guest: SnpGuest) -> None:
    """One page; the range in the structure moves on."""
    gfn, address, page_type = params["gfn_start"], params["uaddr"], params["type"]
    zero = page_type == abi.KVM_SEV_SNP_PAGE_TYPE_ZERO
    if not _private_slot(vm, gfn):
        raise KvmError(EFAULT, f"no private memory at frame {gfn:#x}")
    page = None if zero else client.read(address, PAGE_BYTES)
    snp = firmware_of(vm).snp
    issue(
        cmd,
        client,
        cmd.sev_fd,
        snp.launch_update,
        guest,
        gfn * PAGE_BYTES,
        page_type,
        page,
    )
    params["gfn_start"] = gfn + 1
    params["len"] -= PAGE_BYTES
    if not zero:
        params["uaddr"] = address + PAGE_BYTES


def launch_finish(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SNP_LAUNCH_FINISH: measure the vCPUs, then the guest may run."""
    if not is_snp(vm):
        raise KvmError(ENOTTY, "not an SNP guest")
    guest = info(vm).snp
    if guest is None:
        raise KvmError(EINVAL, "the guest was not started")
    params = Params(cmd, client, abi.KVM_SEV_SNP_LAUNCH_FINISH_STRUCT)
    if params["flags"]:
        raise KvmError(EINVAL, "flags of KVM_SEV_SNP_LAUNCH_FINISH")
    snp = firmware_of(vm).snp
    _add_vmsas(vm, cmd, client, guest)
    id_block = None
    if params["id_block_en"]:
        id_block = copy_blob(client, params["id_block_uaddr"], abi.KVM_SEV_SNP_ID_BLOCK_SIZE)
        copy_blob(client, params["id_auth_uaddr"], abi.KVM_SEV_SNP_ID_AUTH_SIZE)
    host_data = params.bytes_of("host_data", 32)
    issue_known(vm, cmd, client, snp.launch_finish, guest, host_data, id_block)


def _add_vmsas(vm: Vm, cmd: SevCmd, client: Client, guest: SnpGuest) -> None:
    snp = firmware_of(vm).snp
    for vcpu in vm.vcpus.values():
        sev_vmsa.check_can_be_protected(vcpu)
        page = sev_vmsa.page(vcpu)
        issue_known(
            vm,
            cmd,
            client,
            snp.launch_update,
            guest,
            VMSA_GPA,
            VMSA_PAGE_TYPE,
            page,
        )
        protected.protect(vcpu)
