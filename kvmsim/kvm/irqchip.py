"""The interrupt controllers in the kernel: two PICs, an IOAPIC, and lines into them.

Kept as the structures user space reads back. A line that rises is noted in the request registers;
delivering it to a vCPU ends a halt, nothing more: guests with code are an engine's business.
"""

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
    KVM_IOAPIC_NUM_PINS,
    KVM_IOAPIC_STATE,
    KVM_IRQ_LEVEL,
    KVM_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIC_STATE,
)
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import VmFile, enables, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import KvmEnableCap, Vm

PIC_PINS = 16
CASCADE_PIN = 2
ELCR_MASKS = (0xF8, 0xDE)
IOAPIC_BASE = 0xFEC00000
REDIRECTION_MASKED = 1 << 16
REDIRECTION_LEVEL = 1 << 15


class Irqchip:
    """The controllers of one VM.

    Attributes:
        full: PICs and IOAPIC exist; without, the local APICs only (a split irqchip), or nothing.
        pins: IOAPIC pins user space keeps for a split irqchip.
        pics: ``kvm_pic_state`` of master and slave; empty unless ``full``.
        ioapic: ``kvm_ioapic_state``; empty unless ``full``.
        levels: lines that are up, by GSI.
        boot_cpu: id of the vCPU that starts by itself.
    """

    __slots__ = ("boot_cpu", "full", "ioapic", "levels", "pics", "pins")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.full = False
        self.pins = 0
        self.pics: list[bytearray] = []
        self.ioapic = bytearray()
        self.levels: set[int] = set()
        self.boot_cpu = 0

    def create(self) -> None:
        """Make PICs and IOAPIC, every IOAPIC pin masked."""
        self.full = True
        self.pics = [KVM_PIC_STATE.pack(elcr_mask=mask) for mask in ELCR_MASKS]
        self.ioapic = KVM_IOAPIC_STATE.pack(base_address=IOAPIC_BASE)
        for pin in range(KVM_IOAPIC_NUM_PINS):
            KVM_IOAPIC_STATE.put(self.ioapic, "redirtbl", REDIRECTION_MASKED, pin)

    def set_line(self, gsi: int, *, up: bool) -> int:
        """Move a line.

        Returns:
            How many destinations took it: 0 coalesced with one still pending, -1 masked or
            nowhere to go.
        """
        answers = []
        if gsi < PIC_PINS:
            answers.append(self._set_pic(gsi, up=up))
            self.update_cascade()
        if gsi < KVM_IOAPIC_NUM_PINS:
            answers.append(self._set_ioapic(gsi, up=up))
        if up:
            self.levels.add(gsi)
        else:
            self.levels.discard(gsi)
        taken = [answer for answer in answers if answer >= 0]
        return sum(taken) if taken else -1

    def update_cascade(self) -> None:
        """The slave tells the master of what it has (i8259.c ``pic_update_irq``)."""
        slave = self.pics[1]
        get = KVM_PIC_STATE.get
        requested = _priority(slave, get(slave, "irr") & ~get(slave, "imr"))
        if requested < _priority(slave, get(slave, "isr")):
            self._set_pic(CASCADE_PIN, up=True)
            self._set_pic(CASCADE_PIN, up=False)

    def _set_pic(self, irq: int, *, up: bool) -> int:
        """Linux 6.12 i8259.c ``pic_set_irq1``."""
        pic = self.pics[irq >> 3]
        get, put = KVM_PIC_STATE.get, KVM_PIC_STATE.put
        bit = 1 << (irq & 7)
        irr, last_irr = get(pic, "irr"), get(pic, "last_irr")
        level = get(pic, "elcr") & bit
        taken = 1
        if up:
            if level or not last_irr & bit:
                taken = 0 if irr & bit else 1
                irr |= bit
            last_irr |= bit
        else:
            irr &= ~bit if level else 0xFF
            last_irr &= ~bit
        put(pic, "irr", irr & 0xFF)
        put(pic, "last_irr", last_irr & 0xFF)
        return -1 if get(pic, "imr") & bit else taken

    def _set_ioapic(self, pin: int, *, up: bool) -> int:
        """Linux 6.12 ioapic.c ``ioapic_set_irq``, without delivery."""
        entry = KVM_IOAPIC_STATE.get(self.ioapic, "redirtbl", pin)
        irr = KVM_IOAPIC_STATE.get(self.ioapic, "irr")
        bit = 1 << pin
        if not up:
            KVM_IOAPIC_STATE.put(self.ioapic, "irr", irr & ~bit)
            return 1
        edge = not entry & REDIRECTION_LEVEL
        if edge and irr & bit:
            return 0
        KVM_IOAPIC_STATE.put(self.ioapic, "irr", irr | bit)
        return -1 if entry & REDIRECTION_MASKED else 1


def _priority(pic: bytearray, pins: int) -> int:
    """Of some pins the priority of the most urgent, 0 to 7; 8 for none."""
    first = KVM_PIC_STATE.get(pic, "priority_add")
    return next((n for n in range(8) if pins >> ((n + first) & 7) & 1), 8)


def of(vm: Vm) -> Irqchip:
    """The controllers of a VM."""
    return state_of(vm, Irqchip)


def full(vm: Vm) -> Irqchip:
    """The controllers of a VM that has all of them in the kernel; KvmError ENXIO."""
    chip = of(vm)
    if not chip.full:
        raise KvmError(ENXIO, "no interrupt controllers in the kernel")
    return chip


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
    of(vm).create()


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
    of(vm).pins = pins
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
    of(vm).boot_cpu = call.value
    return 0


@handles(VmFile, KVM_IRQ_LINE)
def irq_line(vm: Vm, call: Call) -> int:
    """Move an interrupt line."""
    data = call.read(KVM_IRQ_LEVEL.size_bytes)
    _set_line(vm, data)
    return 0


@handles(VmFile, KVM_IRQ_LINE_STATUS)
def irq_line_status(vm: Vm, call: Call) -> int:
    """Move an interrupt line and say what became of it."""
    data = bytearray(call.read(KVM_IRQ_LEVEL.size_bytes))
    KVM_IRQ_LEVEL.put(data, "irq", _set_line(vm, data) & 0xFFFF_FFFF)
    call.write(data)
    return 0


def _set_line(vm: Vm, data: bytes | bytearray) -> int:
    if not vm.irqchip:
        raise KvmError(ENXIO, "no interrupt controllers in the kernel")
    gsi = KVM_IRQ_LEVEL.get(data, "irq")
    up = bool(KVM_IRQ_LEVEL.get(data, "level"))
    return of(vm).set_line(gsi, up=up) if of(vm).full else -1


@handles(VmFile, KVM_GET_IRQCHIP)
def get_irqchip(vm: Vm, call: Call) -> int:
    """Copy one controller out."""
    data = bytearray(call.read(KVM_IRQCHIP.size_bytes))
    chip = _chosen(full(vm), data)
    data[8:] = bytes(512)
    data[8 : 8 + len(chip)] = chip
    call.write(data)
    return 0


@handles(VmFile, KVM_SET_IRQCHIP)
def set_irqchip(vm: Vm, call: Call) -> int:
    """Take one controller over."""
    data = call.read(KVM_IRQCHIP.size_bytes)
    chip = _chosen(full(vm), data)
    chip[:] = data[8 : 8 + len(chip)]
    of(vm).update_cascade()
    return 0


def _chosen(chip: Irqchip, data: bytes | bytearray) -> bytearray:
    """The structure of the controller a call names; KvmError EINVAL."""
    chip_id = KVM_IRQCHIP.get(data, "chip_id")
    if chip_id > KVM_IRQCHIP_IOAPIC:
        raise KvmError(EINVAL, f"chip {chip_id}")
    return chip.pics[chip_id] if chip_id <= KVM_IRQCHIP_PIC_SLAVE else chip.ioapic
