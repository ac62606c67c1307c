"""Memory that only the guest reaches: guest_memfd files and which pages are private.

Linux 6.12 ``guest_memfd.c``. A file can be made for every VM; only VM types with private memory can
put one behind a slot. KVM_SET_MEMORY_ATTRIBUTES is built in where some VM type has such memory.
"""

from __future__ import annotations

from errno import EINVAL, ENOTTY
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_CREATE_GUEST_MEMFD, KVM_SET_MEMORY_ATTRIBUTES
from kvmsim.abi.memory import (
    KVM_CREATE_GUEST_MEMFD as CREATE_GUEST_MEMFD_STRUCT,
)
from kvmsim.abi.memory import KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_ATTRIBUTES, PAGE_SIZE
from kvmsim.errors import KvmError
from kvmsim.kvm import capabilities
from kvmsim.kvm.dispatch import VmFile, handles, state_of
from kvmsim.kvm.holder import VmHolder

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.memslots import Slot
    from kvmsim.kvm.vm import Vm


class GuestMemfd(VmHolder):
    """One file.

    Args:
        vm: the VM it was made for; no other can use it.
        size_bytes: its size.

    Attributes:
        size_bytes: as given.
        bound: the ranges behind slots: number of the slot -> (first byte, bytes).
    """

    __slots__ = ("bound", "size_bytes")

    def __init__(self, vm: Vm, size_bytes: int) -> None:
        super().__init__(vm)
        self.size_bytes = size_bytes
        self.bound: dict[int, tuple[int, int]] = {}

    @property
    def link_name(self) -> str:
        """See :attr:`KvmFile.link_name`."""
        return "[kvm-gmem]"


class PrivatePages:
    """Which guest-physical pages are private.

    Attributes:
        ranges: first page -> one beyond the last, disjoint, in no order.
    """

    __slots__ = ("ranges",)

    def __init__(self, vm: Vm) -> None:
        del vm
        self.ranges: dict[int, int] = {}

    def set(self, first: int, end: int, *, private: bool) -> None:
        """Make the pages from ``first`` up to ``end`` private or shared."""
        kept: dict[int, int] = {}
        for start, stop in self.ranges.items():
            if start < first:
                kept[start] = min(stop, first)
            if stop > end:
                kept[max(start, end)] = stop
        if private:
            kept[first] = end
        self.ranges = kept

    def __contains__(self, page: int) -> bool:
        return any(first <= page < end for first, end in self.ranges.items())


def private_pages(vm: Vm) -> PrivatePages:
    """The private pages of a VM."""
    return state_of(vm, PrivatePages)


def has_private_memory(vm: Vm) -> bool:
    """Whether a VM's type has memory that user space cannot reach."""
    return vm.vm_type in {caps.KVM_X86_SNP_VM, caps.KVM_X86_TDX_VM}


def bind(vm: Vm, client: Client, slot: Slot, fd: int) -> GuestMemfd:
    """Put a range of a file behind a slot.

    Raises:
        KvmError: EBADF no such descriptor; EINVAL not a guest_memfd of this VM, or a range that is
            beyond its end or in use.
    """
    file = client.file(fd)
    if not isinstance(file, GuestMemfd):
        raise KvmError(EINVAL, f"descriptor {fd} is no guest_memfd")
    if file.vm is not vm:
        raise KvmError(EINVAL, "the guest_memfd belongs to another VM")
    first, end = slot.guest_memfd_offset, slot.guest_memfd_offset + slot.size_bytes
    if end > file.size_bytes:
        raise KvmError(EINVAL, "beyond the end of the guest_memfd")
    from_slots = file.bound.values()
    if any(first < start + size and start < end for start, size in from_slots):
        raise KvmError(EINVAL, "that range of the guest_memfd is in use")
    file.bound[slot.number] = (first, slot.size_bytes)
    return file


@handles(VmFile, KVM_CREATE_GUEST_MEMFD)
def create_guest_memfd(vm: Vm, call: Call) -> GuestMemfd:
    """Make a file; whoever called turns the object into a descriptor."""
    data = call.read(CREATE_GUEST_MEMFD_STRUCT.size_bytes)
    size_bytes = CREATE_GUEST_MEMFD_STRUCT.get(data, "size")
    if CREATE_GUEST_MEMFD_STRUCT.get(data, "flags"):
        raise KvmError(EINVAL, "flags of KVM_CREATE_GUEST_MEMFD")
    if not 0 < size_bytes < 1 << 63 or size_bytes % PAGE_SIZE:
        raise KvmError(EINVAL, f"a guest_memfd of {size_bytes} bytes")
    return GuestMemfd(vm, size_bytes)


@handles(VmFile, KVM_SET_MEMORY_ATTRIBUTES)
def set_memory_attributes(vm: Vm, call: Call) -> int:
    """Make pages private or shared."""
    if not capabilities.has_private_memory(vm.machine):
        raise KvmError(ENOTTY, "no memory attributes on this machine")
    data = call.read(KVM_MEMORY_ATTRIBUTES.size_bytes)
    get = KVM_MEMORY_ATTRIBUTES.get
    address, size_bytes = get(data, "address"), get(data, "size")
    attributes = get(data, "attributes")
    supported = KVM_MEMORY_ATTRIBUTE_PRIVATE if has_private_memory(vm) else 0
    if get(data, "flags") or attributes & ~supported:
        raise KvmError(EINVAL, "flags or attributes of memory")
    if not size_bytes or address + size_bytes >= 1 << 64:
        raise KvmError(EINVAL, "an empty range, or one that wraps")
    if (address | size_bytes) % PAGE_SIZE:
        raise KvmError(EINVAL, "memory attributes are those of pages")
    first = address // PAGE_SIZE
    private_pages(vm).set(first, first + size_bytes // PAGE_SIZE, private=bool(attributes))
    return 0
