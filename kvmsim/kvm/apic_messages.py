"""Interrupts on their way to local APICs: who is meant, and what the guest's writes send.

Behaviour: Linux 6.12 irq_comm.c ``kvm_irq_delivery_to_apic``, lapic.c ``kvm_apic_match_dest``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmsim.kvm import capabilities, irqchip, lapic
from kvmsim.kvm.lapic import (
    DFR,
    FIXED,
    ICR_BUSY,
    ICR_SELF,
    ID,
    LDR,
    LOWEST,
    MODE_MASK,
    SPIV,
    SPIV_DIRECTED_EOI,
    Message,
)

if TYPE_CHECKING:
    from kvmsim.kvm.lapic import Lapic
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm

BROADCAST, X2APIC_BROADCAST = 0xFF, 0xFFFF_FFFF
TO_SELF, TO_ALL, TO_OTHERS = 1 << 18, 2 << 18, 3 << 18
DFR_FLAT, DFR_CLUSTER = 0xFFFF_FFFF, 0x0FFF_FFFF
X2APIC_BROADCAST_QUIRK_OFF = 2


def deliver(vm: Vm, message: Message, now_ns: int, source: Lapic | None = None) -> int:
    """Hand an interrupt to everybody who is meant.

    Args:
        vm: whose local APICs.
        message: the interrupt.
        now_ns: when.
        source: the local APIC that sends it; None: a device.

    Returns:
        How many took it.
    """
    meant = [apic for apic in _present(vm) if _is_meant(apic, message, source)]
    lowest = message.mode == LOWEST or message.redirected
    if lowest and not message.logical and message.destination == BROADCAST:
        message, lowest = message._replace(mode=FIXED), False
    if lowest:
        meant = [apic for apic in meant if apic.enabled]
        meant = [min(meant, key=lambda apic: apic.nr_lowest)] if meant else []
    return sum(apic.accept(message, now_ns) for apic in meant)


def _present(vm: Vm) -> list[Lapic]:
    return [apic for vcpu in vm.vcpus.values() if (apic := lapic.of(vcpu)).present]


def _is_meant(apic: Lapic, message: Message, source: Lapic | None) -> bool:
    """Whether a message is for an APIC."""
    if message.shorthand == TO_SELF:
        return apic is source
    if message.shorthand:
        return message.shorthand == TO_ALL or apic is not source
    return matches(apic, message, of_device=source is None)


def matches(apic: Lapic, message: Message, *, of_device: bool) -> bool:
    """Whether a destination is, or includes, an APIC."""
    destination = message.destination
    if apic.x2apic:
        quirk = not capabilities.of(apic.vcpu.vm).x2apic_api & X2APIC_BROADCAST_QUIRK_OFF
        everybody = destination == X2APIC_BROADCAST
        if everybody or (quirk and of_device and destination == BROADCAST):
            return True
    elif destination == BROADCAST:
        return True
    if not message.logical:
        if apic.x2apic or destination > BROADCAST:
            return destination == apic.vcpu.id
        return destination == apic.get(ID) >> 24
    return _matches_logical(apic, destination)


def _matches_logical(apic: Lapic, destination: int) -> bool:
    own = apic.get(LDR)
    if apic.x2apic:
        return own >> 16 == destination >> 16 and bool(own & destination & 0xFFFF)
    own >>= 24
    model = apic.get(DFR)
    if model == DFR_FLAT:
        return bool(own & destination)
    same_cluster = own >> 4 == destination >> 4
    return model == DFR_CLUSTER and same_cluster and bool(own & destination & 0xF)


# -- what the guest writes -------------------------------------------------------------------------


def send(apic: Lapic, low: int, high: int, now_ns: int) -> None:
    """A write to the interrupt command register."""
    message = Message(
        vector=low & 0xFF,
        mode=low & MODE_MASK,
        destination=high if apic.x2apic else high >> 24,
        logical=bool(low & 1 << 11),
        level=bool(low & 1 << 15),
        asserted=bool(low & 1 << 14),
        shorthand=low & 3 << 18,
    )
    deliver(apic.vcpu.vm, message, now_ns, apic)


def end_of_interrupt(apic: Lapic, now_ns: int) -> None:
    """A write to EOI: the most urgent interrupt in service is over."""
    vector = lapic.highest(apic.isr)
    if vector < 0:
        return
    bit = 1 << vector
    apic.isr &= ~bit
    chip = irqchip.of(apic.vcpu.vm)
    if chip.ioapic is not None:
        directed = bool(apic.get(SPIV) & SPIV_DIRECTED_EOI)
        chip.ioapic.end_of_interrupt(vector, now_ns, level=bool(apic.tmr & bit) and not directed)
    elif chip.handles is not None and chip.handles(apic.vcpu, vector):
        apic.eoi_exit = vector


_ONLY_XAPIC: Final = {ID: 0xFF00_0000, LDR: 0xFF00_0000, DFR: 0xFFFF_FFFF, lapic.ICR2: 0xFF00_0000}


def _write_identity(apic: Lapic, register: int, value: int) -> bool:
    if register == DFR:
        value |= 0x0FFF_FFFF
    apic.put(register, value & _ONLY_XAPIC[register])
    return True


def _write_task_priority(apic: Lapic, value: int, now_ns: int) -> bool:
    del now_ns
    apic.tpr = value & 0xFF
    return True


def _write_eoi(apic: Lapic, value: int, now_ns: int) -> bool:
    del value
    end_of_interrupt(apic, now_ns)
    return True


def _write_spiv(apic: Lapic, value: int, now_ns: int) -> bool:
    del now_ns
    apic.write_spiv(value)
    return True


def _write_icr(apic: Lapic, value: int, now_ns: int) -> bool:
    value &= ~ICR_BUSY
    apic.put(lapic.ICR, value)
    send(apic, value, apic.get(lapic.ICR2), now_ns)
    return True


def _write_initial_count(apic: Lapic, value: int, now_ns: int) -> bool:
    apic.write_initial_count(value, now_ns)
    return True


def _write_divide(apic: Lapic, value: int, now_ns: int) -> bool:
    apic.write_divide(value, now_ns)
    return True


def _write_error_status(apic: Lapic, value: int, now_ns: int) -> bool:
    """There are no errors; an x2APIC takes only 0."""
    del now_ns
    return not (apic.x2apic and value)


def _write_self_ipi(apic: Lapic, value: int, now_ns: int) -> bool:
    if not apic.x2apic or value & ~0xFF:
        return False
    send(apic, ICR_SELF | value, 0, now_ns)
    return True


_WRITERS: Final = {
    lapic.TASKPRI: _write_task_priority,
    lapic.EOI: _write_eoi,
    SPIV: _write_spiv,
    lapic.ICR: _write_icr,
    lapic.TMICT: _write_initial_count,
    lapic.TDCR: _write_divide,
    lapic.ESR: _write_error_status,
    lapic.SELF_IPI: _write_self_ipi,
}


def write(apic: Lapic, register: int, value: int, now_ns: int) -> bool:
    """The guest writes a register; False: there is none, or not with that value."""
    if register in lapic.LVT_BITS:
        apic.write_lvt(register, value)
        return True
    if register in _ONLY_XAPIC:
        return not apic.x2apic and _write_identity(apic, register, value)
    writer = _WRITERS.get(register)
    return writer is not None and writer(apic, value, now_ns)


def read_msr(vcpu: Vcpu, register: int, now_ns: int) -> int | None:
    """Read a register by its MSR; None: #GP."""
    apic = lapic.of(vcpu)
    if not apic.x2apic:
        return None
    if register == lapic.ICR:
        return apic.get(lapic.ICR) | apic.get(lapic.ICR2) << 32
    return apic.read(register, now_ns)


def write_msr(vcpu: Vcpu, register: int, value: int, now_ns: int) -> bool:
    """Write a register by its MSR; False: #GP."""
    apic = lapic.of(vcpu)
    if not apic.x2apic:
        return False
    if register == lapic.ICR:
        if value & lapic.X2APIC_ICR_RESERVED:
            return False
        low, high = value & 0xFFFF_FFFF & ~ICR_BUSY, value >> 32
        apic.put(lapic.ICR, low)
        apic.put(lapic.ICR2, high)
        send(apic, low, high, now_ns)
        return True
    return value >> 32 == 0 and write(apic, register, value, now_ns)


class LocalPage:
    """The register pages of all local APICs of a VM, each seen by its own vCPU only."""

    __slots__ = ()

    def _apic(self, vcpu: Vcpu, gpa: int) -> Lapic | None:
        apic = lapic.of(vcpu)
        return apic if gpa & ~0xFFF == vcpu.apic_base & ~0xFFF else None

    def read_memory(self, vcpu: Vcpu, gpa: int, size: int, now_ns: int) -> bytes | None:
        """See ``bus.Local``. Where no xAPIC answers, KVM does, with ones, unless told not to."""
        apic = self._apic(vcpu, gpa)
        if apic is None:
            return None
        if not apic.present or apic.x2apic:
            return b"\xff" * size if _has_hole_quirk(vcpu.vm) else None
        offset = gpa & 0xFFF
        within = offset & 0xF
        if within + size > 4:
            return bytes(size)
        value = apic.read(offset & 0xFF0, now_ns) or 0
        return value.to_bytes(4, "little")[within : within + size]

    def write_memory(self, vcpu: Vcpu, gpa: int, data: bytes, now_ns: int) -> bool:
        """See ``bus.Local``. Only aligned words have an effect."""
        apic = self._apic(vcpu, gpa)
        if apic is None:
            return False
        if not apic.present or apic.x2apic:
            return _has_hole_quirk(vcpu.vm)
        if len(data) == 4 and not gpa & 0xF:
            write(apic, gpa & 0xFF0, int.from_bytes(data, "little"), now_ns)
        return True


def _has_hole_quirk(vm: Vm) -> bool:
    """KVM_X86_QUIRK_LAPIC_MMIO_HOLE."""
    return not capabilities.of(vm).disabled_quirks & 1 << 2
