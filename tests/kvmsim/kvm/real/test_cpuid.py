from errno import E2BIG, EFAULT, EINTR, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2, KVM_CPUID_ENTRY2

DONE = (0, 0)


def table(*entries, nent=None):
    data = KVM_CPUID2.pack(nent=len(entries) if nent is None else nent)
    for entry in entries:
        data += KVM_CPUID_ENTRY2.pack(**entry)
    return data


ONE = {"function": 1, "eax": 0x00A10F11, "ecx": 1 << 31}
TWO = {"function": 0x80000008, "eax": 0x3030}


def test_supported_table_can_be_set_and_read_back(world, vcpu):
    data = KVM_CPUID2.pack(nent=256) + bytes(40 * 256)
    assert world.ioctl(world.system, ioctls.KVM_GET_SUPPORTED_CPUID, data) == DONE
    count = KVM_CPUID2.get(data, "nent")
    assert world.ioctl(vcpu, ioctls.KVM_SET_CPUID2, data[: 8 + 40 * count]) == DONE
    again = KVM_CPUID2.pack(nent=count) + bytes(40 * count)
    assert world.ioctl(vcpu, ioctls.KVM_GET_CPUID2, again) == DONE
    assert KVM_CPUID2.get(again, "nent") == count


def test_row_102_twice_before_the_first_run(world, vcpu):
    answers = [
        world.ioctl(vcpu, ioctls.KVM_SET_CPUID2, table(*given)) for given in ((ONE,), (TWO,))
    ]
    assert answers == [DONE, DONE]
    data = table(nent=5) + bytes(200)
    assert world.ioctl(vcpu, ioctls.KVM_GET_CPUID2, data) == DONE
    assert KVM_CPUID2.get(data, "nent") == 1
    assert KVM_CPUID_ENTRY2.get(data[8:], "function") == 0x80000008


def test_run_that_never_entered_the_guest_leaves_the_table_free(world, vcpu):
    page = world.page(vcpu)
    page[1] = 1
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == (-1, EINTR)
    assert world.ioctl(vcpu, ioctls.KVM_SET_CPUID2, table(ONE)) == DONE


def test_older_form_becomes_the_newer(world, vcpu):
    words = (0x80000008, 0x3030, 3, 4, 5, 0)
    data = KVM_CPUID2.pack(nent=1) + b"".join(word.to_bytes(4, "little") for word in words)
    assert world.ioctl(vcpu, ioctls.KVM_SET_CPUID, data) == DONE
    got = table(nent=1) + bytes(40)
    assert world.ioctl(vcpu, ioctls.KVM_GET_CPUID2, got) == DONE
    names = ("function", "index", "flags", "eax", "ebx")
    assert [KVM_CPUID_ENTRY2.get(got[8:], name) for name in names] == [0x80000008, 0, 0, 0x3030, 3]


@pytest.mark.parametrize("request_number", [ioctls.KVM_SET_CPUID, ioctls.KVM_SET_CPUID2])
def test_row_102_too_many_or_null(world, vcpu, request_number):
    assert world.ioctl(vcpu, request_number, table(nent=257)) == (-1, E2BIG)
    assert world.ioctl(vcpu, request_number, 0) == (-1, EFAULT)


@pytest.mark.parametrize(("bits", "errno"), [(0, 0), (48, 0), (57, 0), (47, EINVAL), (64, EINVAL)])
def test_width_of_linear_addresses(world, vcpu, bits, errno):
    data = table({"function": 0x80000008, "eax": bits << 8 | 48})
    answer = (-1, errno) if errno else DONE
    assert world.ioctl(vcpu, ioctls.KVM_SET_CPUID2, data) == answer
