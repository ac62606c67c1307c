"""Making interrupt controllers, moving their lines, reading and setting them."""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL, ENXIO
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import (
    KVM_CREATE_IRQCHIP,
    KVM_GET_IRQCHIP,
    KVM_IRQ_LINE,
    KVM_IRQ_LINE_STATUS,
    KVM_SET_BOOT_CPU_ID,
    KVM_SET_IRQCHIP,
)
from kvmsim.abi.irq import (
    KVM_IRQ_LEVEL,
    KVM_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import bus, irqchip, lapic, lines
from kvmsim.kvm.apic_messages import LocalPage
from kvmsim.kvm.dispatch import VmFile, enables, handles
from kvmsim.kvm.ioapic import BASE, SIZE_BYTES, Ioapic
from kvmsim.kvm.lines import Pin
from kvmsim.kvm.pic import PORTS, Pics

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import KvmEnableCap, Vm


def create(vm: Vm) -> None:
    """KVM_CREATE_IRQCHIP.

    Raises:
        KvmError: EEXIST twice; EINVAL after a vCPU.
    """
    if vm.irqchip:
        raise KvmError(EEXIST, "an irqchip exists")
    if vm.vcpus:
        raise KvmError(EINVAL, "vCPUs exist")
    vm.irqchip = True
    chip, wires, attached = irqchip.of(vm), lines.of(vm), bus.of(vm)
    chip.full = True
    chip.pics = Pics(
        lambda pin, now_ns: wires.ended(_pic_pin(pin), now_ns),
        lambda now_ns: _tell_of_pic(vm, now_ns),
        lambda pin: wires.unmasked(_pic_pin(pin)),
    )
    chip.ioapic = Ioapic(
        vm,
        lambda pin, now_ns: wires.ended(Pin(KVM_IRQCHIP_IOAPIC, pin), now_ns),
        lambda pin: wires.unmasked(Pin(KVM_IRQCHIP_IOAPIC, pin)),
    )
    wires.wire_as_pc()
    attached.local = LocalPage()
    attached.attach_ports(chip.pics, PORTS)
    attached.attach_memory(chip.ioapic, BASE, SIZE_BYTES)


def _pic_pin(number: int) -> Pin:
    return Pin(number >> 3, number & 7)


def _tell_of_pic(vm: Vm, now_ns: int) -> None:
    """Something waits at the PICs: for the first vCPU that listens to them."""
    for vcpu in vm.vcpus.values():
        if lapic.of(vcpu).takes_pic():
            vcpu.kick(now_ns)
            return


@enables(caps.KVM_CAP_SPLIT_IRQCHIP)
def split(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Local APICs in the kernel, the rest in user space."""
    del client
    pins = enable.arg0
    if pins > caps.KVM_MAX_IRQ_ROUTES:
        raise KvmError(EINVAL, f"{pins} routes")
    if vm.irqchip or vm.vcpus:
        raise KvmError(EEXIST, "an irqchip or vCPUs exist")
    vm.irqchip = True
    chip = irqchip.of(vm)
    chip.pins = pins
    chip.handles = lines.from_user_ioapic
    bus.of(vm).local = LocalPage()
    return 0


@handles(VmFile, KVM_CREATE_IRQCHIP)
def create_irqchip(vm: Vm, call: Call) -> int:
    """Make the interrupt controllers."""
    del call
    create(vm)
    return 0


@handles(VmFile, KVM_SET_BOOT_CPU_ID)
def set_boot_cpu_id(vm: Vm, call: Call) -> int:
    """Choose the vCPU that starts by itself, before there is any."""
    if vm.vcpus:
        raise KvmError(EBUSY, "vCPUs exist")
    # Linux 6.12 x86.c compares with ">": one id too many is taken.
    if call.value > (vm.max_vcpu_ids or caps.KVM_MAX_VCPU_IDS):
        raise KvmError(EINVAL, f"no vCPU can have id {call.value}")
    irqchip.of(vm).boot_cpu = call.value
    return 0


@handles(VmFile, KVM_IRQ_LINE)
def irq_line(vm: Vm, call: Call) -> int:
    """Move an interrupt line."""
    _set_line(vm, call.read(KVM_IRQ_LEVEL.size_bytes), call.now_ns)
    return 0


@handles(VmFile, KVM_IRQ_LINE_STATUS)
def irq_line_status(vm: Vm, call: Call) -> int:
    """Move an interrupt line and say what became of it."""
    data = bytearray(call.read(KVM_IRQ_LEVEL.size_bytes))
    status = _set_line(vm, data, call.now_ns)
    KVM_IRQ_LEVEL.put(data, "irq", status & 0xFFFF_FFFF)
    call.write(data)
    return 0


def _set_line(vm: Vm, data: bytes | bytearray, now_ns: int) -> int:
    if not vm.irqchip:
        raise KvmError(ENXIO, "no interrupt controllers in the kernel")
    up = bool(KVM_IRQ_LEVEL.get(data, "level"))
    return lines.set_line(vm, KVM_IRQ_LEVEL.get(data, "irq"), now_ns, up=up)


@handles(VmFile, KVM_GET_IRQCHIP)
def get_irqchip(vm: Vm, call: Call) -> int:
    """Copy one controller out."""
    pics, ioapic = irqchip.controllers(vm)
    data = bytearray(call.read(KVM_IRQCHIP.size_bytes))
    number = _chosen(data)
    chip = pics.chips[number] if number <= KVM_IRQCHIP_PIC_SLAVE else ioapic.pack()
    data[8:] = bytes(512)
    data[8 : 8 + len(chip)] = chip
    call.write(data)
    return 0


@handles(VmFile, KVM_SET_IRQCHIP)
def set_irqchip(vm: Vm, call: Call) -> int:
    """Take one controller over."""
    pics, ioapic = irqchip.controllers(vm)
    data = call.read(KVM_IRQCHIP.size_bytes)
    number = _chosen(data)
    if number <= KVM_IRQCHIP_PIC_SLAVE:
        chip = pics.chips[number]
        chip[:] = data[8 : 8 + len(chip)]
    else:
        ioapic.unpack(data[8:], call.now_ns)
    pics.update(call.now_ns)
    return 0


def _chosen(data: bytes | bytearray) -> int:
    """The controller a call names; KvmError EINVAL."""
    number = KVM_IRQCHIP.get(data, "chip_id")
    if number > KVM_IRQCHIP_IOAPIC:
        raise KvmError(EINVAL, f"chip {number}")
    return number
