"""Coalesced MMIO: writes to registered zones are collected in a ring and are no exits.

The ring is one per VM. User space reads it in the third page of a vCPU's mapping; here it lives in
that of the VM's first vCPU, which is where QEMU and the selftests look.
"""

from __future__ import annotations

from errno import EINVAL
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO
from kvmsim.abi.memory import (
    KVM_COALESCED_MMIO,
    KVM_COALESCED_MMIO_MAX,
    KVM_COALESCED_MMIO_RING,
    KVM_COALESCED_MMIO_ZONE,
)
from kvmsim.abi.run import COALESCED_MMIO_OFFSET
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import VmFile, handles

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm

#: Address, bytes, 1 for ports.
Zone = tuple[int, int, int]


def collect(vcpu: Vcpu, address: int, data: bytes, *, pio: bool) -> bool:
    """Put a write into the ring; False: outside every zone, or no room, so it is an exit."""
    vm = vcpu.vm
    kind = int(pio)
    if not any(
        zone_kind == kind and start <= address and address + len(data) <= start + size
        for start, size, zone_kind in vm.coalesced_zones
    ):
        return False
    memory = next(iter(vm.vcpus.values())).run.memory
    first, last = unpack_from("<II", memory, COALESCED_MMIO_OFFSET)
    if last >= KVM_COALESCED_MMIO_MAX or (last + 1) % KVM_COALESCED_MMIO_MAX == first:
        return False
    at = COALESCED_MMIO_OFFSET + KVM_COALESCED_MMIO_RING.size_bytes
    at += last * KVM_COALESCED_MMIO.size_bytes
    pack_into("<QII8s", memory, at, address, len(data), kind, data)
    last = (last + 1) % KVM_COALESCED_MMIO_MAX
    pack_into("<I", memory, COALESCED_MMIO_OFFSET + 4, last)
    return True


def _zone(call: Call) -> Zone:
    data = call.read(KVM_COALESCED_MMIO_ZONE.size_bytes)
    get = KVM_COALESCED_MMIO_ZONE.get
    if get(data, "pio") > 1:
        raise KvmError(EINVAL, "pio is 0 or 1")
    return get(data, "addr"), get(data, "size"), get(data, "pio")


@handles(VmFile, KVM_REGISTER_COALESCED_MMIO)
def register_coalesced_mmio(vm: Vm, call: Call) -> int:
    """Collect writes to a zone."""
    vm.coalesced_zones = (*vm.coalesced_zones, _zone(call))
    return 0


@handles(VmFile, KVM_UNREGISTER_COALESCED_MMIO)
def unregister_coalesced_mmio(vm: Vm, call: Call) -> int:
    """Make writes to every zone within this one exits again; nothing if there is none."""
    start, size, kind = _zone(call)
    vm.coalesced_zones = tuple(
        zone
        for zone in vm.coalesced_zones
        if not (zone[2] == kind and start <= zone[0] and zone[0] + zone[1] <= start + size)
    )
    return 0
