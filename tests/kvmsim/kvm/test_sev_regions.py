from errno import EFAULT, EINVAL, EIO, ENOMEM, ENOTTY

import pytest

REG, UNREG = 0x8010AEBB, 0x8010AEBC
SEV = 2


@pytest.fixture
def memory(vmm):
    return vmm.memory(bytes(4 * 4096))[0]


def test_region_is_registered_and_taken_back(vmm, memory):
    vm = vmm.guest()
    assert vmm.region(vm, memory, 8192) == 0
    assert vmm.region(vm, memory, 8192, UNREG) == 0
    assert vmm.region(vm, memory, 8192, UNREG) == EINVAL


def test_one_range_may_be_registered_twice(vmm, memory):
    vm = vmm.guest()
    assert [vmm.region(vm, memory, 4096) for _ in range(2)] == [0, 0]
    assert [vmm.region(vm, memory, 4096, UNREG) for _ in range(3)] == [0, 0, EINVAL]


@pytest.mark.parametrize(("offset", "size"), [(4096, 8192), (0, 4096)])
def test_only_exactly_what_was_registered_can_be_taken_back(vmm, memory, offset, size):
    vm = vmm.guest()
    vmm.region(vm, memory, 8192)
    assert vmm.region(vm, memory + offset, size, UNREG) == EINVAL


@pytest.mark.parametrize("request_number", [REG, UNREG])
def test_region_of_a_plain_vm_is_enotty(vmm, memory, request_number):
    assert vmm.region(vmm.create(0), memory, 4096, request_number) == ENOTTY


@pytest.mark.parametrize("request_number", [REG, UNREG])
def test_unreadable_region_is_efault_even_on_a_plain_vm(vmm, request_number):
    assert vmm.errno(vmm.create(0).ioctl, request_number, 8, vmm.client) == EFAULT


@pytest.mark.parametrize("request_number", [REG, UNREG])
def test_region_of_an_intel_vm_is_enotty(kvm, vmm, request_number):
    client = type(vmm)(kvm('vendor = "intel"\n'))
    assert client.region(client.create(0), 4096, 4096, request_number) == ENOTTY


@pytest.mark.parametrize("request_number", [REG, UNREG])
def test_region_of_a_mirror_is_einval(vmm, memory, request_number):
    mirror = vmm.create()
    vmm.mirror(mirror, vmm.guest())
    assert vmm.region(mirror, memory, 4096, request_number) == EINVAL


@pytest.mark.parametrize(("address", "size"), [(4096, 0), (2**64 - 4096, 8192)])
def test_empty_or_wrapping_region_is_einval(vmm, address, size):
    assert vmm.region(vmm.guest(), address, size) == EINVAL


def test_unmapped_region_is_enomem(vmm, memory):
    assert vmm.region(vmm.guest(), memory, 8 * 4096) == ENOMEM


def test_memlock_limit_counts_all_pages_of_the_vm(vmm, memory):
    vm = vmm.guest()
    vmm.client.memlock_bytes = 3 * 4096
    assert vmm.region(vm, memory, 8192) == 0
    assert vmm.region(vm, memory, 8192) == ENOMEM
    assert vmm.region(vm, memory + 100, 4096 - 100) == 0
    assert vmm.region(vm, memory, 1) == ENOMEM
    assert vmm.region(vm, memory, 8192, UNREG) == 0
    assert vmm.region(vm, memory + 4095, 2) == 0


def test_pinned_regions_leave_less_room_for_a_load(vmm, memory):
    vm = vmm.started()
    vmm.client.memlock_bytes = 2 * 4096
    vmm.region(vm, memory, 8192)
    assert vmm.load(vm, memory, 4096).errno == ENOMEM


def test_region_of_a_dead_vm_is_eio(vmm, memory):
    vm = vmm.guest()
    vmm.move(vmm.create(), vm)
    assert vmm.region(vm, memory, 4096) == EIO
