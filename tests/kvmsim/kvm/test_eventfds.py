"""irqfds and ioeventfds: eventfds of a client that are interrupts, or are signalled by writes."""

import pytest

from kvmsim.abi import ioctls, irq
from kvmsim.abi.exits import Exit
from kvmsim.engine.base import Hlt, Io, Mmio
from kvmsim.engine.scripted import Scripted
from kvmsim.kvm import apic_messages, irqchip, lapic
from kvmsim.kvm.client import LocalClient

LEVEL = 1 << 15
RESAMPLE, DEASSIGN = 2, 1
PIO, MATCH, OFF = 2, 1, 4


class FakeEventfd:
    """One descriptor's eventfd."""

    def __init__(self, fd):
        self.identity = fd
        self.signals = 0
        self.told = None
        self.closed = False

    def signal(self):
        self.signals += 1
        return True

    def watch(self, signalled):
        self.told = signalled

    def close(self):
        self.closed = True


class Client(LocalClient):
    """A client whose eventfds can be had."""

    def __init__(self):
        super().__init__(1)
        self.held = []

    def eventfd(self, fd):
        self.held.append(FakeEventfd(fd))
        return self.held[-1]


@pytest.fixture
def vm(kvm):
    vm = kvm().create_vm(0, Client())
    vm.create_irqchip()
    return vm


@pytest.fixture
def vcpu(vm):
    vcpu = vm.create_vcpu(0)
    apic_messages.write(lapic.of(vcpu), lapic.SPIV, 0x1FF, 0)
    return vcpu


def wire(vm, gsi, flags=0, **values):
    fd = vm.creator.open(None)
    vm.ioctl(ioctls.KVM_IRQFD, irq.KVM_IRQFD.pack(fd=fd, gsi=gsi, flags=flags, **values))
    return fd


def test_signal_is_a_pulse_on_the_line(vm, vcpu):
    irqchip.of(vm).ioapic.table[20] = 0x51
    wire(vm, 20)
    (eventfd,) = vm.creator.held
    eventfd.told(5)
    assert lapic.of(vcpu).irr == 1 << 0x51
    assert irqchip.of(vm).ioapic.irr == 0


def test_line_with_a_resample_stays_up_until_the_guest_ends_the_interrupt(vm, vcpu):
    irqchip.of(vm).ioapic.table[20] = LEVEL | 0x51
    wire(vm, 20, RESAMPLE, resamplefd=vm.creator.open(None))
    eventfd, resample = vm.creator.held
    eventfd.told(5)
    assert irqchip.of(vm).ioapic.irr == 1 << 20
    apic = lapic.of(vcpu)
    apic.acknowledge(0x51)
    apic_messages.end_of_interrupt(apic, 9)
    assert (irqchip.of(vm).ioapic.irr, resample.signals, apic.irr) == (0, 1, 0)


def test_what_is_taken_off_is_let_go(vm):
    fd = wire(vm, 20)
    vm.ioctl(ioctls.KVM_IRQFD, irq.KVM_IRQFD.pack(fd=fd, gsi=20, flags=DEASSIGN))
    assert [one.closed for one in vm.creator.held] == [True, True]


def test_eventfds_go_with_the_vm(vm):
    wire(vm, 20)
    listen(vm, addr=0x40, len=1, flags=PIO)
    vm.release()
    assert [one.closed for one in vm.creator.held] == [True, True]


def listen(vm, **values):
    fd = vm.creator.open(None)
    vm.ioctl(ioctls.KVM_IOEVENTFD, irq.KVM_IOEVENTFD.pack(fd=fd, **values))
    return vm.creator.held[-1]


def exits(vcpu, *stops):
    """Reasons of the exits of a guest that makes these stops and halts."""
    vcpu.engine = Scripted([*stops, Hlt()], 1)
    found = []
    while True:
        blocked = vcpu.kvm_run(0)
        while blocked is not None:
            if vcpu.mp_state:
                vcpu.phase = 0
                return found
            blocked = vcpu.resume(0)
        found.append(vcpu.run.exit_reason)


@pytest.mark.parametrize(
    ("values", "stop", "signals"),
    [
        ({"addr": 0x510, "len": 2, "flags": PIO}, Io(port=0x510, size=2, data=b"ab"), 1),
        ({"addr": 0x510, "len": 2, "flags": PIO}, Io(port=0x510, size=1, data=b"a"), 0),
        ({"addr": 0x510, "len": 2, "flags": PIO}, Io(port=0x511, size=2, data=b"ab"), 0),
        ({"addr": 0x510, "len": 2}, Io(port=0x510, size=2, data=b"ab"), 0),
        ({"addr": 0x510, "len": 2, "flags": PIO}, Io(port=0x510, size=2), 0),
        ({"addr": 1 << 40, "len": 4}, Mmio(gpa=1 << 40, data=b"abcd"), 1),
        ({"addr": 1 << 40, "len": 0}, Mmio(gpa=1 << 40, data=b"a"), 1),
        ({"addr": 64, "len": 2, "flags": MATCH, "datamatch": 7}, Mmio(gpa=64, data=b"\7\0"), 1),
        ({"addr": 64, "len": 2, "flags": MATCH, "datamatch": 7}, Mmio(gpa=64, data=b"\7\1"), 0),
    ],
)
def test_write_that_matches_signals_and_is_no_exit(vm, vcpu, values, stop, signals):
    eventfd = listen(vm, **values)
    reason = Exit.IO if isinstance(stop, Io) else Exit.MMIO
    assert exits(vcpu, stop) == ([] if signals else [reason])
    assert eventfd.signals == signals


def test_write_whose_eventfd_cannot_be_reached_stays_an_exit(kvm):
    vm = kvm().create_vm(0, LocalClient(1))
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    fd = vm.creator.open(None)
    vm.ioctl(ioctls.KVM_IOEVENTFD, irq.KVM_IOEVENTFD.pack(fd=fd, addr=64, len=1, flags=PIO))
    assert exits(vcpu, Io(port=64, data=b"a")) == [Exit.IO]
