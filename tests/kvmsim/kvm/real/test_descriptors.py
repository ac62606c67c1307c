from errno import EEXIST, EFAULT, EINVAL, EIO, ENOTTY

import pytest

from kvmsim.abi import ioctls


@pytest.mark.parametrize(
    ("request_number", "expected"),
    [
        pytest.param(0xAEFF, (-1, ENOTTY), id="row 32"),
        pytest.param(0x5300, (-1, ENOTTY), id="row 33"),
        pytest.param(ioctls.KVM_GET_API_VERSION, (-1, ENOTTY), id="row 35"),
        pytest.param(ioctls.KVM_MEMORY_ENCRYPT_OP, (-1, ENOTTY), id="row 37"),
    ],
)
def test_vm_descriptor(world, vm, request_number, expected):
    assert world.ioctl(vm, request_number) == expected


@pytest.mark.parametrize(("vcpu_id", "errno"), [(0, EEXIST), (4096, EINVAL), (1 << 32, EINVAL)])
def test_row_64_create_vcpu(world, vm, vcpu, vcpu_id, errno):
    assert world.ioctl(vm, ioctls.KVM_CREATE_VCPU, vcpu_id) == (-1, errno)


def test_row_62_irqchip_after_a_vcpu(world, vm, vcpu):
    assert world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP) == (-1, EINVAL)


def test_row_62_irqchip_twice(world, vm):
    answers = [world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP) for _ in range(2)]
    assert answers == [(0, 0), (-1, EEXIST)]


def test_row_67_initial_mp_states(world, vm):
    world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP)
    states = [bytearray(4), bytearray(4)]
    for vcpu_id, state in enumerate(states):
        vcpu = world.make(vm, ioctls.KVM_CREATE_VCPU, vcpu_id)
        assert world.ioctl(vcpu, ioctls.KVM_GET_MP_STATE, state) == (0, 0)
    assert [state[0] for state in states] == [0, 1]


def test_row_104_tsc_frequency_of_vm_and_vcpu_is_the_same(world, vm, vcpu):
    of_vm = world.ioctl(vm, ioctls.KVM_GET_TSC_KHZ)
    assert of_vm == world.ioctl(vcpu, ioctls.KVM_GET_TSC_KHZ)
    assert of_vm[0] > 0


def test_row_112_vcpu_works_after_its_vm_descriptor_is_closed(world, vm, vcpu):
    world.release(vm)
    assert world.ioctl(vcpu, ioctls.KVM_GET_REGS, bytearray(144)) == (0, 0)


def test_row_111_another_address_space_is_eio_whatever_it_asks(world, vm, vcpu):
    assert world.foreign_ioctl(vm, 0xAEFF) == (-1, EIO)
    assert world.foreign_ioctl(vcpu, 0x5300) == (-1, EIO)


@pytest.mark.parametrize(
    ("request_number", "of_null"),
    [
        pytest.param(ioctls.KVM_MEMORY_ENCRYPT_OP, ENOTTY, id="row 37"),
        pytest.param(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, EFAULT, id="row 38"),
        pytest.param(ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION, EFAULT, id="row 39"),
    ],
)
def test_memory_encryption_there_is_not(world, vm, request_number, of_null):
    assert world.ioctl(vm, request_number, 0) == (-1, of_null)
    assert world.ioctl(vm, request_number, bytearray(24)) == (-1, ENOTTY)
