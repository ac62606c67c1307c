"""The ``kvm_run`` page: what the vCPU descriptor shows when it is mapped."""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

KVM_RUN_PAGE: Final = Layout(
    "kvm_run",
    2352,
    {
        "request_interrupt_window": Field(0, "u8"),
        "immediate_exit": Field(1, "u8"),
        "exit_reason": Field(8, "u32"),
        "ready_for_interrupt_injection": Field(12, "u8"),
        "if_flag": Field(13, "u8"),
        "flags": Field(14, "u16"),
        "cr8": Field(16, "u64"),
        "apic_base": Field(24, "u64"),
        "kvm_valid_regs": Field(288, "u64"),
        "kvm_dirty_regs": Field(296, "u64"),
    },
)

#: kvm_run, the port-I/O data page, the coalesced MMIO ring.
MMAP_SIZE_BYTES: Final = 3 * 4096
PIO_DATA_OFFSET: Final = 4096
COALESCED_MMIO_OFFSET: Final = 8192

# The union at 32, by exit reason. Layouts share the page's bytes; sizes are those of the page.
EXIT_IO: Final = Layout(
    "kvm_run.io",
    2352,
    {
        "direction": Field(32, "u8"),
        "size": Field(33, "u8"),
        "port": Field(34, "u16"),
        "count": Field(36, "u32"),
        "data_offset": Field(40, "u64"),
    },
)
EXIT_MMIO: Final = Layout(
    "kvm_run.mmio",
    2352,
    {
        "phys_addr": Field(32, "u64"),
        "data": Field(40, "u8", 8),
        "len": Field(48, "u32"),
        "is_write": Field(52, "u8"),
    },
)
EXIT_DEBUG: Final = Layout(
    "kvm_run.debug",
    2352,
    {
        "exception": Field(32, "u32"),
        "pc": Field(40, "u64"),
        "dr6": Field(48, "u64"),
        "dr7": Field(56, "u64"),
    },
)
EXIT_INTERNAL: Final = Layout(
    "kvm_run.internal",
    2352,
    {"suberror": Field(32, "u32"), "ndata": Field(36, "u32"), "data": Field(40, "u64", 16)},
)
EXIT_FAIL_ENTRY: Final = Layout(
    "kvm_run.fail_entry",
    2352,
    {"hardware_entry_failure_reason": Field(32, "u64"), "cpu": Field(40, "u32")},
)

EXIT_UNKNOWN: Final = Layout("kvm_run.hw", 2352, {"hardware_exit_reason": Field(32, "u64")})
EXIT_EXCEPTION: Final = Layout(
    "kvm_run.ex", 2352, {"exception": Field(32, "u32"), "error_code": Field(36, "u32")}
)
EXIT_HYPERCALL: Final = Layout(
    "kvm_run.hypercall",
    2352,
    {"nr": Field(32, "u64"), "args": Field(40, "u64", 6), "ret": Field(88, "u64")},
)
EXIT_SYSTEM_EVENT: Final = Layout(
    "kvm_run.system_event",
    2352,
    {"type": Field(32, "u32"), "ndata": Field(36, "u32"), "data": Field(40, "u64", 16)},
)
EXIT_IOAPIC_EOI: Final = Layout("kvm_run.eoi", 2352, {"vector": Field(32, "u8")})
EXIT_MSR: Final = Layout(
    "kvm_run.msr",
    2352,
    {
        "error": Field(32, "u8"),
        "reason": Field(40, "u32"),
        "index": Field(44, "u32"),
        "data": Field(48, "u64"),
    },
)
EXIT_NOTIFY: Final = Layout("kvm_run.notify", 2352, {"flags": Field(32, "u32")})
EXIT_MEMORY_FAULT: Final = Layout(
    "kvm_run.memory_fault",
    2352,
    {"flags": Field(32, "u64"), "gpa": Field(40, "u64"), "size": Field(48, "u64")},
)

KVM_SYNC_X86_REGS: Final = 1 << 0
KVM_SYNC_X86_SREGS: Final = 1 << 1
KVM_SYNC_X86_EVENTS: Final = 1 << 2
KVM_SYNC_X86_VALID_FIELDS: Final = 7
SYNC_REGS_OFFSET: Final = 304
SYNC_SREGS_OFFSET: Final = 448
SYNC_EVENTS_OFFSET: Final = 760
