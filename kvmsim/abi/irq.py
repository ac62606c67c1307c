"""Interrupt controllers, timers and the wires between them and user space."""

from __future__ import annotations

from typing import Final

from kvmsim.abi.layout import Field, Layout

KVM_IRQ_LEVEL: Final = Layout(
    "kvm_irq_level", 8, {"irq": Field(0, "u32"), "level": Field(4, "u32")}
)

KVM_IRQCHIP: Final = Layout(
    "kvm_irqchip", 520, {"chip_id": Field(0, "u32"), "chip": Field(8, "u8", 512)}
)
KVM_IRQCHIP_PIC_MASTER: Final = 0
KVM_IRQCHIP_PIC_SLAVE: Final = 1
KVM_IRQCHIP_IOAPIC: Final = 2

_PIC = (
    *("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll"),
    *("special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi"),
    *("special_fully_nested_mode", "init4", "elcr", "elcr_mask"),
)
KVM_PIC_STATE: Final = Layout(
    "kvm_pic_state", 16, {name: Field(index, "u8") for index, name in enumerate(_PIC)}
)
KVM_IOAPIC_NUM_PINS: Final = 24
KVM_IOAPIC_STATE: Final = Layout(
    "kvm_ioapic_state",
    216,
    {
        "base_address": Field(0, "u64"),
        "ioregsel": Field(8, "u32"),
        "id": Field(12, "u32"),
        "irr": Field(16, "u32"),
        "redirtbl": Field(24, "u64", KVM_IOAPIC_NUM_PINS),
    },
)

_CHANNEL = {
    "count": (0, "u32"),
    "latched_count": (4, "u16"),
    "count_latched": (6, "u8"),
    "status_latched": (7, "u8"),
    "status": (8, "u8"),
    "read_state": (9, "u8"),
    "write_state": (10, "u8"),
    "write_latch": (11, "u8"),
    "rw_mode": (12, "u8"),
    "mode": (13, "u8"),
    "bcd": (14, "u8"),
    "gate": (15, "u8"),
    "count_load_time": (16, "u64"),
}
_CHANNELS = {
    f"channels[{channel}].{name}": Field(24 * channel + offset, ctype)
    for channel in range(3)
    for name, (offset, ctype) in _CHANNEL.items()
}
KVM_PIT_STATE: Final = Layout("kvm_pit_state", 72, _CHANNELS)
KVM_PIT_STATE2: Final = Layout("kvm_pit_state2", 112, {**_CHANNELS, "flags": Field(72, "u32")})
KVM_PIT_CONFIG: Final = Layout("kvm_pit_config", 64, {"flags": Field(0, "u32")})
KVM_REINJECT_CONTROL: Final = Layout("kvm_reinject_control", 32, {"pit_reinject": Field(0, "u8")})

#: Header of the variable-length table; ``entries`` follow at offset 8.
KVM_IRQ_ROUTING: Final = Layout(
    "kvm_irq_routing", 8, {"nr": Field(0, "u32"), "flags": Field(4, "u32")}
)
KVM_IRQ_ROUTING_ENTRY: Final = Layout(
    "kvm_irq_routing_entry",
    48,
    {
        "gsi": Field(0, "u32"),
        "type": Field(4, "u32"),
        "flags": Field(8, "u32"),
        "u.irqchip.irqchip": Field(16, "u32"),
        "u.irqchip.pin": Field(20, "u32"),
        "u.msi.address_lo": Field(16, "u32"),
        "u.msi.address_hi": Field(20, "u32"),
        "u.msi.data": Field(24, "u32"),
    },
)
KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_MSI_VALID_DEVID: Final = 1

KVM_MSI: Final = Layout(
    "kvm_msi",
    32,
    {
        "address_lo": Field(0, "u32"),
        "address_hi": Field(4, "u32"),
        "data": Field(8, "u32"),
        "flags": Field(12, "u32"),
        "devid": Field(16, "u32"),
    },
)

KVM_IRQFD: Final = Layout(
    "kvm_irqfd",
    32,
    {
        "fd": Field(0, "u32"),
        "gsi": Field(4, "u32"),
        "flags": Field(8, "u32"),
        "resamplefd": Field(12, "u32"),
    },
)
KVM_IRQFD_FLAG_DEASSIGN: Final = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE: Final = 1 << 1

KVM_IOEVENTFD: Final = Layout(
    "kvm_ioeventfd",
    64,
    {
        "datamatch": Field(0, "u64"),
        "addr": Field(8, "u64"),
        "len": Field(16, "u32"),
        "fd": Field(20, "u32"),
        "flags": Field(24, "u32"),
    },
)
KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1 << 0
KVM_IOEVENTFD_FLAG_PIO: Final = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 1 << 2
KVM_IOEVENTFD_VALID_FLAG_MASK: Final = 0x1F

KVM_CLOCK_DATA: Final = Layout(
    "kvm_clock_data",
    48,
    {
        "clock": Field(0, "u64"),
        "flags": Field(8, "u32"),
        "realtime": Field(16, "u64"),
        "host_tsc": Field(24, "u64"),
    },
)
KVM_CLOCK_TSC_STABLE: Final = 2
KVM_CLOCK_REALTIME: Final = 4
KVM_CLOCK_HOST_TSC: Final = 8

KVM_CREATE_DEVICE: Final = Layout(
    "kvm_create_device",
    12,
    {"type": Field(0, "u32"), "fd": Field(4, "u32"), "flags": Field(8, "u32")},
)
KVM_CREATE_DEVICE_TEST: Final = 1
KVM_VCPU_TSC_CTRL: Final = 0
KVM_VCPU_TSC_OFFSET: Final = 0
