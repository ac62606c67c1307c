"""The rest of a VM's make-up: reserved pages, shadow pages, the PMU filter, devices."""

from __future__ import annotations

from errno import E2BIG, EINVAL, ENODEV
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import (
    KVM_CREATE_DEVICE,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_SET_NR_MMU_PAGES,
    KVM_SET_PMU_EVENT_FILTER,
    KVM_SET_TSS_ADDR,
)
from kvmsim.abi.irq import KVM_CREATE_DEVICE as CREATE_DEVICE_STRUCT
from kvmsim.abi.structs import KVM_PMU_EVENT_FILTER, KVM_PMU_EVENT_FILTER_MAX_EVENTS
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

#: Three pages below 4 GiB.
MAX_TSS_ADDRESS = 0x1_0000_0000 - 3 * 4096
IDENTITY_MAP_ADDRESS = 0xFFFBC000
MIN_MMU_PAGES = 64
PMU_EVENT_DENY = 1
PMU_EVENT_FLAGS = 1


class Platform:
    """The make-up of one VM.

    Attributes:
        tss_address: guest address of the pages Intel's real mode needs.
        identity_map_address: guest address of the page table it needs.
        nr_mmu_pages: shadow pages KVM may use, 0: as many as it thinks right.
        pmu_event_filter: the filter as set, empty without.
    """

    __slots__ = ("identity_map_address", "nr_mmu_pages", "pmu_event_filter", "tss_address")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.tss_address = 0
        self.identity_map_address = IDENTITY_MAP_ADDRESS
        self.nr_mmu_pages = 0
        self.pmu_event_filter = b""


def of(vm: Vm) -> Platform:
    """The make-up of a VM."""
    return state_of(vm, Platform)


@handles(VmFile, KVM_SET_TSS_ADDR)
def set_tss_addr(vm: Vm, call: Call) -> int:
    """Choose where Intel's real mode has its task state."""
    if call.value > MAX_TSS_ADDRESS:
        raise KvmError(EINVAL, f"{call.value:#x} is too high")
    of(vm).tss_address = call.value
    return 0


@handles(VmFile, KVM_SET_IDENTITY_MAP_ADDR)
def set_identity_map_addr(vm: Vm, call: Call) -> int:
    """Choose where it has its page table, before there are vCPUs; 0: the default."""
    address = int.from_bytes(call.read(8), "little")
    if vm.vcpus:
        raise KvmError(EINVAL, "vCPUs exist")
    of(vm).identity_map_address = address or IDENTITY_MAP_ADDRESS
    return 0


@handles(VmFile, KVM_SET_NR_MMU_PAGES)
def set_nr_mmu_pages(vm: Vm, call: Call) -> int:
    """Limit the shadow pages."""
    if call.value < MIN_MMU_PAGES:
        raise KvmError(EINVAL, f"{call.value} shadow pages")
    of(vm).nr_mmu_pages = call.value
    return 0


@handles(VmFile, KVM_SET_PMU_EVENT_FILTER)
def set_pmu_event_filter(vm: Vm, call: Call) -> int:
    """Choose which events the guest may count; nothing counts, so it is only kept."""
    data = call.read(KVM_PMU_EVENT_FILTER.size_bytes)
    get = KVM_PMU_EVENT_FILTER.get
    if get(data, "action") > PMU_EVENT_DENY or get(data, "flags") & ~PMU_EVENT_FLAGS:
        raise KvmError(EINVAL, "action or flags of a PMU event filter")
    count = get(data, "nevents")
    if count > KVM_PMU_EVENT_FILTER_MAX_EVENTS:
        raise KvmError(E2BIG, f"{count} events")
    of(vm).pmu_event_filter = data + (call.read(8 * count, len(data)) if count else b"")
    return 0


@handles(VmFile, KVM_CREATE_DEVICE)
def create_device(vm: Vm, call: Call) -> int:
    """There are no in-kernel devices of this kind on x86 but VFIO's, which is not offered."""
    del vm
    kind = CREATE_DEVICE_STRUCT.get(call.read(CREATE_DEVICE_STRUCT.size_bytes), "type")
    raise KvmError(ENODEV, f"device type {kind}")
