from errno import E2BIG, EFAULT, EINVAL, ENXIO

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2, KVM_DEVICE_ATTR, KVM_ENABLE_CAP

#: Capabilities QEMU 7.2 and the selftests' library need.
YES = (
    0,
    3,
    4,
    7,
    14,
    21,
    23,
    30,
    32,
    33,
    34,
    35,
    36,
    41,
    50,
    51,
    55,
    56,
    61,
    98,
    105,
    136,
    164,
    200,
    203,
    209,
    231,
)


def cap(number, *args, flags=0, pad=0):
    data = KVM_ENABLE_CAP.pack(cap=number, flags=flags, pad=pad)
    for index, value in enumerate(args):
        KVM_ENABLE_CAP.put(data, "args", value, index)
    return data


def cpuid(nent, entries=0):
    return KVM_CPUID2.pack(nent=nent) + bytearray(40 * entries)


@pytest.mark.parametrize(
    ("request_number", "arg", "expected"),
    [
        pytest.param(ioctls.KVM_GET_API_VERSION, 0, (12, 0), id="row 1"),
        pytest.param(ioctls.KVM_GET_API_VERSION, 1, (-1, EINVAL), id="row 1 with argument"),
        pytest.param(ioctls.KVM_GET_VCPU_MMAP_SIZE, 0, (12288, 0), id="row 2"),
        pytest.param(ioctls.KVM_GET_VCPU_MMAP_SIZE, 1, (-1, EINVAL), id="row 2 with argument"),
        pytest.param(ioctls.KVM_CREATE_VM, 0, ("fd", 0), id="row 3"),
        *(
            pytest.param(ioctls.KVM_CREATE_VM, kind, (-1, EINVAL), id=f"row 4 type {kind}")
            for kind in (1, 2, 3, 4, 5, 6, 31, 32, 63, 64, -1)
        ),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 197, (1, 0), id="row 6"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 206, (1, 0), id="row 6 move"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 10, (32764, 0), id="row 8 memslots"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 15, (2, 0), id="row 8 coalesced"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 66, (1024, 0), id="row 8 vcpus"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 128, (4096, 0), id="row 8 ids"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 25, (4096, 0), id="row 9 routes"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 31, (32, 0), id="row 9 banks"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 201, (4096, 0), id="row 9 hypercalls"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 195, (2031619, 0), id="row 9 guest debug"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 74, (7, 0), id="row 10"),
        *(
            pytest.param(ioctls.KVM_CHECK_EXTENSION, number, (1, 0), id=f"present {number}")
            for number in YES
        ),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 9999, (0, 0), id="row 11"),
        pytest.param(ioctls.KVM_ENABLE_CAP, cap(193, 2), (-1, EINVAL), id="row 12"),
        pytest.param(0xAEFF, 0, (-1, EINVAL), id="row 32 system"),
        pytest.param(ioctls.KVM_CREATE_VCPU, 0, (-1, EINVAL), id="row 34 system"),
        pytest.param(ioctls.KVM_HAS_DEVICE_ATTR, 0, (-1, EFAULT), id="attr null"),
        pytest.param(ioctls.KVM_GET_SUPPORTED_CPUID, cpuid(1, 1), (-1, E2BIG), id="row 101"),
        pytest.param(ioctls.KVM_GET_SUPPORTED_CPUID, 0, (-1, EFAULT), id="row 101 null"),
        pytest.param(ioctls.KVM_GET_SUPPORTED_CPUID, cpuid(257, 257), (0, 0), id="row 101 large"),
    ],
)
def test_system_descriptor(world, request_number, arg, expected):
    assert world.ioctl(world.system, request_number, arg) == expected


def test_row_8_recommended_vcpus_are_the_online_cpus(world):
    assert world.ioctl(world.system, ioctls.KVM_CHECK_EXTENSION, 9) == (world.cpus(), 0)


@pytest.mark.parametrize(("group", "attr", "expected"), [(1, 0, ENXIO), (0, 1, ENXIO), (0, 0, 0)])
def test_rows_40_and_41_attributes_of_the_system(world, group, attr, expected):
    data = KVM_DEVICE_ATTR.pack(group=group, attr=attr)
    answer = (-1, expected) if expected else (0, 0)
    assert world.ioctl(world.system, ioctls.KVM_HAS_DEVICE_ATTR, data) == answer


def test_row_41_value_names_x87_and_sse(world):
    address, memory = world.pages(1)
    data = KVM_DEVICE_ATTR.pack(addr=address)
    assert world.ioctl(world.system, ioctls.KVM_GET_DEVICE_ATTR, data) == (0, 0)
    assert memory[0] & 3 == 3


def test_row_101_number_of_entries_is_set(world):
    data = cpuid(256, 256)
    assert world.ioctl(world.system, ioctls.KVM_GET_SUPPORTED_CPUID, data) == (0, 0)
    assert 10 < KVM_CPUID2.get(data, "nent") < 100


def test_emulated_cpuid_is_smaller_than_the_supported_one(world):
    data = cpuid(256, 256)
    assert world.ioctl(world.system, ioctls.KVM_GET_EMULATED_CPUID, data) == (0, 0)
    assert 0 < KVM_CPUID2.get(data, "nent") < 10
    assert world.ioctl(world.system, ioctls.KVM_GET_EMULATED_CPUID, cpuid(0)) == (-1, E2BIG)


def test_machine_checks_can_be_controlled_and_recovered(world):
    data = bytearray(8)
    assert world.ioctl(world.system, ioctls.KVM_X86_GET_MCE_CAP_SUPPORTED, data) == (0, 0)
    assert int.from_bytes(data, "little") & (1 << 24 | 1 << 8) == 1 << 24 | 1 << 8
