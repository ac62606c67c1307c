import os
from errno import EBADF, EBUSY, EINTR, EINVAL

import pytest

from kvmsim.abi import ioctls, irq
from kvmsim.abi.regs import KVM_SREGS, KVM_VCPU_EVENTS
from kvmsim.abi.structs import KVM_REGS

DONE, INVALID, INTERRUPTED = (0, 0), (-1, EINVAL), (-1, EINTR)
IMMEDIATE_EXIT, FLAGS, CR8, VALID, DIRTY = 1, 14, 16, 288, 296
REGS, SREGS, EVENTS = 304, 448, 760


@pytest.fixture
def page(world, vcpu):
    """The page of a vCPU that leaves KVM_RUN before it enters the guest."""
    page = world.page(vcpu)
    page[IMMEDIATE_EXIT] = 1
    return page


def put(page, at, value, size_bytes=8):
    page[at : at + size_bytes] = value.to_bytes(size_bytes, "little")


def get(page, at, size_bytes=8):
    return int.from_bytes(page[at : at + size_bytes], "little")


def show(world, vcpu, page):
    """Have all register sets shown."""
    put(page, VALID, 7)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INTERRUPTED


def test_row_84_register_sets_are_shown(world, vcpu, page):
    show(world, vcpu, page)
    regs = bytearray(144)
    sregs = bytearray(312)
    world.ioctl(vcpu, ioctls.KVM_GET_REGS, regs)
    world.ioctl(vcpu, ioctls.KVM_GET_SREGS, sregs)
    assert page[REGS : REGS + 144] == regs
    assert page[SREGS : SREGS + 312] == sregs
    assert get(page, EVENTS + 20, 4) == 0xD


def test_dirty_sets_are_applied_also_by_an_immediate_exit(world, vcpu, page):
    show(world, vcpu, page)
    put(page, REGS + KVM_REGS.fields["rax"].offset, 0x77)
    put(page, SREGS + KVM_SREGS.fields["cr2"].offset, 0x1234)
    put(page, EVENTS + KVM_VCPU_EVENTS.fields["nmi.pending"].offset, 1, 1)
    put(page, DIRTY, 7)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INTERRUPTED
    assert get(page, DIRTY) == 0
    regs, sregs, events = bytearray(144), bytearray(312), bytearray(64)
    world.ioctl(vcpu, ioctls.KVM_GET_REGS, regs)
    world.ioctl(vcpu, ioctls.KVM_GET_SREGS, sregs)
    world.ioctl(vcpu, ioctls.KVM_GET_VCPU_EVENTS, events)
    assert KVM_REGS.get(regs, "rax") == 0x77
    assert KVM_SREGS.get(sregs, "cr2") == 0x1234
    assert KVM_VCPU_EVENTS.get(events, "nmi.pending") == 1


@pytest.mark.parametrize("at", [VALID, DIRTY])
@pytest.mark.parametrize("bits", [8, 1 << 63, 0xF])
def test_row_70_sets_there_are_not(world, vcpu, page, at, bits):
    put(page, at, bits)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INVALID
    put(page, at, 0)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INTERRUPTED


def test_refused_set_is_an_error_of_the_run(world, vcpu, page):
    show(world, vcpu, page)
    put(page, SREGS + KVM_SREGS.fields["cr4"].offset, 1 << 40)
    put(page, DIRTY, 3)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INVALID
    assert get(page, DIRTY) == 2


def test_row_69_flags_are_cleared_also_by_a_run_that_is_refused(world, vcpu, page):
    put(page, FLAGS, 0xFFFF, 2)
    put(page, VALID, 1 << 20)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INVALID
    assert get(page, FLAGS, 2) == 0


def test_task_priority_is_taken_from_the_page(world, vcpu, page):
    put(page, CR8, 5)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INTERRUPTED
    sregs = bytearray(312)
    world.ioctl(vcpu, ioctls.KVM_GET_SREGS, sregs)
    assert KVM_SREGS.get(sregs, "cr8") == 5
    put(page, CR8, 16)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INVALID


def test_apic_base_and_interrupt_flag_are_shown(world, vcpu, page):
    regs = KVM_REGS.pack(rflags=0x202)
    world.ioctl(vcpu, ioctls.KVM_SET_REGS, regs)
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INTERRUPTED
    assert get(page, 24) == 0xFEE00900
    assert (page[12], page[13]) == (1, 1)


def test_row_79_waiting_processor_leaves_at_once(world, vm):
    world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP)
    vcpu = world.make(vm, ioctls.KVM_CREATE_VCPU, 1)
    page = world.page(vcpu)
    page[IMMEDIATE_EXIT] = 1
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == INTERRUPTED


# -- eventfds ------------------------------------------------------------------------------------


@pytest.fixture
def eventfd(world):
    return world.eventfd()


def irqfd(world, vm, fd, **values):
    return world.ioctl(vm, ioctls.KVM_IRQFD, irq.KVM_IRQFD.pack(fd=fd, **values))


def test_eventfd_wired_twice(world, vm, eventfd):
    assert irqfd(world, vm, eventfd, gsi=5) == INVALID
    world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP)
    answers = [irqfd(world, vm, eventfd, gsi=5) for _ in range(2)]
    assert answers == [DONE, (-1, EBUSY)]
    assert irqfd(world, vm, eventfd, gsi=5, flags=1) == DONE
    assert irqfd(world, vm, eventfd, gsi=5) == DONE
    assert irqfd(world, vm, 0xFFFFFFFF) == (-1, EBADF)
    assert irqfd(world, vm, world.fd(vm)) == INVALID


def test_eventfd_for_a_write(world, vm, eventfd):
    def ioeventfd(fd=eventfd, **values):
        data = irq.KVM_IOEVENTFD.pack(fd=fd, addr=0x1000, len=4, **values)
        return world.ioctl(vm, ioctls.KVM_IOEVENTFD, data)[1]

    names = [os.strerror(errno) for errno in (0, 17, 0, 2, 9)]
    got = [
        ioeventfd(),
        ioeventfd(),
        ioeventfd(flags=4),
        ioeventfd(flags=4),
        ioeventfd(fd=0xFFFFFFFF),
    ]
    assert [os.strerror(errno) for errno in got] == names
