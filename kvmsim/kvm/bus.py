"""Devices of a VM that are in the kernel: ports and memory that are no exits.

Asked before an access goes to user space, in the kernel's order: the local APIC of the vCPU that
makes it, then whatever was attached to the VM. What nobody takes is an exit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm


class Device(Protocol):
    """Something behind ports or memory."""

    def read(self, address: int, size: int, now_ns: int) -> bytes:
        """What the guest reads; shorter than asked for: the rest is zero."""

    def write(self, address: int, data: bytes, now_ns: int) -> None:
        """The guest writes."""


class Local(Protocol):
    """A device each vCPU has its own of, in memory."""

    def read_memory(self, vcpu: Vcpu, gpa: int, size: int, now_ns: int) -> bytes | None:
        """What the vCPU reads; None: it has none there."""

    def write_memory(self, vcpu: Vcpu, gpa: int, data: bytes, now_ns: int) -> bool:
        """The vCPU writes; False: it has none there."""


class Listener(Protocol):
    """Wants to know of writes, and may swallow them."""

    def wrote(self, address: int, data: bytes, *, pio: bool) -> bool:
        """The guest writes; True: nobody else gets it."""


class Region(NamedTuple):
    """Memory behind which there is a device.

    Attributes:
        begin: first guest-physical address.
        end: first one behind it.
        device: what is there.
    """

    begin: int
    end: int
    device: Device


class Bus:
    """What is attached to one VM.

    Attributes:
        ports: device by port.
        regions: memory with a device behind it.
        local: the device each vCPU has of its own.
        listener: who sees writes before the devices.
    """

    __slots__ = ("listener", "local", "ports", "regions")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.ports: dict[int, Device] = {}
        self.regions: list[Region] = []
        self.local: Local | None = None
        self.listener: Listener | None = None

    def attach_ports(self, device: Device, ports: Iterable[int]) -> None:
        """Put a device behind some ports."""
        self.ports.update(dict.fromkeys(ports, device))

    def attach_memory(self, device: Device, begin: int, size_bytes: int) -> None:
        """Put a device behind some memory."""
        self.regions.append(Region(begin, begin + size_bytes, device))

    def at(self, gpa: int) -> Device | None:
        """The device behind an address."""
        return next((r.device for r in self.regions if r.begin <= gpa < r.end), None)


def of(vm: Vm) -> Bus:
    """What is attached to a VM."""
    return state_of(vm, Bus)


def _known(vm: Vm) -> Bus | None:
    """The bus, if anything was ever attached to it."""
    found = vm.state.get(Bus)
    return found if isinstance(found, Bus) else None


def read_port(vm: Vm, vcpu: Vcpu, port: int, size: int, now_ns: int) -> bytes | None:
    """Read a port.

    Returns:
        What the guest gets, ``size`` bytes; None: nothing in the kernel is there.
    """
    del vcpu
    bus = _known(vm)
    device = None if bus is None else bus.ports.get(port)
    if device is None:
        return None
    return device.read(port, size, now_ns)[:size].ljust(size, b"\0")


def write_port(vm: Vm, vcpu: Vcpu, port: int, data: bytes, now_ns: int) -> bool:
    """Write a port; False: nothing in the kernel is there."""
    del vcpu
    bus = _known(vm)
    if bus is None:
        return False
    if bus.listener is not None and bus.listener.wrote(port, data, pio=True):
        return True
    device = bus.ports.get(port)
    if device is None:
        return False
    device.write(port, data, now_ns)
    return True


def read_memory(vm: Vm, vcpu: Vcpu, gpa: int, size: int, now_ns: int) -> bytes | None:
    """Read memory that has no slot.

    Returns:
        What the guest gets, ``size`` bytes; None: nothing in the kernel is there.
    """
    bus = _known(vm)
    if bus is None:
        return None
    if bus.local is not None:
        data = bus.local.read_memory(vcpu, gpa, size, now_ns)
        if data is not None:
            return data[:size].ljust(size, b"\0")
    device = bus.at(gpa)
    if device is None:
        return None
    return device.read(gpa, size, now_ns)[:size].ljust(size, b"\0")


def write_memory(vm: Vm, vcpu: Vcpu, gpa: int, data: bytes, now_ns: int) -> bool:
    """Write memory that has no slot; False: nothing in the kernel is there."""
    bus = _known(vm)
    if bus is None:
        return False
    if bus.local is not None and bus.local.write_memory(vcpu, gpa, data, now_ns):
        return True
    if bus.listener is not None and bus.listener.wrote(gpa, data, pio=False):
        return True
    device = bus.at(gpa)
    if device is None:
        return False
    device.write(gpa, data, now_ns)
    return True
