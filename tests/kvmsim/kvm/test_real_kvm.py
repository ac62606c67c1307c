"""Rows of the observation table (kvm.md G) against the kernel's KVM and ours: one test, two worlds.

Only rows marked as generic KVM code, which hold for every backend. A world answers each call with
(result, 0) or (-1, errno); descriptors count as result "fd".
"""

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from errno import E2BIG, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENOTTY
from pathlib import Path

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import (
    KVM_CPUID2,
    KVM_DEBUGREGS,
    KVM_ENABLE_CAP,
    KVM_GUEST_DEBUG,
    KVM_MSR_ENTRY,
    KVM_MSRS,
    KVM_REGS,
)
from kvmsim.errors import KvmError
from kvmsim.host.presets import parse
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.dispatch import KvmFile
from kvmsim.kvm.run import Blocked

DEVICE = Path("/dev/kvm")
PLAIN = 'vendor = "amd"\n'


class Real:
    """The machine's own KVM."""

    def __init__(self):
        self.fds = []
        self.maps = []
        self.system = self.keep(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))

    def keep(self, fd):
        self.fds.append(fd)
        return fd

    def ioctl(self, file, request, arg=0):
        if isinstance(arg, int) and arg > 0x7FFFFFFF:
            return self.wide_ioctl(file, request, arg)
        try:
            result = fcntl.ioctl(file, request, arg)
        except OSError as error:
            return -1, error.errno
        if request in {ioctls.KVM_CREATE_VM, ioctls.KVM_CREATE_VCPU}:
            os.close(result)
            return "fd", 0
        return result, 0

    def wide_ioctl(self, file, request, arg):
        """Python's own ioctl takes 32-bit numbers only."""
        call = ctypes.CDLL(None, use_errno=True).ioctl
        call.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
        result = call(file, request, arg)
        return (result, 0) if result >= 0 else (-1, ctypes.get_errno())

    def foreign_ioctl(self, file, request, arg=0):
        code = f"import fcntl\ntry: fcntl.ioctl({file}, {request}, {arg})\n"
        code += "except OSError as error: print(error.errno)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, pass_fds=[file], capture_output=True, check=True)
        return -1, int(done.stdout)

    def make(self, file, request, arg=0):
        return self.keep(fcntl.ioctl(file, request, arg))

    def page(self, vcpu):
        self.maps.append(mmap.mmap(vcpu, 12288))
        return self.maps[-1]

    def cpus(self):
        return os.cpu_count()

    def close(self):
        for mapped in self.maps:
            mapped.close()
        for fd in reversed(self.fds):
            os.close(fd)


class Emulated:
    """Ours, through the same numbers and bytes."""

    def __init__(self, kvm):
        self.system = kvm(PLAIN)

    def ioctl(self, file, request, arg=0):
        try:
            result = file.ioctl(request, arg)
        except KvmError as error:
            return -1, error.errno
        assert not isinstance(result, Blocked)
        return ("fd", 0) if isinstance(result, KvmFile) else (result, 0)

    def foreign_ioctl(self, file, request, arg=0):
        with pytest.raises(KvmError) as error:
            file.ioctl(request, arg, LocalClient(file.creator.pid + 1))
        return -1, error.value.errno

    def make(self, file, request, arg=0):
        return file.ioctl(request, arg)

    def page(self, vcpu):
        return vcpu.run.memory

    def cpus(self):
        return parse(PLAIN, "plain").cpus

    def close(self):
        pass


@pytest.fixture(params=["linux", "kvmsim"])
def world(request, kvm):
    if request.param == "linux" and not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm on this machine")
    world = Real() if request.param == "linux" else Emulated(kvm)
    yield world
    world.close()


@pytest.fixture
def vm(world):
    return world.make(world.system, ioctls.KVM_CREATE_VM)


@pytest.fixture
def vcpu(world, vm):
    return world.make(vm, ioctls.KVM_CREATE_VCPU)


def cap(number, *args, flags=0, pad=0):
    data = KVM_ENABLE_CAP.pack(cap=number, flags=flags, pad=pad)
    for index, value in enumerate(args):
        KVM_ENABLE_CAP.put(data, "args", value, index)
    return data


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
        pytest.param(cap(197, 0xFFFFFFFF), (-1, EINVAL), id="row 25"),
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


def test_row_104_tsc_frequency_of_vm_and_vcpu_is_the_same(world, vm, vcpu):
    of_vm = world.ioctl(vm, ioctls.KVM_GET_TSC_KHZ)
    assert of_vm == world.ioctl(vcpu, ioctls.KVM_GET_TSC_KHZ)
    assert of_vm[0] > 0


def test_row_112_vcpu_works_after_its_vm_descriptor_is_closed(world, vm, vcpu):
    if isinstance(world, Real):
        world.fds.remove(vm)
        os.close(vm)
    else:
        vm.release()
    assert world.ioctl(vcpu, ioctls.KVM_GET_REGS, bytearray(144)) == (0, 0)


def test_row_111_another_address_space_is_eio_whatever_it_asks(world, vm, vcpu):
    assert world.foreign_ioctl(vm, 0xAEFF) == (-1, EIO)
    assert world.foreign_ioctl(vcpu, 0x5300) == (-1, EIO)
