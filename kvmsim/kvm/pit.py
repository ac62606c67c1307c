"""The PC's interval timer in the kernel: three counters, the first of which interrupts (GSI 0).

A tick comes at most once per interrupt the guest has acknowledged: with re-injection, which is the
default, ticks that could not be delivered are counted and made up for. Behaviour: Linux 6.12
i8254.c.
"""

from __future__ import annotations

from errno import EEXIST, ENOENT, ENXIO
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import (
    KVM_CREATE_PIT,
    KVM_CREATE_PIT2,
    KVM_GET_PIT,
    KVM_GET_PIT2,
    KVM_REINJECT_CONTROL,
    KVM_SET_PIT,
    KVM_SET_PIT2,
)
from kvmsim.abi.irq import KVM_PIT_CONFIG, KVM_PIT_STATE, KVM_PIT_STATE2
from kvmsim.abi.irq import KVM_REINJECT_CONTROL as REINJECT_CONTROL_STRUCT
from kvmsim.errors import KvmError
from kvmsim.kvm import bus, irqchip, lapic, lines
from kvmsim.kvm.dispatch import VmFile, handles, state_of
from kvmsim.kvm.pit_channel import FREQUENCY_HZ, LONGEST, NS, Channel

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

PORTS, SPEAKER_PORT = range(0x40, 0x44), 0x61
CONTROL = 3
FLAG_SPEAKER = 1
HPET_LEGACY, SPEAKER_ON = 1, 2
#: Linux 6.12: module parameter min_timer_period_us.
MIN_PERIOD_NS = 200_000
#: The refresh bit of port 0x61 toggles about every 15 us.
REFRESH_SHIFT = 14


class Pit:
    """The timer of one VM.

    Args:
        vm: the VM.

    Attributes:
        channels: its counters; empty: there is no timer.
        flags: ``HPET_LEGACY``: an HPET drives GSI 0 instead; ``SPEAKER_ON``.
        reinject: ticks the guest missed are made up for.
        due_ns: when the next tick is; None: never.
        missed: ticks that wait for the guest to acknowledge one.
    """

    __slots__ = (
        *("_acknowledged", "_period_ns", "_vm", "channels", "due_ns", "flags", "missed"),
        "reinject",
    )

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.channels: list[Channel] = []
        self.flags = 0
        self.reinject = True
        self.due_ns: int | None = None
        self.missed = 0
        self._period_ns = 0
        self._acknowledged = True

    def create(self, flags: int, now_ns: int) -> None:
        """Power it on. The gate of channel 2, the speaker's, is down."""
        self.channels = [Channel(number, now_ns) for number in range(3)]
        attached = bus.of(self._vm)
        attached.attach_ports(self, PORTS)
        if flags & FLAG_SPEAKER:
            attached.attach_ports(Speaker(self), (SPEAKER_PORT,))
        wires = lines.of(self._vm)
        wires.on_end[0] = self.acknowledged
        wires.on_unmask[0] = self.restart_reinjection

    def pack(self) -> bytearray:
        """The bytes of ``kvm_pit_state2``."""
        data = KVM_PIT_STATE2.pack(flags=self.flags)
        for channel in self.channels:
            channel.store(data)
        return data

    def unpack(self, data: bytes, flags: int, now_ns: int) -> None:
        """Take channels over; they start anew."""
        hpet_comes = flags & HPET_LEGACY and not self.flags & HPET_LEGACY
        self.flags = flags
        for channel in self.channels:
            channel.load_from(data)
            self.load(channel, channel.count, now_ns)
        if hpet_comes:
            self.due_ns = None

    # -- time --------------------------------------------------------------------------------------

    def elapsed(self, channel: Channel, now_ns: int) -> int:
        """Time since a counter was loaded; of channel 0, since its timer was."""
        if channel.number:
            return max(0, now_ns - channel.count_load_time)
        if not self._period_ns:
            return 0
        left_ns = 0 if self.due_ns is None else max(0, self.due_ns - now_ns)
        return (self._period_ns - left_ns) % self._period_ns

    def load(self, channel: Channel, count: int, now_ns: int) -> None:
        """A new count: 0 is 65536."""
        channel.count = count or LONGEST
        if channel.number:
            channel.count_load_time = now_ns
            return
        self.due_ns = None
        if self.flags & HPET_LEGACY or channel.mode not in {0, 1, 2, 3, 4}:
            return
        self._period_ns = channel.count * NS // FREQUENCY_HZ
        if self._is_periodic:
            self._period_ns = max(self._period_ns, MIN_PERIOD_NS)
        self.restart_reinjection()
        self.due_ns = now_ns + self._period_ns

    @property
    def _is_periodic(self) -> bool:
        return self.channels[0].mode in {2, 3}

    def expire(self, now_ns: int) -> None:
        """Bring it up to date: every tick that is due by now."""
        due_ns = self.due_ns
        if due_ns is None or due_ns > now_ns:
            return
        ticks = 1
        if self._is_periodic:
            # From the last deadline, so that nothing adds up.
            ticks += (now_ns - due_ns) // self._period_ns
            self.due_ns = due_ns + ticks * self._period_ns
        else:
            self.due_ns = None
        if self.reinject:
            self.missed += ticks
        self._tick(now_ns)

    def _tick(self, now_ns: int) -> None:
        """A pulse on GSI 0, if the guest has seen the last one."""
        if self.reinject:
            if not self._acknowledged:
                return
            self._acknowledged = False
        for up in (True, False):
            lines.set_line(self._vm, 0, now_ns, up=up, source=lines.PIT)
        self._watchdog(now_ns)

    def _watchdog(self, now_ns: int) -> None:
        """Linux's NMI watchdog by way of LINT0 of every CPU ("virtual wire")."""
        for vcpu in self._vm.vcpus.values():
            apic = lapic.of(vcpu)
            if apic.get(lapic.LVT0) & (lapic.LVT_MASKED | lapic.MODE_MASK) == lapic.NMI:
                apic.deliver_local(lapic.LVT0, now_ns)

    def acknowledged(self, now_ns: int) -> None:
        """The guest has ended the interrupt of a tick."""
        self._acknowledged = True
        if self.missed > 0:
            self.missed -= 1
            if self.missed:
                self._tick(now_ns)

    def restart_reinjection(self) -> None:
        """Forget missed ticks: the timer, or the mask of its pin, was set anew."""
        self.missed = 0
        self._acknowledged = True

    # -- ports -------------------------------------------------------------------------------------

    def read(self, address: int, size: int, now_ns: int) -> bytes:
        """See ``bus.Device``."""
        if address & 3 == CONTROL:
            return bytes(size)
        channel = self.channels[address & 3]
        return bytes([channel.read(self.elapsed(channel, now_ns))])

    def write(self, address: int, data: bytes, now_ns: int) -> None:
        """See ``bus.Device``."""
        value = data[0]
        if address & 3 == CONTROL:
            self._control(value, now_ns)
            return
        channel = self.channels[address & 3]
        count = channel.write(value)
        if count is not None:
            self.load(channel, count, now_ns)

    def _control(self, value: int, now_ns: int) -> None:
        number = value >> 6
        if number < 3:
            channel = self.channels[number]
            channel.command(value, self.elapsed(channel, now_ns))
            return
        for channel in self.channels:  # read back
            if value & 2 << channel.number:
                elapsed_ns = self.elapsed(channel, now_ns)
                if not value & 0x20:
                    channel.latch_count(elapsed_ns)
                if not value & 0x10:
                    channel.latch_status(elapsed_ns)


class Speaker:
    """Port 0x61: the gate of channel 2 and what comes out of it.

    Args:
        pit: whose.
    """

    __slots__ = ("_pit",)

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, address: int, size: int, now_ns: int) -> bytes:
        """See ``bus.Device``."""
        del address, size
        pit = self._pit
        channel = pit.channels[2]
        value = channel.gate | bool(pit.flags & SPEAKER_ON) << 1
        value |= (now_ns >> REFRESH_SHIFT & 1) << 4
        return bytes([value | channel.output(pit.elapsed(channel, now_ns)) << 5])

    def write(self, address: int, data: bytes, now_ns: int) -> None:
        """See ``bus.Device``."""
        del address
        pit = self._pit
        pit.flags = pit.flags & ~SPEAKER_ON | (SPEAKER_ON if data[0] & 2 else 0)
        pit.channels[2].set_gate(data[0] & 1, now_ns)


def of(vm: Vm) -> Pit:
    """The timer of a VM."""
    return state_of(vm, Pit)


def _existing(vm: Vm) -> Pit:
    """The timer; KvmError ENXIO without one."""
    pit = of(vm)
    if not pit.channels:
        raise KvmError(ENXIO, "no interval timer in the kernel")
    return pit


def _create(vm: Vm, flags: int, now_ns: int) -> int:
    pit = of(vm)
    if pit.channels:
        raise KvmError(EEXIST, "an interval timer exists")
    if not irqchip.of(vm).full:
        raise KvmError(ENOENT, "no PIC in the kernel to wire it to")
    pit.create(flags, now_ns)
    return 0


@handles(VmFile, KVM_CREATE_PIT)
def create_pit(vm: Vm, call: Call) -> int:
    """Make the timer, with a speaker port."""
    return _create(vm, FLAG_SPEAKER, call.now_ns)


@handles(VmFile, KVM_CREATE_PIT2)
def create_pit2(vm: Vm, call: Call) -> int:
    """Make the timer; flag 1 gives it a dummy speaker port, others are ignored."""
    flags = KVM_PIT_CONFIG.get(call.read(KVM_PIT_CONFIG.size_bytes), "flags")
    return _create(vm, flags, call.now_ns)


@handles(VmFile, KVM_GET_PIT)
def get_pit(vm: Vm, call: Call) -> int:
    """Copy the channels out."""
    call.read(KVM_PIT_STATE.size_bytes)
    call.write(_existing(vm).pack()[: KVM_PIT_STATE.size_bytes])
    return 0


@handles(VmFile, KVM_SET_PIT)
def set_pit(vm: Vm, call: Call) -> int:
    """Take the channels over."""
    data = call.read(KVM_PIT_STATE.size_bytes)
    pit = _existing(vm)
    pit.unpack(data, pit.flags, call.now_ns)
    return 0


@handles(VmFile, KVM_GET_PIT2)
def get_pit2(vm: Vm, call: Call) -> int:
    """Copy channels and flags out."""
    call.write(_existing(vm).pack())
    return 0


@handles(VmFile, KVM_SET_PIT2)
def set_pit2(vm: Vm, call: Call) -> int:
    """Take channels and flags over."""
    data = call.read(KVM_PIT_STATE2.size_bytes)
    _existing(vm).unpack(data, KVM_PIT_STATE2.get(data, "flags"), call.now_ns)
    return 0


@handles(VmFile, KVM_REINJECT_CONTROL)
def reinject_control(vm: Vm, call: Call) -> int:
    """Say whether missed ticks are made up for."""
    data = call.read(REINJECT_CONTROL_STRUCT.size_bytes)
    _existing(vm).reinject = bool(REINJECT_CONTROL_STRUCT.get(data, "pit_reinject"))
    return 0
