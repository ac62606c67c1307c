"""Where interrupts come from: GSI routes, irqfds, ioeventfds and messages.

Eventfds belong to the client. They are remembered, so that the rules about them hold; nothing is
signalled through them here.
"""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL, ENOENT
from typing import TYPE_CHECKING, NamedTuple

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_IOEVENTFD, KVM_IRQFD, KVM_SET_GSI_ROUTING, KVM_SIGNAL_MSI
from kvmsim.abi.irq import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQ_ROUTING,
    KVM_IRQ_ROUTING_ENTRY,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    KVM_MSI,
    KVM_MSI_VALID_DEVID,
)
from kvmsim.abi.irq import KVM_IOEVENTFD as IOEVENTFD_STRUCT
from kvmsim.abi.irq import KVM_IRQFD as IRQFD_STRUCT
from kvmsim.errors import KvmError
from kvmsim.kvm import irqchip, lapic
from kvmsim.kvm.dispatch import VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

ENTRY_BYTES = KVM_IRQ_ROUTING_ENTRY.size_bytes
IOEVENTFD_ALL_FLAGS = (
    KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN | 1 << 3
)


class IoEvent(NamedTuple):
    """One ioeventfd: writes that signal an eventfd and are no exit.

    Attributes:
        pio: a port, not memory.
        address: where.
        size_bytes: of the access; 0: any.
        value: what must be written; None: anything.
    """

    pio: bool
    address: int
    size_bytes: int
    value: int | None


class Routing:
    """The wires of one VM.

    Attributes:
        entries: ``kvm_irq_routing_entry`` as set; None: the routes of a PC.
        irqfds: GSI by the descriptor number it was assigned with.
        io_events: descriptor number by what triggers it.
    """

    __slots__ = ("entries", "io_events", "irqfds")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.entries: list[bytes] | None = None
        self.irqfds: dict[tuple[int, int], None] = {}
        self.io_events: dict[IoEvent, int] = {}


def of(vm: Vm) -> Routing:
    """The wires of a VM."""
    return state_of(vm, Routing)


@handles(VmFile, KVM_SET_GSI_ROUTING)
def set_gsi_routing(vm: Vm, call: Call) -> int:
    """Replace the routes from interrupt numbers to pins and messages."""
    header = call.read(KVM_IRQ_ROUTING.size_bytes)
    if not vm.irqchip:
        raise KvmError(EINVAL, "no interrupt controllers in the kernel")
    count = KVM_IRQ_ROUTING.get(header, "nr")
    if count > caps.KVM_MAX_IRQ_ROUTES or KVM_IRQ_ROUTING.get(header, "flags"):
        raise KvmError(EINVAL, f"{count} routes, or flags")
    data = call.read(count * ENTRY_BYTES, len(header)) if count else b""
    entries = [data[at : at + ENTRY_BYTES] for at in range(0, len(data), ENTRY_BYTES)]
    for entry in entries:
        _check_route(vm, entry)
    of(vm).entries = entries
    return 0


def _check_route(vm: Vm, entry: bytes) -> None:
    get = KVM_IRQ_ROUTING_ENTRY.get
    kind, flags = get(entry, "type"), get(entry, "flags")
    if get(entry, "gsi") >= caps.KVM_MAX_IRQ_ROUTES:
        raise KvmError(EINVAL, "GSI of a route")
    if flags & ~(KVM_MSI_VALID_DEVID if kind == KVM_IRQ_ROUTING_MSI else 0):
        raise KvmError(EINVAL, "flags of a route")
    if kind == KVM_IRQ_ROUTING_IRQCHIP:
        chip, pin = get(entry, "u.irqchip.irqchip"), get(entry, "u.irqchip.pin")
        pins = KVM_IOAPIC_NUM_PINS if chip == KVM_IRQCHIP_IOAPIC else irqchip.PIC_PINS // 2
        if not irqchip.of(vm).full or chip > KVM_IRQCHIP_IOAPIC or pin >= pins:
            raise KvmError(EINVAL, f"pin {pin} of chip {chip}")
    elif kind != KVM_IRQ_ROUTING_MSI:
        raise KvmError(EINVAL, f"route of type {kind}")


@handles(VmFile, KVM_IRQFD)
def irqfd(vm: Vm, call: Call) -> int:
    """Wire an eventfd to an interrupt, or take it off."""
    data = call.read(IRQFD_STRUCT.size_bytes)
    get = IRQFD_STRUCT.get
    flags = get(data, "flags")
    wire = (get(data, "fd"), get(data, "gsi"))
    if flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE):
        raise KvmError(EINVAL, "flags of an irqfd")
    irqfds = of(vm).irqfds
    if flags & KVM_IRQFD_FLAG_DEASSIGN:
        _eventfd(call, wire[0])
        irqfds.pop(wire, None)
        return 0
    resample = bool(flags & KVM_IRQFD_FLAG_RESAMPLE)
    if not (irqchip.of(vm).full if resample else vm.irqchip):
        raise KvmError(EINVAL, "no interrupt controllers in the kernel to wire it to")
    _eventfd(call, wire[0])
    if resample:
        _eventfd(call, get(data, "resamplefd"))
    if any(fd == wire[0] for fd, _ in irqfds):
        raise KvmError(EBUSY, "the eventfd is wired already")
    irqfds[wire] = None
    return 0


def _eventfd(call: Call, fd: int) -> None:
    """Refuse what is no eventfd: EBADF not open, EINVAL one of KVM's own."""
    if call.client.file(fd) is not None:
        raise KvmError(EINVAL, f"descriptor {fd} is no eventfd")


@handles(VmFile, KVM_IOEVENTFD)
def ioeventfd(vm: Vm, call: Call) -> int:
    """Make writes to an address signal an eventfd, or stop that."""
    data = call.read(IOEVENTFD_STRUCT.size_bytes)
    get = IOEVENTFD_STRUCT.get
    flags, size, address = get(data, "flags"), get(data, "len"), get(data, "addr")
    match = bool(flags & KVM_IOEVENTFD_FLAG_DATAMATCH)
    event = IoEvent(
        bool(flags & KVM_IOEVENTFD_FLAG_PIO),
        address,
        size,
        get(data, "datamatch") if match else None,
    )
    events = of(vm).io_events
    if flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
        _eventfd(call, get(data, "fd"))
        if events.get(event) != get(data, "fd"):
            raise KvmError(ENOENT, "no such ioeventfd")
        del events[event]
        return 0
    if size not in {0, 1, 2, 4, 8} or address + size >= 1 << 64:
        raise KvmError(EINVAL, f"{size} bytes at {address:#x}")
    if flags & ~IOEVENTFD_ALL_FLAGS or (match and not size):
        raise KvmError(EINVAL, "flags of an ioeventfd")
    _eventfd(call, get(data, "fd"))
    if any(_collide(event, other) for other in events):
        raise KvmError(EEXIST, "an ioeventfd is there")
    events[event] = get(data, "fd")
    return 0


def _collide(event: IoEvent, other: IoEvent) -> bool:
    """Whether one write could mean both."""
    if event[:2] != other[:2]:
        return False
    any_size = not event.size_bytes or not other.size_bytes
    any_value = event.value is None or other.value is None
    return any_size or (
        event.size_bytes == other.size_bytes and (any_value or event.value == other.value)
    )


@handles(VmFile, KVM_SIGNAL_MSI)
def signal_msi(vm: Vm, call: Call) -> int:
    """Deliver a message; 1 if some vCPU took it, 0 if none did."""
    data = call.read(KVM_MSI.size_bytes)
    get = KVM_MSI.get
    if not vm.irqchip or get(data, "flags") & ~KVM_MSI_VALID_DEVID:
        raise KvmError(EINVAL, "no local APICs in the kernel, or flags")
    destination = get(data, "address_lo") >> 12 & 0xFF
    vector = get(data, "data") & 0xFF
    taken = 0
    for vcpu in vm.vcpus.values():
        apic = lapic.of(vcpu)
        if destination in {vcpu.id, 0xFF} and vector >= 16 and apic.enabled:
            apic.request(vector)
            vcpu.wake(call.now_ns)
            taken = 1
    return taken
