"""Where interrupts come from: GSI routes, irqfds, ioeventfds and messages.

An irqfd is an eventfd that is an interrupt line; one with a resample eventfd holds the line up
until the guest ends the interrupt, and says so there. An ioeventfd is signalled by a write of the
guest, which is then no exit. Linux 6.12 virt/kvm/eventfd.c.
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
from kvmsim.kvm import bus, eventfds, irqchip, lines, pic
from kvmsim.kvm.dispatch import VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.eventfds import Eventfd
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

    def triggered_by(self, address: int, data: bytes, *, pio: bool) -> bool:
        """Whether a write is the one."""
        if pio != self.pio or address != self.address:
            return False
        if self.size_bytes and len(data) != self.size_bytes:
            return False
        return self.value is None or int.from_bytes(data, "little") == self.value


class Irqfd:
    """An eventfd wired to an interrupt.

    Args:
        vm: the VM.
        eventfd: what raises it.
        gsi: the line.
        resample: told when the guest has ended the interrupt; None: the line is a pulse.
    """

    __slots__ = ("_vm", "eventfd", "gsi", "resample")

    def __init__(self, vm: Vm, eventfd: Eventfd, gsi: int, resample: Eventfd | None) -> None:
        self._vm = vm
        self.eventfd = eventfd
        self.gsi = gsi
        self.resample = resample

    def signalled(self, now_ns: int) -> None:
        """The eventfd was signalled."""
        if self.resample is not None:
            lines.set_line(self._vm, self.gsi, now_ns, up=True, source=lines.RESAMPLED)
            return
        for up in (True, False):
            lines.set_line(self._vm, self.gsi, now_ns, up=up)

    def close(self) -> None:
        """Take it off."""
        self.eventfd.close()
        if self.resample is not None:
            self.resample.close()


class Routing:
    """The eventfds of one VM.

    Args:
        vm: the VM.

    Attributes:
        irqfds: by eventfd and line.
        io_events: eventfd by what triggers it.
    """

    __slots__ = ("_vm", "io_events", "irqfds")

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.irqfds: list[Irqfd] = []
        self.io_events: dict[IoEvent, Eventfd] = {}

    def wrote(self, address: int, data: bytes, *, pio: bool) -> bool:
        """See ``bus.Listener``."""
        for event, eventfd in self.io_events.items():
            if event.triggered_by(address, data, pio=pio):
                # One that cannot be reached leaves the write to user space.
                return eventfd.signal()
        return False

    def resampled(self, gsi: int, now_ns: int) -> None:
        """The guest has ended an interrupt: lines held up by irqfds fall, and who holds hears."""
        waiting = [irqfd for irqfd in self.irqfds if irqfd.gsi == gsi and irqfd.resample]
        if not waiting:
            return
        lines.set_line(self._vm, gsi, now_ns, up=False, source=lines.RESAMPLED)
        for irqfd in waiting:
            if irqfd.resample is not None:
                irqfd.resample.signal()

    def close(self) -> None:
        """The VM is no more: let go of every eventfd."""
        for irqfd in self.irqfds:
            irqfd.close()
        for eventfd in self.io_events.values():
            eventfd.close()
        self.irqfds.clear()
        self.io_events.clear()


def of(vm: Vm) -> Routing:
    """The eventfds of a VM."""
    return state_of(vm, Routing)


def close(vm: Vm) -> None:
    """Let go of every eventfd of a VM, if there ever was one."""
    found = vm.state.get(Routing)
    if isinstance(found, Routing):
        found.close()


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
    lines.of(vm).set_routes(lines.end_of(entry) for entry in entries)
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
        pins = KVM_IOAPIC_NUM_PINS if chip == KVM_IRQCHIP_IOAPIC else pic.PINS // 2
        if not irqchip.of(vm).full or chip > KVM_IRQCHIP_IOAPIC or pin >= pins:
            raise KvmError(EINVAL, f"pin {pin} of chip {chip}")
    elif kind != KVM_IRQ_ROUTING_MSI:
        raise KvmError(EINVAL, f"route of type {kind}")


@handles(VmFile, KVM_IRQFD)
def irqfd(vm: Vm, call: Call) -> int:
    """Wire an eventfd to an interrupt, or take it off."""
    data = call.read(IRQFD_STRUCT.size_bytes)
    get = IRQFD_STRUCT.get
    flags, fd, gsi = get(data, "flags"), get(data, "fd"), get(data, "gsi")
    if flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE):
        raise KvmError(EINVAL, "flags of an irqfd")
    if flags & KVM_IRQFD_FLAG_DEASSIGN:
        _take_off(vm, eventfds.get(call.client, fd), gsi, call.now_ns)
        return 0
    resample = bool(flags & KVM_IRQFD_FLAG_RESAMPLE)
    if not (irqchip.of(vm).full if resample else vm.irqchip):
        raise KvmError(EINVAL, "no interrupt controllers in the kernel to wire it to")
    eventfd = eventfds.get(call.client, fd)
    wire = Irqfd(vm, eventfd, gsi, None)
    try:
        if resample:
            wire.resample = eventfds.get(call.client, get(data, "resamplefd"))
        if any(other.eventfd.identity == eventfd.identity for other in of(vm).irqfds):
            raise KvmError(EBUSY, "the eventfd is wired already")
    except KvmError:
        wire.close()
        raise
    of(vm).irqfds.append(wire)
    lines.of(vm).resampled = of(vm).resampled
    eventfd.watch(wire.signalled)
    return 0


def _take_off(vm: Vm, eventfd: Eventfd, gsi: int, now_ns: int) -> None:
    """Nothing, if it is not wired there."""
    routing = of(vm)
    for wire in [wire for wire in routing.irqfds if wire.gsi == gsi]:
        if wire.eventfd.identity != eventfd.identity:
            continue
        routing.irqfds.remove(wire)
        wire.close()
        held = any(other.gsi == gsi and other.resample for other in routing.irqfds)
        if wire.resample is not None and not held:
            lines.set_line(vm, gsi, now_ns, up=False, source=lines.RESAMPLED)
    eventfd.close()


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
    routing = of(vm)
    if flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
        _remove(routing, event, eventfds.get(call.client, get(data, "fd")))
        return 0
    if size not in {0, 1, 2, 4, 8} or address + size >= 1 << 64:
        raise KvmError(EINVAL, f"{size} bytes at {address:#x}")
    if flags & ~IOEVENTFD_ALL_FLAGS or (match and not size):
        raise KvmError(EINVAL, "flags of an ioeventfd")
    eventfd = eventfds.get(call.client, get(data, "fd"))
    if any(_collide(event, other) for other in routing.io_events):
        eventfd.close()
        raise KvmError(EEXIST, "an ioeventfd is there")
    routing.io_events[event] = eventfd
    bus.of(vm).listener = routing
    return 0


def _remove(routing: Routing, event: IoEvent, eventfd: Eventfd) -> None:
    held = routing.io_events.get(event)
    eventfd.close()
    if held is None or held.identity != eventfd.identity:
        raise KvmError(ENOENT, "no such ioeventfd")
    held.close()
    del routing.io_events[event]


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
    """Deliver a message; how many vCPUs took it."""
    data = call.read(KVM_MSI.size_bytes)
    get = KVM_MSI.get
    if not vm.irqchip or get(data, "flags") & ~KVM_MSI_VALID_DEVID:
        raise KvmError(EINVAL, "no local APICs in the kernel, or flags")
    message = lines.Msi(get(data, "address_lo"), get(data, "address_hi"), get(data, "data"))
    taken = lines.send(vm, message, call.now_ns)
    if taken < 0:
        raise KvmError(EINVAL, "address of a message")
    return taken
