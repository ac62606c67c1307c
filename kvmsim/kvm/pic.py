"""The two interrupt controllers of a PC (8259A), the second one behind pin 2 of the first.

Kept as the structures user space reads back. Behaviour: Linux 6.12 i8259.c, which knows neither
single nor level-triggered mode by command word, and keeps the special mask mode without effect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.irq import KVM_PIC_STATE

if TYPE_CHECKING:
    from collections.abc import Callable

PINS = 16
CASCADE = 2
MASTER_PORTS, SLAVE_PORTS, ELCR_PORTS = (0x20, 0x21), (0xA0, 0xA1), (0x4D0, 0x4D1)
PORTS = (*MASTER_PORTS, *SLAVE_PORTS, *ELCR_PORTS)
ELCR_MASKS = (0xF8, 0xDE)
SPURIOUS = 7
NONE = 8

# Offsets of the structure's members; all are bytes.
(LAST_IRR, IRR, IMR, ISR, PRIORITY_ADD, IRQ_BASE, READ_ISR, POLL) = range(8)
(SPECIAL_MASK, INIT_STATE, AUTO_EOI, ROTATE_ON_AUTO_EOI, FULLY_NESTED, INIT4, ELCR, ELCR_MASK) = (
    range(8, 16)
)


class Pics:
    """Both controllers.

    Args:
        ended: called with (pin, now_ns) when an interrupt is over: 0 to 15.
        rises: called with (now_ns) when the output goes up.
        unmasked: called with (pin) when a pin's mask goes.

    Attributes:
        chips: ``kvm_pic_state`` of master and slave.
        output: an interrupt waits for the processor.
    """

    __slots__ = ("_ended", "_lines", "_rises", "_unmasked", "chips", "output")

    def __init__(
        self,
        ended: Callable[[int, int], None],
        rises: Callable[[int], None],
        unmasked: Callable[[int], None],
    ) -> None:
        self.chips = [KVM_PIC_STATE.pack(elcr_mask=mask) for mask in ELCR_MASKS]
        self.output = False
        self._ended = ended
        self._rises = rises
        self._unmasked = unmasked
        self._lines = [0] * PINS

    # -- pins --------------------------------------------------------------------------------------

    def set_line(self, pin: int, source: int, now_ns: int, *, up: bool) -> int:
        """One of those who share a line moves it; 1 taken, 0 still pending, -1 masked."""
        bit = 1 << source
        self._lines[pin] = self._lines[pin] | bit if up else self._lines[pin] & ~bit
        answer = self._set(pin, up=bool(self._lines[pin]))
        self.update(now_ns)
        return answer

    def _set(self, pin: int, *, up: bool) -> int:
        chip, bit = self.chips[pin >> 3], 1 << (pin & 7)
        level = chip[ELCR] & bit
        taken = 1
        if up:
            if level or not chip[LAST_IRR] & bit:
                taken = 0 if chip[IRR] & bit else 1
                chip[IRR] |= bit
            chip[LAST_IRR] |= bit
        else:
            if level:
                chip[IRR] &= ~bit
            chip[LAST_IRR] &= ~bit
        return -1 if chip[IMR] & bit else taken

    def update(self, now_ns: int) -> None:
        """Pass on what waits: slave to master, master to the processor."""
        if self._wanted(1) >= 0:
            self._set(CASCADE, up=True)
            self._set(CASCADE, up=False)
        before, self.output = self.output, self._wanted(0) >= 0
        if self.output and not before:
            self._rises(now_ns)

    def _wanted(self, number: int) -> int:
        """The pin of a controller that is to interrupt; -1: none above what is in service."""
        chip = self.chips[number]
        first = _priority(chip, chip[IRR] & ~chip[IMR])
        if first == NONE:
            return -1
        serving = chip[ISR]
        if chip[FULLY_NESTED] and not number:
            serving &= ~(1 << CASCADE)
        if first >= _priority(chip, serving):
            return -1
        return first + chip[PRIORITY_ADD] & 7

    # -- the processor takes one -------------------------------------------------------------------

    def acknowledge(self, now_ns: int) -> int:
        """Both acknowledge cycles: the vector; of pin 7 when nothing waits any more."""
        pin, number = self._wanted(0), 0
        if pin < 0:
            pin = SPURIOUS
        else:
            self._take(0, pin, now_ns)
            if pin == CASCADE:
                number, pin = 1, self._wanted(1)
                if pin < 0:
                    pin = SPURIOUS
                else:
                    self._take(1, pin, now_ns)
        vector = self.chips[number][IRQ_BASE] + pin
        self.update(now_ns)
        return vector & 0xFF

    def _take(self, number: int, pin: int, now_ns: int) -> None:
        chip, bit = self.chips[number], 1 << pin
        chip[ISR] |= bit
        if not chip[ELCR] & bit:
            chip[IRR] &= ~bit
        if chip[AUTO_EOI]:
            if chip[ROTATE_ON_AUTO_EOI]:
                chip[PRIORITY_ADD] = pin + 1 & 7
            self._end(number, pin, now_ns)

    def _end(self, number: int, pin: int, now_ns: int) -> None:
        self.chips[number][ISR] &= ~(1 << pin)
        self._ended(pin + 8 * number, now_ns)

    # -- ports -------------------------------------------------------------------------------------

    def read(self, address: int, size: int, now_ns: int) -> bytes:
        """See ``bus.Device``. Only bytes are answered."""
        if size != 1:
            return bytes(size)
        if address in ELCR_PORTS:
            return bytes([self.chips[address & 1][ELCR]])
        number = address >> 7
        chip = self.chips[number]
        if chip[POLL]:
            chip[POLL] = 0
            return bytes([self._poll(number, now_ns)])
        if address & 1:
            return bytes([chip[IMR]])
        return bytes([chip[ISR] if chip[READ_ISR] else chip[IRR]])

    def _poll(self, number: int, now_ns: int) -> int:
        """A read that acknowledges: bit 7 says whether there was something."""
        pin = self._wanted(number)
        if pin >= 0:
            if number:
                self.chips[0][ISR] &= ~(1 << CASCADE)
                self.chips[0][IRR] &= ~(1 << CASCADE)
            self.chips[number][IRR] &= ~(1 << pin)
            self._end(number, pin, now_ns)
        if pin < 0 or number or pin != CASCADE:
            self.update(now_ns)
        return SPURIOUS if pin < 0 else pin | 0x80

    def write(self, address: int, data: bytes, now_ns: int) -> None:
        """See ``bus.Device``. Only bytes have an effect."""
        if len(data) != 1:
            return
        value = data[0]
        if address in ELCR_PORTS:
            chip = self.chips[address & 1]
            chip[ELCR] = value & chip[ELCR_MASK]
        elif address & 1:
            self._write_data(address >> 7, value, now_ns)
        elif value & 0x10:
            self._begin_init(address >> 7, value, now_ns)
        elif value & 0x08:
            chip = self.chips[address >> 7]
            if value & 0x04:
                chip[POLL] = 1
            if value & 0x02:
                chip[READ_ISR] = value & 1
            if value & 0x40:
                chip[SPECIAL_MASK] = value >> 5 & 1
        else:
            self._command(address >> 7, value, now_ns)

    def _begin_init(self, number: int, value: int, now_ns: int) -> None:
        """ICW1. Edges that were noted are forgotten, and over for whoever sent them."""
        chip = self.chips[number]
        forgotten = chip[IRR] & ~chip[ELCR]
        chip[INIT4] = value & 1
        chip[IRR] &= chip[ELCR]
        for member in (LAST_IRR, IMR, PRIORITY_ADD, SPECIAL_MASK, READ_ISR):
            chip[member] = 0
        if not chip[INIT4]:
            chip[FULLY_NESTED] = chip[AUTO_EOI] = 0
        chip[INIT_STATE] = 1
        for pin in range(8):
            if forgotten >> pin & 1:
                self._end(number, pin, now_ns)

    def _write_data(self, number: int, value: int, now_ns: int) -> None:
        """The mask, or ICW2 to ICW4."""
        chip = self.chips[number]
        state = chip[INIT_STATE]
        if state == 0:
            unmasked = chip[IMR] & ~value
            chip[IMR] = value
            for pin in range(8):
                if unmasked >> pin & 1:
                    self._unmasked(pin + 8 * number)
            self.update(now_ns)
        elif state == 1:
            chip[IRQ_BASE] = value & 0xF8
            chip[INIT_STATE] = 2
        elif state == 2:
            chip[INIT_STATE] = 3 if chip[INIT4] else 0
        else:
            chip[FULLY_NESTED] = value >> 4 & 1
            chip[AUTO_EOI] = value >> 1 & 1
            chip[INIT_STATE] = 0

    def _command(self, number: int, value: int, now_ns: int) -> None:
        """OCW2: ends of interrupt and rotations."""
        chip, command, pin = self.chips[number], value >> 5, value & 7
        if command in {0, 4}:
            chip[ROTATE_ON_AUTO_EOI] = command >> 2
            return
        if command == 2:
            return
        if command == 6:
            chip[PRIORITY_ADD] = value + 1 & 7
        else:
            if command in {1, 5}:
                first = _priority(chip, chip[ISR])
                if first == NONE:
                    return
                pin = first + chip[PRIORITY_ADD] & 7
            if command in {5, 7}:
                chip[PRIORITY_ADD] = pin + 1 & 7
            self._end(number, pin, now_ns)
        self.update(now_ns)


def _priority(chip: bytearray, pins: int) -> int:
    """Of some pins the priority of the most urgent, 0 to 7; ``NONE``."""
    first = chip[PRIORITY_ADD]
    return next((n for n in range(8) if pins >> (n + first & 7) & 1), NONE)
