"""Two worlds for the observation table (kvm.md G): the kernel's KVM and ours.

Only rows marked as generic KVM code, which hold for every backend. A world answers each call with
(result, 0) or (-1, errno); descriptors count as result "fd".
"""

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsim.abi import ioctls
from kvmsim.errors import KvmError
from kvmsim.host.presets import parse
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.dispatch import KvmFile
from kvmsim.kvm.run import Blocked

DEVICE = Path("/dev/kvm")
PLAIN = 'vendor = "amd"\n'
#: Requests whose result is a descriptor.
MAKERS = {
    ioctls.KVM_CREATE_VM,
    ioctls.KVM_CREATE_VCPU,
    ioctls.KVM_CREATE_GUEST_MEMFD,
    ioctls.KVM_GET_STATS_FD,
}


class Real:
    """The machine's own KVM."""

    def __init__(self):
        self.fds = []
        self.maps = []
        self.views = []
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
        if request in MAKERS:
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

    def pages(self, count):
        """Memory for a slot or behind a pointer: its address and its bytes."""
        mapped = mmap.mmap(-1, count * 4096)
        self.maps.append(mapped)
        first = ctypes.c_char.from_buffer(mapped)
        self.views.append(first)
        return ctypes.addressof(first), mapped

    def release(self, file):
        """Close a descriptor."""
        self.fds.remove(file)
        os.close(file)

    def fd(self, file):
        """The number of a descriptor, for structures that contain one."""
        return file

    def eventfd(self):
        """The number of a descriptor that is none of KVM's."""
        return self.keep(os.eventfd(0))

    def content(self, file):
        return os.pread(file, 1 << 20, 0)

    def cpus(self):
        return os.cpu_count()

    def close(self):
        self.views.clear()
        for mapped in self.maps:
            mapped.close()
        for fd in reversed(self.fds):
            os.close(fd)


class Emulated:
    """Ours, through the same numbers and bytes."""

    def __init__(self, kvm, toml=PLAIN):
        self.system = kvm(toml)

    def ioctl(self, file, request, arg=0):
        try:
            result = file.ioctl(request, arg)
        except KvmError as error:
            return -1, error.errno
        assert not isinstance(result, Blocked)
        assert request not in MAKERS or isinstance(result, KvmFile)
        return ("fd", 0) if isinstance(result, KvmFile) else (result, 0)

    def foreign_ioctl(self, file, request, arg=0):
        with pytest.raises(KvmError) as error:
            file.ioctl(request, arg, LocalClient(file.creator.pid + 1))
        return -1, error.value.errno

    def make(self, file, request, arg=0):
        return file.ioctl(request, arg)

    def page(self, vcpu):
        return vcpu.run.memory

    def pages(self, count):
        data = bytearray(count * 4096)
        return self.system.creator.map(data), data

    def release(self, file):
        file.release()

    def fd(self, file):
        return self.system.creator.open(file)

    def eventfd(self):
        return self.system.creator.open(None)

    def content(self, file):
        return file.content()

    def cpus(self):
        return parse(PLAIN, "plain").cpus

    def close(self):
        pass


def in_both_worlds(toml):
    """A fixture whose test runs against the kernel and against a machine of ours."""

    @pytest.fixture(params=["linux", "kvmsim"])
    def fixture(request, kvm):
        if request.param == "linux" and not os.access(DEVICE, os.R_OK | os.W_OK):
            pytest.skip("no usable /dev/kvm on this machine")
        world = Real() if request.param == "linux" else Emulated(kvm, toml)
        yield world
        world.close()

    return fixture


world = in_both_worlds(PLAIN)
world_of_intel = in_both_worlds('vendor = "intel"\n')


@pytest.fixture
def both_worlds(kvm):
    """The kernel's KVM and ours, in this order."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm on this machine")
    pair = Real(), Emulated(kvm)
    yield pair
    for world in pair:
        world.close()


@pytest.fixture
def vm(world):
    return world.make(world.system, ioctls.KVM_CREATE_VM)


@pytest.fixture
def vcpu(world, vm):
    return world.make(vm, ioctls.KVM_CREATE_VCPU)
