"""The IOAPIC in the kernel: 24 pins, each with a row that says which interrupt it is to whom.

Behaviour: Linux 6.12 ioapic.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.irq import KVM_IOAPIC_NUM_PINS, KVM_IOAPIC_STATE
from kvmsim.kvm.apic_messages import deliver
from kvmsim.kvm.lapic import MODE_MASK, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.vm import Vm

BASE, SIZE_BYTES = 0xFEC0_0000, 0x100
IOREGSEL, IOWIN = 0x00, 0x10
REG_ID, REG_VERSION, REG_ARBITRATION, REG_TABLE = 0, 1, 2, 0x10
VERSION = 0x11

LOGICAL, PENDING, REMOTE_IRR, LEVEL, MASKED = 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 16
READ_ONLY = PENDING | REMOTE_IRR
U32 = 0xFFFF_FFFF


class Ioapic:
    """The IOAPIC of one VM.

    Args:
        vm: the VM.
        ended: called with (pin, now_ns) when the guest ended an interrupt of a pin.
        unmasked: called with (pin) when a pin's mask goes.

    Attributes:
        table: the redirection table.
        irr: pins that are up, or edges that were not delivered.
        delivered: edges that were.
        selected: register behind the window.
        identity: its id.
    """

    __slots__ = (
        *("_ended", "_lines", "_unmasked", "_vm", "delivered", "identity", "irr", "selected"),
        "table",
    )

    def __init__(
        self, vm: Vm, ended: Callable[[int, int], None], unmasked: Callable[[int], None]
    ) -> None:
        self._vm = vm
        self._ended = ended
        self._unmasked = unmasked
        self._lines = [0] * KVM_IOAPIC_NUM_PINS
        self.table = [MASKED] * KVM_IOAPIC_NUM_PINS
        self.irr = self.delivered = 0
        self.selected = self.identity = 0

    # -- user space --------------------------------------------------------------------------------

    def pack(self) -> bytearray:
        """The bytes of ``kvm_ioapic_state``; an edge that was delivered does not show."""
        data = KVM_IOAPIC_STATE.pack(
            base_address=BASE,
            ioregsel=self.selected,
            id=self.identity,
            irr=self.irr & ~self.delivered,
        )
        for pin, row in enumerate(self.table):
            KVM_IOAPIC_STATE.put(data, "redirtbl", row, pin)
        return data

    def unpack(self, data: bytes, now_ns: int) -> None:
        """Take ``kvm_ioapic_state`` over; what is pending there is delivered."""
        get = KVM_IOAPIC_STATE.get
        self.selected, self.identity = get(data, "ioregsel"), get(data, "id")
        self.table = [get(data, "redirtbl", pin) for pin in range(KVM_IOAPIC_NUM_PINS)]
        self.irr = self.delivered = 0
        pending = get(data, "irr")
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if pending >> pin & 1:
                self._set(pin, now_ns, up=True)

    # -- pins --------------------------------------------------------------------------------------

    def set_line(self, pin: int, source: int, now_ns: int, *, up: bool) -> int:
        """One of those who share a line moves it.

        Returns:
            How many took the interrupt, 1 for a line that falls; 0 one is still pending; -1 masked.
        """
        bit = 1 << source
        self._lines[pin] = self._lines[pin] | bit if up else self._lines[pin] & ~bit
        return self._set(pin, now_ns, up=bool(self._lines[pin]))

    def _set(self, pin: int, now_ns: int, *, up: bool) -> int:
        bit = 1 << pin
        if not up:
            self.irr &= ~bit
            return 1
        edge = not self.table[pin] & LEVEL
        before = self.irr
        self.irr |= bit
        if edge:
            self.delivered &= ~bit
            if before == self.irr:
                return 0
        return self._serve(pin, now_ns)

    def _serve(self, pin: int, now_ns: int) -> int:
        """Send what a pin stands for, unless it is masked or still in service."""
        row = self.table[pin]
        if row & MASKED or row & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR:
            return -1
        if not row & LEVEL:
            self.delivered |= 1 << pin
        taken = deliver(self._vm, message_of(row), now_ns)
        if taken and row & LEVEL:
            self.table[pin] |= REMOTE_IRR
        return taken

    def end_of_interrupt(self, vector: int, now_ns: int, *, level: bool) -> None:
        """The guest ended an interrupt; a level-triggered pin that is still up comes again."""
        for pin, row in enumerate(self.table):
            if row & 0xFF != vector:
                continue
            self._ended(pin, now_ns)
            if not level or not self.table[pin] & LEVEL:
                continue
            self.table[pin] &= ~REMOTE_IRR
            if not self.table[pin] & MASKED and self.irr >> pin & 1:
                self._serve(pin, now_ns)

    # -- registers ---------------------------------------------------------------------------------

    def read(self, address: int, size: int, now_ns: int) -> bytes:
        """See ``bus.Device``."""
        del now_ns
        register = address & 0xFF
        value = 0
        if register == IOREGSEL:
            value = self.selected
        elif register == IOWIN:
            value = self._selected_value()
        return value.to_bytes(8, "little")[:size]

    def _selected_value(self) -> int:
        if self.selected == REG_VERSION:
            return KVM_IOAPIC_NUM_PINS - 1 << 16 | VERSION
        if self.selected in {REG_ID, REG_ARBITRATION}:
            return (self.identity & 0xF) << 24
        pin = self.selected - REG_TABLE >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return U32
        return self.table[pin] >> (32 if self.selected & 1 else 0) & U32

    def write(self, address: int, data: bytes, now_ns: int) -> None:
        """See ``bus.Device``."""
        register, value = address & 0xFF, int.from_bytes(data[:4], "little")
        if register == IOREGSEL:
            self.selected = value & 0xFF
        elif register == IOWIN:
            self._write_selected(value, now_ns)

    def _write_selected(self, value: int, now_ns: int) -> None:
        if self.selected == REG_ID:
            self.identity = value >> 24 & 0xF
            return
        pin = self.selected - REG_TABLE >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return
        before = row = self.table[pin]
        row = row & U32 | value << 32 if self.selected & 1 else row & ~U32 | value
        row = row & ~READ_ONLY | before & READ_ONLY
        if not row & LEVEL:
            # Linux 6.12: guests rely on this to get rid of Remote IRR.
            row &= ~REMOTE_IRR
        self.table[pin] = row
        if before & MASKED and not row & MASKED:
            self._unmasked(pin)
        if row & (LEVEL | MASKED | REMOTE_IRR) == LEVEL and self.irr >> pin & 1:
            self._serve(pin, now_ns)


def message_of(row: int) -> Message:
    """The interrupt a row of the table stands for."""
    return Message(
        vector=row & 0xFF,
        mode=row & MODE_MASK,
        destination=row >> 56,
        logical=bool(row & LOGICAL),
        level=bool(row & LEVEL),
    )
