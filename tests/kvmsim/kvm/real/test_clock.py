from errno import EFAULT, EINVAL, ENXIO

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.irq import KVM_CLOCK_DATA
from kvmsim.abi.structs import KVM_DEVICE_ATTR

DONE, INVALID = (0, 0), (-1, EINVAL)


def test_clock_goes_on_from_what_was_set(world, vm):
    data = KVM_CLOCK_DATA.pack(clock=10**15)
    assert world.ioctl(vm, ioctls.KVM_SET_CLOCK, data) == DONE
    assert world.ioctl(vm, ioctls.KVM_GET_CLOCK, data) == DONE
    assert 0 <= KVM_CLOCK_DATA.get(data, "clock") - 10**15 < 10**10


@pytest.mark.parametrize(("flags", "expected"), [(0, DONE), (8, DONE), (1, INVALID), (16, INVALID)])
def test_flags_of_the_clock(world, vm, flags, expected):
    assert world.ioctl(vm, ioctls.KVM_SET_CLOCK, KVM_CLOCK_DATA.pack(flags=flags)) == expected


def test_null_clock(world, vm):
    assert world.ioctl(vm, ioctls.KVM_SET_CLOCK, 0) == (-1, EFAULT)
    assert world.ioctl(vm, ioctls.KVM_GET_CLOCK, 0) == (-1, EFAULT)


def test_guest_without_a_clock_cannot_be_told_it_was_paused(world, vcpu):
    assert world.ioctl(vcpu, ioctls.KVM_KVMCLOCK_CTRL) == INVALID


@pytest.mark.parametrize("request_number", [ioctls.KVM_HAS_DEVICE_ATTR, ioctls.KVM_GET_DEVICE_ATTR])
@pytest.mark.parametrize(("group", "attr"), [(1, 0), (0, 1)])
def test_attribute_of_a_vcpu_there_is_not(world, vcpu, request_number, group, attr):
    data = KVM_DEVICE_ATTR.pack(group=group, attr=attr)
    assert world.ioctl(vcpu, request_number, data) == (-1, ENXIO)


def test_frequency_of_a_vm_with_vcpus_is_fixed(world, vm, vcpu):
    khz, _ = world.ioctl(vm, ioctls.KVM_GET_TSC_KHZ)
    assert world.ioctl(vm, ioctls.KVM_SET_TSC_KHZ, khz) == INVALID
    assert world.ioctl(vcpu, ioctls.KVM_SET_TSC_KHZ, khz) == DONE
