"""Guest memory as user space describes it: slots, dirty logs, attributes, coalesced MMIO."""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

PAGE_SIZE: Final = 4096

_REGION = {
    "slot": Field(0, "u32"),
    "flags": Field(4, "u32"),
    "guest_phys_addr": Field(8, "u64"),
    "memory_size": Field(16, "u64"),
    "userspace_addr": Field(24, "u64"),
}
KVM_USERSPACE_MEMORY_REGION: Final = Layout("kvm_userspace_memory_region", 32, _REGION)
KVM_USERSPACE_MEMORY_REGION2: Final = Layout(
    "kvm_userspace_memory_region2",
    160,
    {**_REGION, "guest_memfd_offset": Field(32, "u64"), "guest_memfd": Field(40, "u32")},
)
KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2

KVM_DIRTY_LOG: Final = Layout(
    "kvm_dirty_log", 16, {"slot": Field(0, "u32"), "dirty_bitmap": Field(8, "u64")}
)
KVM_CLEAR_DIRTY_LOG: Final = Layout(
    "kvm_clear_dirty_log",
    24,
    {
        "slot": Field(0, "u32"),
        "num_pages": Field(4, "u32"),
        "first_page": Field(8, "u64"),
        "dirty_bitmap": Field(16, "u64"),
    },
)

KVM_MEMORY_ATTRIBUTES: Final = Layout(
    "kvm_memory_attributes",
    32,
    {
        "address": Field(0, "u64"),
        "size": Field(8, "u64"),
        "attributes": Field(16, "u64"),
        "flags": Field(24, "u64"),
    },
)
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
KVM_CREATE_GUEST_MEMFD: Final = Layout(
    "kvm_create_guest_memfd", 64, {"size": Field(0, "u64"), "flags": Field(8, "u64")}
)

KVM_ENC_REGION: Final = Layout(
    "kvm_enc_region", 16, {"addr": Field(0, "u64"), "size": Field(8, "u64")}
)

KVM_COALESCED_MMIO_ZONE: Final = Layout(
    "kvm_coalesced_mmio_zone",
    16,
    {"addr": Field(0, "u64"), "size": Field(8, "u32"), "pio": Field(12, "u32")},
)
#: One entry of the ring.
KVM_COALESCED_MMIO: Final = Layout(
    "kvm_coalesced_mmio",
    24,
    {
        "phys_addr": Field(0, "u64"),
        "len": Field(8, "u32"),
        "pio": Field(12, "u32"),
        "data": Field(16, "u8", 8),
    },
)
KVM_COALESCED_MMIO_RING: Final = Layout(
    "kvm_coalesced_mmio_ring", 8, {"first": Field(0, "u32"), "last": Field(4, "u32")}
)
#: The ring fills one page.
KVM_COALESCED_MMIO_MAX: Final = (PAGE_SIZE - 8) // 24
