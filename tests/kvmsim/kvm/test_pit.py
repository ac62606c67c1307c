"""The interval timer over time; its registers are compared in real/guest."""

import pytest

from kvmsim.abi import ioctls, irq
from kvmsim.kvm import irqchip, pit
from kvmsim.kvm.client import LocalClient

MS = 1_000_000
#: 1193182 Hz.
MILLISECOND = 1193


@pytest.fixture
def vm(kvm):
    vm = kvm('vendor = "amd"\n').create_vm(0, LocalClient(1))
    vm.create_irqchip()
    return vm


@pytest.fixture
def timer(vm):
    vm.ioctl(ioctls.KVM_CREATE_PIT2, bytearray(irq.KVM_PIT_CONFIG.pack(flags=1)))
    return pit.of(vm)


def out(timer, port, *values, now_ns=0):
    for value in values:
        timer.write(port, bytes([value]), now_ns)


def count(timer, now_ns, channel=0):
    """Latch a counter and read it."""
    out(timer, 0x43, channel << 6, now_ns=now_ns)
    return int.from_bytes(
        b"".join(timer.read(0x40 + channel, 1, now_ns) for _ in range(2)), "little"
    )


def ticks(vm, until_ns, *, acknowledge=True):
    """Times at which the line was pulsed."""
    times = []
    timer, chips = pit.of(vm), irqchip.of(vm)
    while timer.due_ns is not None and timer.due_ns <= until_ns:
        now_ns = timer.due_ns
        timer.expire(now_ns)
        if chips.pics.chips[0][1] & 1:
            times.append(now_ns)
            chips.pics.chips[0][1] &= ~1
            if acknowledge:
                timer.acknowledged(now_ns)
    return times


def test_periodic_counter_ticks_at_multiples_of_its_period(vm, timer):
    out(timer, 0x43, 0x34)
    out(timer, 0x40, MILLISECOND & 0xFF, MILLISECOND >> 8)
    period_ns = MILLISECOND * 10**9 // 1_193_182
    assert ticks(vm, 10 * MS) == [n * period_ns for n in range(1, 11)]


def test_one_shot_counter_ticks_once(vm, timer):
    out(timer, 0x43, 0x30)
    out(timer, 0x40, MILLISECOND & 0xFF, MILLISECOND >> 8)
    assert len(ticks(vm, 100 * MS)) == 1


@pytest.mark.parametrize("command", [0x38, 0x32])
def test_counter_of_another_kind(vm, timer, command):
    out(timer, 0x43, command)
    out(timer, 0x40, 0xFF, 0xFF)
    assert len(ticks(vm, 100 * MS)) == 1


def test_counter_counts_down(timer):
    out(timer, 0x43, 0xB0)
    out(timer, 0x42, 0x00, 0x80)
    assert count(timer, 0, 2) == 0x8000
    assert count(timer, 10 * MS, 2) == 0x8000 - 11931


def test_ticks_nobody_acknowledged_are_made_up_for(vm, timer):
    out(timer, 0x43, 0x34)
    out(timer, 0x40, MILLISECOND & 0xFF, MILLISECOND >> 8)
    assert len(ticks(vm, 5 * MS, acknowledge=False)) == 1
    assert timer.missed == 5
    for left in (4, 3, 2, 1, 0):
        timer.acknowledged(6 * MS)
        assert timer.missed == left


def test_ticks_nobody_acknowledged_are_lost_without_reinjection(vm, timer):
    timer.reinject = False
    out(timer, 0x43, 0x34)
    out(timer, 0x40, MILLISECOND & 0xFF, MILLISECOND >> 8)
    assert len(ticks(vm, 5 * MS, acknowledge=False)) == 5
    assert timer.missed == 0


def test_speaker_port_shows_the_output_of_channel_2(timer):
    speaker = pit.Speaker(timer)
    out(timer, 0x43, 0xB0)
    out(timer, 0x42, 0xA9, 0x04)  # 1193: a millisecond
    speaker.write(0x61, b"\1", 0)
    assert [speaker.read(0x61, 1, at)[0] & 0x21 for at in (0, MS // 2, 2 * MS)] == [1, 1, 0x21]


def test_an_hpet_in_its_place_stops_the_first_counter(timer):
    out(timer, 0x43, 0x34)
    out(timer, 0x40, MILLISECOND & 0xFF, MILLISECOND >> 8)
    data = timer.pack()
    irq.KVM_PIT_STATE2.put(data, "flags", pit.HPET_LEGACY)
    timer.unpack(bytes(data), pit.HPET_LEGACY, 0)
    assert timer.due_ns is None
