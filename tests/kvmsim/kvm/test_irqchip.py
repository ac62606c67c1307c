from errno import EBADF, EBUSY, EEXIST, EINVAL, ENOENT

import pytest

from kvmsim.abi import ioctls, irq
from kvmsim.abi.regs import KVM_LAPIC_STATE
from kvmsim.engine.base import Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm import irqchip, lapic, routing
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.run import Halted


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


@pytest.fixture
def vm(kvm):
    vm = kvm().create_vm(0, LocalClient(1))
    vm.create_irqchip()
    return vm


def status(vm, number, up):
    data = irq.KVM_IRQ_LEVEL.pack(irq=number, level=up)
    vm.ioctl(ioctls.KVM_IRQ_LINE_STATUS, data)
    return irq.KVM_IRQ_LEVEL.get(data, "irq")


def test_edge_is_noted_once_until_it_is_taken(vm):
    pic = irqchip.of(vm).pics.chips[0]
    answers = [status(vm, 5, up) for up in (1, 0, 1)]
    assert answers[0] == 1
    assert irq.KVM_PIC_STATE.get(pic, "irr") == 1 << 5
    # Still pending at the PIC: coalesced; the IOAPIC, masked, does not count.
    assert answers[2] == 0


def test_level_goes_with_its_line(vm):
    pic = irqchip.of(vm).pics.chips[1]
    irq.KVM_PIC_STATE.put(pic, "elcr", 1 << 2)
    status(vm, 10, 1)
    assert irq.KVM_PIC_STATE.get(pic, "irr") == 1 << 2
    status(vm, 10, 0)
    assert irq.KVM_PIC_STATE.get(pic, "irr") == 0


def test_line_nobody_listens_to(vm):
    assert status(vm, 200, 1) == 0xFFFFFFFF


def switch_on(vcpu):
    page = bytearray(1024)
    vcpu.ioctl(ioctls.KVM_GET_LAPIC, page)
    page[0xF1] = 1
    vcpu.ioctl(ioctls.KVM_SET_LAPIC, page)


def test_ioapic_pin_that_is_not_masked_takes_the_line(vm):
    vcpu = vm.create_vcpu(0)
    ioapic = irqchip.of(vm).ioapic
    ioapic.table[20] = 0x31
    assert status(vm, 20, 1) == 0  # the local APIC is off
    status(vm, 20, 0)
    switch_on(vcpu)
    assert status(vm, 20, 1) == 1
    assert ioapic.irr == 1 << 20
    assert lapic.of(vcpu).irr == 1 << 0x31


def message(destination, vector, **values):
    return irq.KVM_MSI.pack(address_lo=0xFEE00000 | destination << 12, data=vector, **values)


def test_message_is_requested_at_its_destination_and_ends_a_halt(vm):
    first, second = (vm.create_vcpu(vcpu_id) for vcpu_id in range(2))
    assert vm.ioctl(ioctls.KVM_SIGNAL_MSI, message(0, 0x45)) == 0  # not switched on yet
    switch_on(first)
    first.engine = Scripted([Hlt()], 1)
    first.kvm_run(0)
    assert isinstance(first.resume(0), Halted)
    assert vm.ioctl(ioctls.KVM_SIGNAL_MSI, message(0, 0x45)) == 1
    assert [lapic.of(vcpu).get(0x200 + 0x20) for vcpu in (first, second)] == [1 << 5, 0]
    assert first.resume(0) is not None
    assert vm.ioctl(ioctls.KVM_SIGNAL_MSI, message(9, 0x45)) == 0
    assert errno_of(vm.ioctl, ioctls.KVM_SIGNAL_MSI, message(0, 0x45, flags=2)) == EINVAL


def test_init_sets_the_apic_back(vm):
    vcpu = vm.create_vcpu(0)
    page = bytearray(1024)
    page[0xF0] = 0xEE
    vcpu.ioctl(ioctls.KVM_SET_LAPIC, page)
    vcpu.init()
    vcpu.ioctl(ioctls.KVM_GET_LAPIC, page)
    assert KVM_LAPIC_STATE.get(page, "regs", 0xF0) == 0xFF


# -- eventfds ------------------------------------------------------------------------------------


def irqfd(vm, fd, **values):
    return vm.ioctl(ioctls.KVM_IRQFD, irq.KVM_IRQFD.pack(fd=fd & 0xFFFFFFFF, **values))


def test_eventfd_is_wired_to_one_interrupt(vm):
    fd = vm.creator.open(None)
    assert irqfd(vm, fd, gsi=5) == 0
    assert errno_of(lambda: irqfd(vm, fd, gsi=6)) == EBUSY
    assert irqfd(vm, fd, gsi=5, flags=1) == 0
    assert irqfd(vm, fd, gsi=6) == 0
    assert [(wire.eventfd.identity, wire.gsi) for wire in routing.of(vm).irqfds] == [(fd, 6)]


def test_what_is_no_eventfd_is_not_wired(vm):
    assert errno_of(lambda: irqfd(vm, 99)) == EBADF
    assert errno_of(lambda: irqfd(vm, vm.creator.open(vm))) == EINVAL


def test_without_controllers_there_is_nothing_to_wire_to(kvm):
    vm = kvm().create_vm(0, LocalClient(1))
    fd = vm.creator.open(None)
    assert errno_of(lambda: irqfd(vm, fd)) == EINVAL


def ioeventfd(vm, fd, addr=0x1000, size=4, **values):
    data = irq.KVM_IOEVENTFD.pack(fd=fd, addr=addr, len=size, **values)
    return vm.ioctl(ioctls.KVM_IOEVENTFD, data)


MATCH, PIO, DEASSIGN = 1, 2, 4


@pytest.mark.parametrize(
    ("second", "collides"),
    [
        ({}, True),
        ({"size": 0}, True),
        ({"size": 2}, False),
        ({"flags": PIO}, False),
        ({"addr": 0x1004}, False),
        ({"flags": MATCH, "datamatch": 1}, True),
    ],
)
def test_two_eventfds_for_one_write_collide(vm, second, collides):
    fds = [vm.creator.open(None) for _ in range(2)]
    ioeventfd(vm, fds[0])
    if collides:
        assert errno_of(lambda: ioeventfd(vm, fds[1], **second)) == EEXIST
    else:
        assert ioeventfd(vm, fds[1], **second) == 0


def test_values_that_differ_do_not_collide(vm):
    fd = vm.creator.open(None)
    assert [ioeventfd(vm, fd, flags=MATCH, datamatch=value) for value in (1, 2)] == [0, 0]
    assert errno_of(lambda: ioeventfd(vm, fd, flags=MATCH, datamatch=1)) == EEXIST


def test_only_what_was_assigned_can_be_taken_off(vm):
    fd, other = (vm.creator.open(None) for _ in range(2))
    ioeventfd(vm, fd)
    assert errno_of(lambda: ioeventfd(vm, other, flags=DEASSIGN)) == ENOENT
    assert ioeventfd(vm, fd, flags=DEASSIGN) == 0
    assert errno_of(lambda: ioeventfd(vm, fd, flags=DEASSIGN)) == ENOENT
