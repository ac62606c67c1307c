"""One counter of the interval timer (8254).

A counter is a function of the time since it was loaded; nothing counts. Behaviour: Linux 6.12
i8254.c. Times are nanoseconds of whoever calls.
"""

from __future__ import annotations

from kvmsim.abi.irq import KVM_PIT_STATE2

FREQUENCY_HZ = 1_193_182
NS = 1_000_000_000
#: A count of 0 is the longest.
LONGEST = 0x10000
MODE_NONE = 0xFF
# How a byte of the count is read or written.
LOW, HIGH, FIRST, SECOND = 1, 2, 3, 4
MEMBERS = (
    *("count", "latched_count", "count_latched", "status_latched", "status", "read_state"),
    *("write_state", "write_latch", "rw_mode", "mode", "bcd", "gate", "count_load_time"),
)


class Channel:
    """One counter.

    Args:
        number: 0, 1 or 2; the last one's gate, the speaker's, is down at first.
        now_ns: when it is switched on.

    Attributes:
        number: as given.
        count: what it counts from.
        mode: 0 to 5; ``MODE_NONE``: nobody programmed it.
        gate: its input.
    """

    __slots__ = (*MEMBERS, "number")

    count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int
    count_load_time: int

    def __init__(self, number: int, now_ns: int) -> None:
        self.number = number
        for member in MEMBERS:
            setattr(self, member, 0)
        self.count = LONGEST
        self.mode = MODE_NONE
        self.gate = int(number != 2)
        self.count_load_time = now_ns

    def store(self, data: bytearray) -> None:
        """Put it into ``kvm_pit_state2``."""
        for member in MEMBERS:
            KVM_PIT_STATE2.put(data, f"channels[{self.number}].{member}", getattr(self, member))

    def load_from(self, data: bytes) -> None:
        """Take it from ``kvm_pit_state2``."""
        for member in MEMBERS:
            setattr(self, member, KVM_PIT_STATE2.get(data, f"channels[{self.number}].{member}"))

    def ticks(self, elapsed_ns: int) -> int:
        """Counts in a time."""
        return elapsed_ns * FREQUENCY_HZ // NS

    def value(self, elapsed_ns: int) -> int:
        """What the counter holds that long after it was loaded."""
        ticks = self.ticks(elapsed_ns)
        if self.mode in {0, 1, 4, 5}:
            return self.count - ticks & 0xFFFF
        if self.mode == 3:
            return self.count - 2 * ticks % self.count
        return self.count - ticks % self.count

    def output(self, elapsed_ns: int) -> int:
        """What its output is: 0 or 1."""
        ticks, count = self.ticks(elapsed_ns), self.count
        if self.mode == 1:
            return int(ticks < count)
        if self.mode == 2:
            return int(ticks % count == 0 and ticks != 0)
        if self.mode == 3:
            return int(ticks % count < count + 1 >> 1)
        if self.mode in {4, 5}:
            return int(ticks == count)
        return int(ticks >= count)

    def latch_count(self, elapsed_ns: int) -> None:
        """Hold the count until it is read."""
        if not self.count_latched:
            self.latched_count = self.value(elapsed_ns) & 0xFFFF
            self.count_latched = self.rw_mode

    def latch_status(self, elapsed_ns: int) -> None:
        """Hold the status until it is read; the null-count bit is always clear."""
        if not self.status_latched:
            output = self.output(elapsed_ns)
            status = output << 7 | self.rw_mode << 4 | self.mode << 1 | self.bcd
            self.status = status & 0xFF
            self.status_latched = 1

    def command(self, value: int, elapsed_ns: int) -> None:
        """A control word for this counter."""
        access = value >> 4 & 3
        if not access:
            self.latch_count(elapsed_ns)
            return
        self.rw_mode = self.read_state = self.write_state = access
        mode = value >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = value & 1

    def write(self, value: int) -> int | None:
        """A byte of a new count; the count once it is complete."""
        if self.write_state == FIRST:
            self.write_latch = value
            self.write_state = SECOND
            return None
        if self.write_state == SECOND:
            self.write_state = FIRST
            return self.write_latch | value << 8
        return value << 8 if self.write_state == HIGH else value

    def read(self, elapsed_ns: int) -> int:
        """A byte of the status or the count, of what is latched first."""
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            how, count = self.count_latched, self.latched_count
            self.count_latched = HIGH if how == FIRST else 0
            return count >> 8 if how == HIGH else count & 0xFF
        count = self.value(elapsed_ns)
        how = self.read_state
        if how in {FIRST, SECOND}:
            self.read_state = SECOND if how == FIRST else FIRST
        return (count >> 8 if how in {HIGH, SECOND} else count) & 0xFF

    def set_gate(self, gate: int, now_ns: int) -> None:
        """Its input changes; a rising one starts the count again in most modes."""
        if self.mode in {1, 2, 3, 5} and gate > self.gate:
            self.count_load_time = now_ns
        self.gate = gate
