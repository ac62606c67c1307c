from errno import EEXIST, EFAULT, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_ENABLE_CAP


def cap(number, *args, flags=0, pad=0):
    data = KVM_ENABLE_CAP.pack(cap=number, flags=flags, pad=pad)
    for index, value in enumerate(args):
        KVM_ENABLE_CAP.put(data, "args", value, index)
    return data


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        pytest.param(0, (-1, EFAULT), id="row 13"),
        pytest.param(cap(193, 2, flags=1), (-1, EINVAL), id="row 14 on"),
        pytest.param(cap(193, 0, flags=1), (-1, EINVAL), id="row 14 nothing"),
        pytest.param(cap(193, 0), (0, 0), id="row 15"),
        pytest.param(cap(193, 1), (0, 0), id="row 16"),
        pytest.param(cap(193, 2), (0, 0), id="row 17"),
        pytest.param(cap(193, 3), (-1, EINVAL), id="row 18"),
        pytest.param(cap(193, 4), (-1, EINVAL), id="row 19"),
        pytest.param(cap(193, 1 << 32), (-1, EINVAL), id="row 20"),
        pytest.param(cap(193, 1 << 32 | 2), (-1, EINVAL), id="row 20 with a low bit"),
        pytest.param(cap(193, 2, 77), (0, 0), id="row 21 args1"),
        pytest.param(cap(193, 2, pad=5), (0, 0), id="row 21 pad"),
        pytest.param(cap(9999), (-1, EINVAL), id="row 24"),
        pytest.param(cap(188, 1 << 20), (-1, EINVAL), id="row 26"),
        pytest.param(cap(188, 7), (0, 0), id="row 26 all"),
        pytest.param(cap(143, 1 << 10), (-1, EINVAL), id="row 27"),
        pytest.param(cap(143, 2), (0, 0), id="disable HLT exits"),
        pytest.param(cap(164, 1), (0, 0), id="payload"),
        pytest.param(cap(164, 77), (0, 0), id="payload any value"),
        pytest.param(cap(164, 1, flags=1), (-1, EINVAL), id="payload flags"),
        pytest.param(cap(218, 1), (0, 0), id="triple fault"),
        pytest.param(cap(116, 1 << 40), (0, 0), id="quirks"),
        pytest.param(cap(213, 1 << 40), (-1, EINVAL), id="quirks2 unknown"),
        pytest.param(cap(213, 3), (0, 0), id="quirks2"),
        pytest.param(cap(201, 0x1000), (0, 0), id="hypercalls"),
        pytest.param(cap(201, 1), (-1, EINVAL), id="hypercalls unknown"),
        pytest.param(cap(204, 1), (0, 0), id="emulation failure"),
        pytest.param(cap(204, 2), (-1, EINVAL), id="emulation failure unknown"),
        pytest.param(cap(129, 3), (0, 0), id="x2apic"),
        pytest.param(cap(129, 1 << 30), (-1, EINVAL), id="x2apic unknown"),
        pytest.param(cap(168, 1), (0, 0), id="manual protect"),
        pytest.param(cap(168, 2), (-1, EINVAL), id="initially set alone"),
        pytest.param(cap(168, 3), (0, 0), id="manual protect, initially set"),
        pytest.param(cap(182, 12345), (0, 0), id="halt poll"),
        pytest.param(cap(121, 24), (0, 0), id="split"),
        pytest.param(cap(121, 4097), (-1, EINVAL), id="split too many"),
        pytest.param(cap(212, 1), (-1, EINVAL), id="row 31 without a PMU"),
    ],
)
def test_enable_cap_on_the_vm(world, vm, arg, expected):
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, arg) == expected


def test_row_22_bus_lock_exit_after_a_vcpu(world, vm, vcpu):
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(193, 2)) == (0, 0)


def test_row_23_bus_lock_exit_on_the_vcpu(world, vcpu):
    assert world.ioctl(vcpu, ioctls.KVM_ENABLE_CAP, cap(193, 2)) == (-1, EINVAL)


def test_rows_28_and_29_limit_of_vcpu_ids(world, vm):
    answers = [world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(128, limit)) for limit in (4097, 8, 8, 9)]
    assert answers == [(-1, EINVAL), (0, 0), (0, 0), (-1, EINVAL)]
    assert world.ioctl(vm, ioctls.KVM_CREATE_VCPU, 8) == (-1, EINVAL)


def test_row_30_split_irqchip_after_a_vcpu(world, vm, vcpu):
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(121, 24)) == (-1, EEXIST)


def test_row_25_copy_and_move_where_the_vendor_has_no_such_operation(world_of_intel):
    world = world_of_intel
    vm = world.make(world.system, ioctls.KVM_CREATE_VM)
    for number, fd in ((197, 0xFFFFFFFF), (206, world.fd(vm))):
        assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(number, fd)) == (-1, EINVAL)


def test_row_31_pmu_capability_after_a_vcpu(world, vm, vcpu):
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(212, 1)) == (-1, EINVAL)


def test_exits_cannot_be_disabled_after_a_vcpu(world, vm, vcpu):
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(143, 2)) == (-1, EINVAL)


def test_split_irqchip_twice(world, vm):
    answers = [world.ioctl(vm, ioctls.KVM_ENABLE_CAP, cap(121, 24)) for _ in range(2)]
    assert answers == [(0, 0), (-1, EEXIST)]


@pytest.mark.parametrize(
    ("number", "flags", "expected"),
    [(190, 0, (0, 0)), (190, 1, (-1, EINVAL)), (164, 0, (-1, EINVAL))],
)
def test_capabilities_of_a_vcpu(world, vcpu, number, flags, expected):
    assert world.ioctl(vcpu, ioctls.KVM_ENABLE_CAP, cap(number, 1, flags=flags)) == expected
