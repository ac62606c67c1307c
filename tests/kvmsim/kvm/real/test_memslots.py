from errno import EEXIST, EFAULT, EINVAL, ENOENT

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.memory import (
    KVM_CLEAR_DIRTY_LOG,
    KVM_CREATE_GUEST_MEMFD,
    KVM_DIRTY_LOG,
    KVM_USERSPACE_MEMORY_REGION,
    KVM_USERSPACE_MEMORY_REGION2,
)
from kvmsim.abi.structs import KVM_ENABLE_CAP

PAGE = 4096
SIZE = 16 * PAGE
LOG, READONLY = 1, 2


@pytest.fixture
def hva(world):
    return world.pages(64)[0]


@pytest.fixture
def put(world, vm, hva):
    """Set a region; unless told otherwise 16 pages of slot 0 at 1 MiB."""

    def set_region(*, version=1, **values):
        region = {
            "slot": 0,
            "guest_phys_addr": 0x100000,
            "memory_size": SIZE,
            "userspace_addr": hva,
            **values,
        }
        if version == 1:
            data = KVM_USERSPACE_MEMORY_REGION.pack(**region)
            return world.ioctl(vm, ioctls.KVM_SET_USER_MEMORY_REGION, data)
        data = KVM_USERSPACE_MEMORY_REGION2.pack(**region)
        return world.ioctl(vm, ioctls.KVM_SET_USER_MEMORY_REGION2, data)

    return set_region


DONE, INVALID = (0, 0), (-1, EINVAL)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({}, DONE, id="row 43"),
        pytest.param({"guest_phys_addr": 0x100800}, INVALID, id="row 47 gpa"),
        pytest.param({"memory_size": 4095}, INVALID, id="row 47 size"),
        pytest.param({"memory_size": 0}, INVALID, id="row 48"),
        pytest.param({"flags": 4}, INVALID, id="row 49"),
        pytest.param({"flags": 8}, INVALID, id="row 49 unknown"),
        pytest.param({"flags": READONLY}, DONE, id="row 50"),
        pytest.param({"flags": LOG | READONLY}, DONE, id="both flags"),
        pytest.param({"slot": 32763}, DONE, id="row 52"),
        pytest.param({"slot": 32764}, INVALID, id="row 52 too high"),
        pytest.param({"slot": 2 << 16}, INVALID, id="row 53"),
        pytest.param({"guest_phys_addr": -(1 << 14) & (1 << 64) - 1}, INVALID, id="row 54 wraps"),
        pytest.param({"guest_phys_addr": 1 << 52}, INVALID, id="row 54 too high"),
        pytest.param({"userspace_addr": 1 << 60}, INVALID, id="kernel address"),
        pytest.param({"version": 2}, DONE, id="second form"),
        pytest.param({"version": 2, "flags": 4}, INVALID, id="no private memory"),
        pytest.param({"version": 2, "flags": 16}, INVALID, id="second form, unknown flag"),
        pytest.param({"version": 2, "slot": 32764}, INVALID, id="second form, slot"),
    ],
)
def test_first_region(put, values, expected):
    assert put(**values) == expected


def test_row_47_unaligned_user_address(put, hva):
    assert put(userspace_addr=hva + 1) == INVALID


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({}, DONE, id="row 43 same"),
        pytest.param({"slot": 1}, (-1, EEXIST), id="row 44"),
        pytest.param({"slot": 1, "guest_phys_addr": 0x10F000}, (-1, EEXIST), id="row 44 last page"),
        pytest.param({"slot": 1, "guest_phys_addr": 0x110000}, DONE, id="beside"),
        pytest.param({"memory_size": SIZE // 2}, INVALID, id="row 45 size"),
        pytest.param({"guest_phys_addr": 0x200000}, DONE, id="row 46"),
        pytest.param({"guest_phys_addr": 0x104000}, DONE, id="moved over its own place"),
        pytest.param({"flags": READONLY}, INVALID, id="row 50 becomes read-only"),
        pytest.param({"flags": LOG}, DONE, id="row 51"),
        pytest.param({"memory_size": 0}, DONE, id="deleted"),
        pytest.param({"memory_size": 0, "userspace_addr": 0}, DONE, id="deleted without memory"),
        pytest.param({"version": 2}, DONE, id="same in the second form"),
    ],
)
def test_second_region(put, values, expected):
    assert put() == DONE
    assert put(**values) == expected


def test_row_45_other_memory(put, hva):
    assert put() == DONE
    assert put(userspace_addr=hva + PAGE) == INVALID


def test_row_46_moved_and_back(put):
    places = (0x100000, 0x200000, 0x100000)
    assert [put(guest_phys_addr=gpa) for gpa in places] == [DONE] * 3


def test_row_46_not_onto_another(put):
    assert put() == DONE
    assert put(slot=1, guest_phys_addr=0x200000) == DONE
    assert put(guest_phys_addr=0x20F000) == (-1, EEXIST)


def test_row_50_read_only_for_life(put):
    assert put(flags=READONLY) == DONE
    assert put() == INVALID


def test_slot_can_be_made_again_after_it_was_deleted(put):
    answers = [put(), put(memory_size=0), put(memory_size=0), put(memory_size=SIZE // 2)]
    assert answers == [DONE, DONE, INVALID, DONE]


@pytest.mark.parametrize(
    "request_number", [ioctls.KVM_SET_USER_MEMORY_REGION, ioctls.KVM_SET_USER_MEMORY_REGION2]
)
def test_row_55_null_region(world, vm, request_number):
    assert world.ioctl(vm, request_number, 0) == (-1, EFAULT)


def test_row_56_guest_memfd_of_a_plain_vm(world, vm):
    good = KVM_CREATE_GUEST_MEMFD.pack(size=SIZE)
    assert world.ioctl(vm, ioctls.KVM_CREATE_GUEST_MEMFD, good) == ("fd", 0)
    for bad in ({"size": 0}, {"size": 4095}, {"size": SIZE, "flags": 1 << 40}):
        data = KVM_CREATE_GUEST_MEMFD.pack(**bad)
        assert world.ioctl(vm, ioctls.KVM_CREATE_GUEST_MEMFD, data) == INVALID


@pytest.fixture
def get_log(world, vm):
    address, memory = world.pages(1)

    def get(slot=0):
        memory[:8] = b"\xaa" * 8
        data = KVM_DIRTY_LOG.pack(slot=slot, dirty_bitmap=address)
        return world.ioctl(vm, ioctls.KVM_GET_DIRTY_LOG, data), bytes(memory[:8])

    return get


def test_log_of_a_slot_that_is_not_logged(put, get_log):
    assert put() == DONE
    assert get_log()[0] == (-1, ENOENT)
    assert get_log(slot=5)[0] == (-1, ENOENT)
    assert get_log(slot=32764)[0] == INVALID
    assert put(flags=LOG) == DONE
    assert get_log() == (DONE, bytes(8))
    assert put() == DONE
    assert get_log()[0] == (-1, ENOENT)


def test_log_starts_full_when_asked(world, vm, put, get_log):
    enable = KVM_ENABLE_CAP.pack(cap=168, args=3)
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, enable) == DONE
    assert put(flags=LOG) == DONE
    assert [get_log(), get_log()] == [(DONE, b"\xff\xff" + bytes(6))] * 2


def clear(world, vm, bitmap, **values):
    data = KVM_CLEAR_DIRTY_LOG.pack(dirty_bitmap=bitmap, **values)
    return world.ioctl(vm, ioctls.KVM_CLEAR_DIRTY_LOG, data)


def test_clearing_takes_what_it_names(world, vm, put, get_log):
    address, memory = world.pages(1)
    world.ioctl(vm, ioctls.KVM_ENABLE_CAP, KVM_ENABLE_CAP.pack(cap=168, args=3))
    assert put(flags=LOG) == DONE
    memory[0] = 0x0F
    assert clear(world, vm, address, num_pages=16) == DONE
    assert get_log() == (DONE, b"\xf0\xff" + bytes(6))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"first_page": 1, "num_pages": 15}, INVALID),
        ({"num_pages": 15}, INVALID),
        ({"num_pages": 17}, INVALID),
        ({"first_page": 64, "num_pages": 0}, INVALID),
        ({"slot": 7, "num_pages": 16}, (-1, ENOENT)),
        ({"num_pages": 16}, DONE),
    ],
)
def test_range_to_clear(world, vm, put, values, expected):
    address, _ = world.pages(1)
    world.ioctl(vm, ioctls.KVM_ENABLE_CAP, KVM_ENABLE_CAP.pack(cap=168, args=1))
    assert put(flags=LOG) == DONE
    assert clear(world, vm, address, **values) == expected
