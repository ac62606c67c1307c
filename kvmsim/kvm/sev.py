"""KVM_MEMORY_ENCRYPT_OP: the commands that give a VM its key.

The order of the checks is kvm.md D.4 and part of the ABI: clients probe with it. Launching,
migrating and debugging a guest are commands of their own and not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import E2BIG, EINVAL, EIO, ENOTTY, EPERM
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.kvm.client import Pointer, copy_from_user

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

#: kvm_tdx_init_vm up to and including the header of its CPUID table.
_TDX_INIT_VM_BYTES = 256 + 8


@dataclass(slots=True)
class SevCmd:
    """``struct kvm_sev_cmd``.

    Attributes:
        id: ``KVM_SEV_*``.
        data: the command's own structure: a buffer, or its address.
        error: out: the firmware's answer.
        sev_fd: descriptor of ``/dev/sev``.
    """

    id: int
    data: Pointer = 0
    error: int = 0
    sev_fd: int = 0


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
    if vm.vm_type == caps.KVM_X86_SNP_VM and vm.sev_active and cmd.id < abi.KVM_SEV_SNP_FIRST:
        raise UndispatchedError(EPERM, "an SNP guest takes SNP commands only")
    if cmd.id == abi.KVM_SEV_INIT:
        _old_init(vm, cmd, client, es=False)
    elif cmd.id == abi.KVM_SEV_ES_INIT:
        if not vm.machine.sev.sev_es:
            raise UndispatchedError(ENOTTY, "SEV-ES is not enabled on this machine")
        _old_init(vm, cmd, client, es=True)
    elif cmd.id == abi.KVM_SEV_INIT2:
        _init2(vm, cmd, client)
    else:
        raise UndispatchedError(EINVAL, f"no command {cmd.id}")
    return 0


def encrypt(vm: Vm) -> None:
    """Initialise an encrypted VM with the defaults of its type."""
    if vm.vm_type == caps.KVM_X86_TDX_VM:
        memory_encrypt_op(vm, SevCmd(abi.KVM_TDX_INIT_VM, bytes(_TDX_INIT_VM_BYTES)), vm.creator)
    elif vm.needs_init:
        data = bytes(abi.KVM_SEV_INIT_STRUCT.size_bytes)
        memory_encrypt_op(vm, SevCmd(abi.KVM_SEV_INIT2, data), vm.creator)


def destroy(vm: Vm) -> None:
    """The VM is gone: its key goes back and the charge ends."""
    key, vm.key = vm.key, None
    if key is None:
        return
    if vm.vm_type == caps.KVM_X86_TDX_VM:
        vm.system.keys.free_tdx(key)
    else:
        vm.system.keys.free_asid(key)


def _old_init(vm: Vm, cmd: SevCmd, client: Client, *, es: bool) -> None:
    """KVM_SEV_INIT and KVM_SEV_ES_INIT: for VMs of the default type."""
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
    vm.key = vm.system.keys.take_asid(client.pid, es=es)
    vm.sev_active = True
    vm.es_active = es
    vm.needs_init = False
    vm.vmsa_features = vmsa_features
    vm.ghcb_version = ghcb_version
    cmd.error = 0  # the platform was initialised


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
