"""KVM_MEMORY_ENCRYPT_REG_REGION and UNREG: memory a guest keeps pinned (kvm.md D.6)."""

from __future__ import annotations

from errno import EINVAL, ENOTTY
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import KVM_MEMORY_ENCRYPT_REG_REGION, KVM_MEMORY_ENCRYPT_UNREG_REGION
from kvmsim.abi.sev import KVM_ENC_REGION
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import VmFile, handles
from kvmsim.kvm.sev_command import PAGE_BYTES, U64, info, need_guest, pin

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm


@handles(VmFile, KVM_MEMORY_ENCRYPT_REG_REGION)
def register_region(vm: Vm, call: Call) -> int:
    """Pin a range; the same one may be registered again, and is then pinned twice."""
    address, size = _region(vm, call)
    need_guest(vm)
    sev = info(vm)
    if sev.owner is not None:
        raise KvmError(EINVAL, "a mirror has no regions of its own")
    sev.pages_locked += pin(vm, call.client, address, size, writable=True)
    sev.regions.append((address, size))
    return 0


@handles(VmFile, KVM_MEMORY_ENCRYPT_UNREG_REGION)
def unregister_region(vm: Vm, call: Call) -> int:
    """Unpin a range that was registered just so."""
    region = _region(vm, call)
    sev = info(vm)
    if sev.owner is not None:
        raise KvmError(EINVAL, "a mirror has no regions of its own")
    need_guest(vm)
    if region not in sev.regions:
        raise KvmError(EINVAL, f"no region of {region[1]} bytes at {region[0]:#x}")
    sev.regions.remove(region)
    sev.pages_locked -= pages_of(*region)
    return 0


def pages_of(address: int, size: int) -> int:
    """How many pages a range touches."""
    return (address + size + PAGE_BYTES - 1) // PAGE_BYTES - address // PAGE_BYTES


def _region(vm: Vm, call: Call) -> tuple[int, int]:
    """The range an ioctl is about; ENOTTY on a machine that encrypts nothing."""
    data = call.read(KVM_ENC_REGION.size_bytes)
    if vm.machine.preset.vendor != "amd":
        raise KvmError(ENOTTY, "no memory encryption on this machine")
    return KVM_ENC_REGION.get(data, "addr") & U64, KVM_ENC_REGION.get(data, "size")
