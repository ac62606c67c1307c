from errno import E2BIG, EBUSY, EFAULT, EINTR, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import (
    KVM_CPUID2,
    KVM_DEBUGREGS,
    KVM_GUEST_DEBUG,
    KVM_MSR_ENTRY,
    KVM_MSRS,
    KVM_REGS,
)


def msrs(*pairs, nmsrs=None):
    data = KVM_MSRS.pack(nmsrs=len(pairs) if nmsrs is None else nmsrs)
    for index, value in pairs:
        data += KVM_MSR_ENTRY.pack(index=index, data=value)
    return data


def cpuid(nent, entries=0):
    return KVM_CPUID2.pack(nent=nent) + bytearray(40 * entries)


@pytest.mark.parametrize(
    ("request_number", "arg", "expected"),
    [
        pytest.param(0xAEFF, 0, (-1, EINVAL), id="row 32"),
        pytest.param(0x5300, 0, (-1, EINVAL), id="row 33"),
        pytest.param(ioctls.KVM_CREATE_VCPU, 0, (-1, EINVAL), id="row 34"),
        pytest.param(ioctls.KVM_CHECK_EXTENSION, 193, (-1, EINVAL), id="row 36"),
        pytest.param(ioctls.KVM_RUN, 1, (-1, EINVAL), id="row 68"),
        pytest.param(ioctls.KVM_SET_MP_STATE, bytearray([3, 0, 0, 0]), (-1, EINVAL), id="row 66"),
        pytest.param(ioctls.KVM_SET_MP_STATE, bytearray(4), (0, 0), id="row 66 runnable"),
        pytest.param(
            ioctls.KVM_SET_MP_STATE, bytearray([99, 0, 0, 0]), (-1, EINVAL), id="row 66 unknown"
        ),
        pytest.param(ioctls.KVM_SET_CPUID2, cpuid(257, 257), (-1, E2BIG), id="row 102"),
        pytest.param(ioctls.KVM_SET_CPUID2, 0, (-1, EFAULT), id="row 102 null"),
        pytest.param(ioctls.KVM_GET_REGS, 0, (-1, EFAULT), id="regs null"),
        pytest.param(
            ioctls.KVM_SET_DEBUGREGS, KVM_DEBUGREGS.pack(flags=1), (-1, EINVAL), id="row 87 flags"
        ),
        pytest.param(
            ioctls.KVM_SET_DEBUGREGS, KVM_DEBUGREGS.pack(dr6=1 << 32), (-1, EINVAL), id="row 87 dr6"
        ),
        pytest.param(
            ioctls.KVM_SET_DEBUGREGS, KVM_DEBUGREGS.pack(dr7=1 << 40), (-1, EINVAL), id="row 87 dr7"
        ),
        pytest.param(
            ioctls.KVM_SET_GUEST_DEBUG,
            KVM_GUEST_DEBUG.pack(control=0x80000000),
            (0, 0),
            id="row 90",
        ),
        pytest.param(ioctls.KVM_GET_MSRS, msrs((0x1D9, 0), (0x12345678, 0)), (1, 0), id="row 97"),
        *(
            pytest.param(ioctls.KVM_GET_MSRS, msrs((index, 0)), (0, 0), id=f"row 94 {index:#x}")
            for index in (0x1C9, 0x680, 0x33, 0xCF, 0x12345678)
        ),
        pytest.param(ioctls.KVM_GET_MSRS, msrs(*[(0x1D9, 0)] * 255), (255, 0), id="row 98"),
        pytest.param(ioctls.KVM_GET_MSRS, msrs(*[(0x1D9, 0)] * 256), (-1, E2BIG), id="row 98 256"),
        pytest.param(ioctls.KVM_GET_MSRS, msrs(), (0, 0), id="row 98 none"),
        pytest.param(ioctls.KVM_GET_MSRS, 0, (-1, EFAULT), id="row 98 null"),
    ],
)
def test_vcpu_descriptor(world, vcpu, request_number, arg, expected):
    assert world.ioctl(vcpu, request_number, arg) == expected


def test_row_69_immediate_exit_clears_the_flags_only(world, vcpu):
    page = world.page(vcpu)
    page[14:16] = b"\xff\xff"
    page[1] = 1
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == (-1, EINTR)
    assert (bytes(page[14:16]), bytes(page[8:12])) == (bytes(2), bytes(4))


def test_row_70_unsupported_register_set(world, vcpu):
    world.page(vcpu)[288:296] = (1 << 20).to_bytes(8, "little")
    assert world.ioctl(vcpu, ioctls.KVM_RUN) == (-1, EINVAL)


def test_row_71_registers_after_reset(world, vcpu):
    regs = bytearray(144)
    assert world.ioctl(vcpu, ioctls.KVM_GET_REGS, regs) == (0, 0)
    assert [KVM_REGS.get(regs, name) for name in ("rip", "rflags", "rdx")] == [0xFFF0, 2, 0x600]


def test_rows_86_and_88_debug_registers(world, vcpu):
    regs = bytearray(128)
    assert world.ioctl(vcpu, ioctls.KVM_GET_DEBUGREGS, regs) == (0, 0)
    assert [KVM_DEBUGREGS.get(regs, name) for name in ("dr6", "dr7")] == [0xFFFF0FF0, 0x400]
    KVM_DEBUGREGS.put(regs, "dr6", 0xFFFF07F0)
    assert world.ioctl(vcpu, ioctls.KVM_SET_DEBUGREGS, regs) == (0, 0)
    world.ioctl(vcpu, ioctls.KVM_GET_DEBUGREGS, regs)
    assert KVM_DEBUGREGS.get(regs, "dr6") == 0xFFFF07F0


def test_row_91_second_injection_while_one_is_pending(world, vcpu):
    inject = KVM_GUEST_DEBUG.pack(control=0x1 | 0x40000)
    answers = [world.ioctl(vcpu, ioctls.KVM_SET_GUEST_DEBUG, inject) for _ in range(2)]
    assert answers == [(0, 0), (-1, EBUSY)]


def test_row_103_cpuid_too_small_leaves_nent(world, vcpu):
    table = cpuid(1, 1)
    assert world.ioctl(vcpu, ioctls.KVM_SET_CPUID2, table) == (0, 0)
    small = cpuid(0)
    assert world.ioctl(vcpu, ioctls.KVM_GET_CPUID2, small) == (-1, E2BIG)
    assert KVM_CPUID2.get(small, "nent") == 0
