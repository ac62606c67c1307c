"""KVM_MEMORY_ENCRYPT_OP: which command runs, and the commands that give a VM its key.

The order of the checks is kvm.md D.4 and part of the ABI: clients probe with it.
"""

from __future__ import annotations

from errno import E2BIG, EINVAL, EIO, ENOTTY, EPERM
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi import sev as abi
from kvmsim.abi.psp import GuestState
from kvmsim.errors import KvmError
from kvmsim.kvm import (
    sev_context,  # noqa: F401 - enters its capabilities
    sev_inspect,
    sev_launch,
    sev_migrate,
    sev_private,
    sev_regions,  # noqa: F401 - enters its handlers
    sev_snp,
)
from kvmsim.kvm.client import copy_from_user
from kvmsim.kvm.sev_command import SevCmd, direct, firmware_of, info

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

__all__ = ["SevCmd", "UndispatchedError"]

#: kvm_tdx_init_vm up to and including the header of its CPUID table.
_TDX_INIT_VM_BYTES = 256 + 8
#: What a mirror may ask; everything else belongs to its owner.
_FOR_MIRRORS = {
    abi.KVM_SEV_LAUNCH_UPDATE_VMSA,
    abi.KVM_SEV_GUEST_STATUS,
    abi.KVM_SEV_DBG_DECRYPT,
    abi.KVM_SEV_DBG_ENCRYPT,
}


class UndispatchedError(KvmError):
    """Refused before a command ran: the structure is not copied back."""


def memory_encrypt_ioctl(vm: Vm, call: Call) -> int:
    """The ioctl: steps before and after the command."""
    if vm.machine.preset.vendor == "intel":
        return _tdx_ioctl(vm, call)
    if not vm.machine.sev.sev:
        raise KvmError(ENOTTY, "SEV is not enabled on this machine")
    if call.arg == 0:
        return 0  # a probe: "is there memory encryption?"
    raw = bytearray(call.read(abi.KVM_SEV_CMD.size_bytes))
    get = abi.KVM_SEV_CMD.get
    cmd = SevCmd(get(raw, "id"), get(raw, "data"), get(raw, "error"), get(raw, "sev_fd"))
    try:
        result = memory_encrypt_op(vm, cmd, call.client)
    except UndispatchedError:
        raise
    except KvmError:
        _copy_back(call, raw, cmd)
        raise
    _copy_back(call, raw, cmd)
    return result


def _copy_back(call: Call, raw: bytearray, cmd: SevCmd) -> None:
    abi.KVM_SEV_CMD.put(raw, "error", cmd.error)
    call.write(raw)


def memory_encrypt_op(vm: Vm, cmd: SevCmd, client: Client) -> int:
    """Carry out a command.

    Raises:
        KvmError: ENOTTY no SEV, or no SEV-ES for its commands, or no ASIDs of the kind; EINVAL an
            unknown command or one that does not fit the VM; EBUSY no ASID; EFAULT.
    """
    if vm.dead or not vm.alive:
        raise UndispatchedError(EIO, "the VM is gone")
    if vm.machine.preset.vendor == "intel":
        return _tdx_op(vm, cmd, client)
    if not vm.machine.sev.sev:
        raise UndispatchedError(ENOTTY, "SEV is not enabled on this machine")
    if info(vm).owner is not None and cmd.id not in _FOR_MIRRORS:
        raise UndispatchedError(EINVAL, f"command {cmd.id} is not for a mirror")
    if sev_snp.is_snp(vm) and cmd.id < abi.KVM_SEV_SNP_FIRST:
        raise UndispatchedError(EPERM, "an SNP guest takes SNP commands only")
    command = COMMANDS.get(cmd.id)
    if command is None:
        raise UndispatchedError(EINVAL, f"no command {cmd.id}")
    sev_private.settle(vm)
    command(vm, cmd, client)
    return 0


def encrypt(vm: Vm) -> None:
    """Initialise an encrypted VM with the defaults of its type, and launch its guest.

    For VMs of this process, which have no descriptors and load no memory.
    """
    if vm.vm_type == caps.KVM_X86_TDX_VM:
        memory_encrypt_op(vm, SevCmd(abi.KVM_TDX_INIT_VM, bytes(_TDX_INIT_VM_BYTES)), vm.creator)
    elif vm.needs_init:
        cmd = SevCmd(abi.KVM_SEV_INIT2, bytes(abi.KVM_SEV_INIT_STRUCT.size_bytes))
        memory_encrypt_op(vm, cmd, vm.creator)
        direct(cmd, _launch, vm)


def _launch(vm: Vm) -> None:
    """From nothing to running without a measurement anybody sees."""
    firmware, sev = firmware_of(vm), info(vm)
    if sev_snp.is_snp(vm):
        sev.snp = firmware.snp.create()
        firmware.snp.launch_start(sev.snp, abi.SNP_POLICY_SMT | abi.SNP_POLICY_RESERVED_ONE)
        firmware.snp.activate(sev.snp, sev.asid)
        firmware.snp.launch_finish(sev.snp, bytes(32), None)
        return
    sev.handle = firmware.launch_start(abi.SEV_POLICY_ES if vm.es_active else 0)
    firmware.activate(sev.handle, sev.asid)
    firmware.launch_finish(sev.handle)


def may_enter(vm: Vm) -> bool:
    """Whether the guest of an encrypted VM can execute.

    MODEL: KVM does not look, the processor would execute ciphertext. A guest that was launched to
    the end may, and a plain SEV VM that was initialised and not launched at all.
    """
    sev = info(vm)
    if vm.vm_type == caps.KVM_X86_SNP_VM:
        return sev.snp is not None and sev.snp.finished
    if not sev.handle:
        return not vm.es_active
    guest = firmware_of(vm).guests.get(sev.handle)
    return guest is not None and guest.state == GuestState.RUNNING


def asid_of(vm: Vm) -> int | None:
    """The ASID of an encrypted VM, also of a mirror; the key number of a trust domain."""
    if vm.key is not None:
        return vm.key.asid
    return info(vm).asid or None


def destroy(vm: Vm) -> None:
    """The VM is gone: memory is unpinned, the guest forgotten, its key and charge go back."""
    sev = info(vm)
    sev.regions.clear()
    sev.pages_locked = 0
    if sev.owner is not None:
        owner, sev.owner = sev.owner, None
        info(owner).mirrors.remove(vm)
        owner.put()
        return
    if sev.snp is not None:
        firmware_of(vm).snp.decommission(sev.snp)
    elif sev.handle:
        sev_launch.release_handle(vm, sev.handle)
    key, vm.key = vm.key, None
    if key is None:
        return
    if vm.vm_type == caps.KVM_X86_TDX_VM:
        vm.system.keys.free_tdx(key)
    else:
        vm.system.keys.free_asid(key)


def _init(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_INIT: for VMs of the default type."""
    _old_init(vm, cmd, client, es=False)


def _es_init(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_ES_INIT; unlike any other command it may be refused before it was dispatched."""
    if not vm.machine.sev.sev_es:
        raise UndispatchedError(ENOTTY, "SEV-ES is not enabled on this machine")
    _old_init(vm, cmd, client, es=True)


def _old_init(vm: Vm, cmd: SevCmd, client: Client, *, es: bool) -> None:
    if vm.vm_type != caps.KVM_X86_DEFAULT_VM:
        raise KvmError(EINVAL, "KVM_SEV_INIT2 is the command for this VM type")
    _take_key(vm, cmd, client, es=es, vmsa_features=0, ghcb_version=1 if es else 0)


def _init2(vm: Vm, cmd: SevCmd, client: Client) -> None:
    if not vm.needs_init:
        raise KvmError(EINVAL, "the VM does not wait for KVM_SEV_INIT2")
    layout = abi.KVM_SEV_INIT_STRUCT
    data = copy_from_user(client, cmd.data, layout.size_bytes)
    es = vm.vm_type != caps.KVM_X86_SEV_VM
    features = layout.get(data, "vmsa_features")
    version = layout.get(data, "ghcb_version")
    if layout.get(data, "flags"):
        raise KvmError(EINVAL, "flags of KVM_SEV_INIT2")
    if features & ~(vm.machine.sev.vmsa_features if es else 0):
        raise KvmError(EINVAL, f"VMSA features {features:#x}")
    if version > (abi.GHCB_VERSION_MAX if es else 0):
        raise KvmError(EINVAL, f"GHCB version {version}")
    if es and version == 0:
        version = abi.GHCB_VERSION_DEFAULT
    _take_key(vm, cmd, client, es=es, vmsa_features=features, ghcb_version=version)


def _take_key(
    vm: Vm, cmd: SevCmd, client: Client, *, es: bool, vmsa_features: int, ghcb_version: int
) -> None:
    """The common end of all init commands: charge, ASID, state. All or nothing."""
    if vm.vcpus:
        raise KvmError(EINVAL, "vCPUs exist")
    if vm.sev_active:
        raise KvmError(EINVAL, "the VM is encrypted already")
    keys, firmware = vm.system.keys, vm.system.firmware
    key = keys.take_asid(client.pid, es=es)
    if not keys.ALLOCATES:
        firmware.bindings.flush()
    try:
        direct(cmd, firmware.init)
    except KvmError:
        keys.free_asid(key)
        raise
    vm.key = key
    info(vm).asid = key.asid
    vm.sev_active = True
    vm.es_active = es
    vm.needs_init = False
    vm.vmsa_features = vmsa_features
    vm.ghcb_version = ghcb_version


COMMANDS: dict[int, Callable[[Vm, SevCmd, Client], None]] = {
    abi.KVM_SEV_INIT: _init,
    abi.KVM_SEV_ES_INIT: _es_init,
    abi.KVM_SEV_INIT2: _init2,
    abi.KVM_SEV_LAUNCH_START: sev_launch.launch_start,
    abi.KVM_SEV_LAUNCH_UPDATE_DATA: sev_launch.launch_update_data,
    abi.KVM_SEV_LAUNCH_UPDATE_VMSA: sev_launch.launch_update_vmsa,
    abi.KVM_SEV_LAUNCH_SECRET: sev_launch.launch_secret,
    abi.KVM_SEV_LAUNCH_MEASURE: sev_launch.launch_measure,
    abi.KVM_SEV_LAUNCH_FINISH: sev_launch.launch_finish,
    abi.KVM_SEV_GUEST_STATUS: sev_inspect.guest_status,
    abi.KVM_SEV_DBG_DECRYPT: sev_inspect.debug_decrypt,
    abi.KVM_SEV_DBG_ENCRYPT: sev_inspect.debug_encrypt,
    abi.KVM_SEV_GET_ATTESTATION_REPORT: sev_inspect.attestation_report,
    abi.KVM_SEV_SEND_START: sev_migrate.send_start,
    abi.KVM_SEV_SEND_UPDATE_DATA: sev_migrate.send_update_data,
    abi.KVM_SEV_SEND_FINISH: sev_migrate.send_finish,
    abi.KVM_SEV_SEND_CANCEL: sev_migrate.send_cancel,
    abi.KVM_SEV_RECEIVE_START: sev_migrate.receive_start,
    abi.KVM_SEV_RECEIVE_UPDATE_DATA: sev_migrate.receive_update_data,
    abi.KVM_SEV_RECEIVE_FINISH: sev_migrate.receive_finish,
    abi.KVM_SEV_SNP_LAUNCH_START: sev_snp.launch_start,
    abi.KVM_SEV_SNP_LAUNCH_UPDATE: sev_snp.launch_update,
    abi.KVM_SEV_SNP_LAUNCH_FINISH: sev_snp.launch_finish,
}


def _tdx_ioctl(vm: Vm, call: Call) -> int:
    """Intel: only trust domains have memory encryption commands.

    Linux 6.16 ``vt_mem_enc_ioctl``: ENOTTY for every other VM.
    """
    if vm.vm_type != caps.KVM_X86_TDX_VM:
        raise KvmError(ENOTTY, "not a trust domain")
    raw = call.read(abi.KVM_TDX_CMD.size_bytes)
    get = abi.KVM_TDX_CMD.get
    if get(raw, "hw_error") or get(raw, "flags"):
        raise KvmError(EINVAL, "hw_error and flags of kvm_tdx_cmd are 0 on the way in")
    return _tdx_op(vm, SevCmd(get(raw, "id"), get(raw, "data")), call.client)


def _tdx_op(vm: Vm, cmd: SevCmd, client: Client) -> int:
    if vm.vm_type != caps.KVM_X86_TDX_VM:
        raise KvmError(ENOTTY, "not a trust domain")
    if cmd.id != abi.KVM_TDX_INIT_VM:
        raise KvmError(EINVAL, f"no command {cmd.id}")
    if not vm.needs_init:
        raise KvmError(EINVAL, "the trust domain is initialised already")
    header = copy_from_user(client, cmd.data, _TDX_INIT_VM_BYTES)
    if int.from_bytes(header[256:260], "little") > 256:
        raise KvmError(E2BIG, "CPUID entries of KVM_TDX_INIT_VM")
    vm.key = vm.system.keys.take_tdx(client.pid)
    vm.needs_init = False
    return 0
