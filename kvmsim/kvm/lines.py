"""Interrupt lines by number (GSI): to which pins they are wired, or which message they are.

Several sources share a line: it is up while one of them holds it up. Linux 6.12 irqchip.c
``kvm_set_irq``, irq_comm.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmsim.abi.irq import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_ENTRY,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
)
from kvmsim.kvm import capabilities, irqchip, lapic, pic
from kvmsim.kvm.apic_messages import deliver, matches
from kvmsim.kvm.dispatch import state_of
from kvmsim.kvm.lapic import MODE_MASK, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm

#: Who holds a line up.
USER, RESAMPLED, PIT = 0, 1, 2
USE_32BIT_IDS = 1


class Pin(NamedTuple):
    """A pin of a controller.

    Attributes:
        chip: ``KVM_IRQCHIP_*``.
        number: of the pin, from 0 in each chip.
    """

    chip: int
    number: int


class Msi(NamedTuple):
    """A message.

    Attributes:
        low: low half of the address.
        high: high half.
        data: what is written there.
    """

    low: int
    high: int
    data: int


class Lines:
    """The wires of one VM.

    Args:
        vm: the VM.

    Attributes:
        routes: where each line goes.
        on_end: by line: called with (now_ns) when the guest has ended an interrupt of it.
        on_unmask: by line: called when the mask of its pin goes.
        resampled: called with (line, now_ns) when the guest has ended an interrupt of it.
    """

    __slots__ = ("_ends", "on_end", "on_unmask", "resampled", "routes")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.routes: dict[int, list[Pin | Msi]] = {}
        self._ends: dict[Pin, int] = {}
        self.on_end: dict[int, Callable[[int], None]] = {}
        self.on_unmask: dict[int, Callable[[], None]] = {}
        self.resampled: Callable[[int, int], None] | None = None

    def set_routes(self, routes: Iterable[tuple[int, Pin | Msi]]) -> None:
        """Replace all routes."""
        self.routes = {}
        self._ends = {}
        for gsi, end in routes:
            self.routes.setdefault(gsi, []).append(end)
            if isinstance(end, Pin):
                self._ends[end] = gsi

    def wire_as_pc(self) -> None:
        """The routes a VM starts with: line n to pin n of everything that has one."""
        pins = [
            (gsi, Pin(gsi >> 3, gsi & 7) if gsi < pic.PINS and not ioapic else Pin(2, gsi))
            for gsi in range(KVM_IOAPIC_NUM_PINS)
            for ioapic in ((True, False) if gsi < pic.PINS else (True,))
        ]
        self.set_routes(pins)

    def ended(self, pin: Pin, now_ns: int) -> None:
        """The guest has ended an interrupt of a pin."""
        gsi = self._ends.get(pin)
        if gsi is None:
            return
        if gsi in self.on_end:
            self.on_end[gsi](now_ns)
        if self.resampled is not None:
            self.resampled(gsi, now_ns)

    def unmasked(self, pin: Pin) -> None:
        """The mask of a pin goes."""
        told = self.on_unmask.get(self._ends.get(pin, -1))
        if told is not None:
            told()


def of(vm: Vm) -> Lines:
    """The wires of a VM."""
    return state_of(vm, Lines)


def set_line(vm: Vm, gsi: int, now_ns: int, *, up: bool, source: int = USER) -> int:
    """Move a line.

    Returns:
        How many destinations took it: 0 coalesced with one still pending, -1 masked or nowhere to
        go.
    """
    chip = irqchip.of(vm)
    total = -1
    for end in of(vm).routes.get(gsi, ()):
        if isinstance(end, Msi):
            taken = send(vm, end, now_ns) if up else -1
        elif chip.pics is None or chip.ioapic is None:
            continue
        elif end.chip == KVM_IRQCHIP_IOAPIC:
            taken = chip.ioapic.set_line(end.number, source, now_ns, up=up)
        else:
            pin = end.number + 8 * end.chip
            taken = chip.pics.set_line(pin, source, now_ns, up=up)
        if taken >= 0:
            total = max(total, 0) + taken
    return total


# -- messages --------------------------------------------------------------------------------------


def send(vm: Vm, msi: Msi, now_ns: int) -> int:
    """Deliver a message: how many took it; -1 if it cannot be one."""
    message = message_of(vm, msi)
    return -1 if message is None else deliver(vm, message, now_ns)


def message_of(vm: Vm, msi: Msi) -> Message | None:
    """The interrupt a message stands for; None: its address cannot be one."""
    destination = msi.low >> 12 & 0xFF
    if capabilities.of(vm).x2apic_api & USE_32BIT_IDS:
        if msi.high & 0xFF:
            return None
        destination |= msi.high
    return Message(
        vector=msi.data & 0xFF,
        mode=msi.data & MODE_MASK,
        destination=destination,
        logical=bool(msi.low & 1 << 2),
        level=bool(msi.data & 1 << 15),
        redirected=bool(msi.low & 1 << 3),
    )


def from_user_ioapic(vcpu: Vcpu, vector: int) -> bool:
    """Whether a vector is a level-triggered one of the IOAPIC that a split irqchip leaves out.

    Its pins are the first lines (x86 irq_comm.c ``kvm_scan_ioapic_routes``).
    """
    vm = vcpu.vm
    apic = lapic.of(vcpu)
    for gsi in range(irqchip.of(vm).pins):
        for end in of(vm).routes.get(gsi, ()):
            message = message_of(vm, end) if isinstance(end, Msi) else None
            if message is None or not message.level or message.vector != vector:
                continue
            pending = (apic.isr | apic.irr) >> vector & 1
            if pending or matches(apic, message, of_device=True):
                return True
    return False


def end_of(entry: bytes) -> tuple[int, Pin | Msi]:
    """Line and end of a ``kvm_irq_routing_entry``."""
    get = KVM_IRQ_ROUTING_ENTRY.get
    gsi = get(entry, "gsi")
    if get(entry, "type") == KVM_IRQ_ROUTING_IRQCHIP:
        return gsi, Pin(get(entry, "u.irqchip.irqchip"), get(entry, "u.irqchip.pin"))
    low, high = get(entry, "u.msi.address_lo"), get(entry, "u.msi.address_hi")
    return gsi, Msi(low, high, get(entry, "u.msi.data"))
