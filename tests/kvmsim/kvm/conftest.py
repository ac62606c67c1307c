"""A machine with a hand-driven accounting, and the shapes its VMs come in."""

from dataclasses import dataclass
from errno import EBUSY

import pytest

from cgfs.errors import CgroupError
from kvmsim.abi import ioctls
from kvmsim.abi import sev as abi
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.host.accounting import AsidCharge
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.system import System
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304

TRAP = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\n'
FAULT = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
NO_BUS_LOCK = 'vendor = "intel"\n'
SEV = 'vendor = "amd"\n[sev]\nmax-asid = {ecx}\nmin-sev-asid = {edx}\ndebug-swap = true\n'


class HandDriven:
    """Accounting whose answers the test decides.

    Attributes:
        charged: units now charged, by kind.
        limit: highest number of units of any kind.
        same_cgroup: every caller is in the cgroup its VM is charged to.
        limited: whether a finite bus lock limit applies.
        tokens: bus locks still admitted at once; None: all.
        queue: waiters, first in first out.
        admissions: bus locks admitted so far.
    """

    def __init__(self):
        self.charged = {}
        self.limit = 1000
        self.same_cgroup = True
        self.limited = False
        self.tokens = None
        self.queue = []
        self.admissions = 0
        self.cancelled = []
        self.charged_pids = []

    def charge_asid(self, pid, kind):
        if self.charged.get(kind, 0) >= self.limit:
            raise CgroupError(EBUSY, "at the limit")
        self.charged[kind] = self.charged.get(kind, 0) + 1
        self.charged_pids.append(pid)
        return AsidCharge(kind, ())

    def uncharge_asid(self, charge, kind=None):
        self.charged[kind or charge.kind] -= 1

    def is_charged_to(self, pid, charge):
        return self.same_cgroup

    def bus_lock(self, pid, waiter, now_ns):
        if self.tokens == 0:
            self.queue.append(waiter)
            return False
        if self.tokens is not None:
            self.tokens -= 1
        self.admissions += 1
        return True

    def admit(self, now_ns):
        self.admissions += 1
        self.queue.pop(0).admitted(now_ns)

    def bus_lock_withdraw(self, waiter, now_ns):
        self.queue.remove(waiter)

    def bus_lock_cancel(self, pid, waiter, now_ns):
        self.cancelled.append(waiter)
        self.queue = [other for other in self.queue if other is not waiter]

    def bus_lock_moved(self, pid, waiter, now_ns):
        self.queue.remove(waiter)
        self.queue.append(waiter)

    def bus_lock_limited(self, pid):
        return self.limited


@pytest.fixture
def accounting():
    return HandDriven()


@pytest.fixture
def kvm(accounting):
    """Make the KVM of a machine from its TOML."""

    def make(toml=TRAP):
        return System(Machine(parse(toml, "test.toml"), None, accounting))

    return make


@pytest.fixture
def guest(kvm):
    """Make a vCPU that plays stops, with bus lock exits on unless told otherwise."""

    def make(stops, toml=TRAP, *, exits=True, times=1, irqchip=False):
        vm = kvm(toml).create_vm(0, PID)
        if irqchip:
            vm.create_irqchip()
        if exits:
            vm.enable_cap(KvmEnableCap(193, (2,)))
        vcpu = vm.create_vcpu(0)
        vcpu.engine = Scripted(stops, times)
        return vcpu

    return make


# -- clients with encrypted guests -----------------------------------------------------------------

#: In ``error`` beforehand, so that it shows whether the structure was copied back.
UNTOUCHED = 77
SNP_HOST = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\nsnp = true\ndebug-swap = true\n'


@dataclass
class Outcome:
    """What one command came to.

    Attributes:
        errno: 0 when it succeeded.
        error: the firmware's answer, or UNTOUCHED.
        data: the command's own structure afterwards.
        layout: of that structure.
    """

    errno: int
    error: int
    data: bytearray
    layout: object

    def __getitem__(self, member):
        return self.layout.get(self.data, member)

    @property
    def answer(self):
        return self.errno, self.error


class Vmm:
    """One client program."""

    def __init__(self, system, pid=PID):
        self.system = system
        self.client = LocalClient(pid)
        self.sev_fd = self.client.open(SevFile(system))

    def create(self, vm_type=2, vcpus=0):
        """A VM before its init command, with a descriptor."""
        vm = self.system.create_vm(vm_type, self.client)
        self.client.open(vm)
        for number in range(vcpus):
            vm.create_vcpu(number)
        return vm

    def guest(self, vm_type=2, vcpus=0):
        """An initialised VM."""
        vm = self.create(vm_type)
        if vm_type:
            assert self.run(vm, abi.KVM_SEV_INIT2, abi.KVM_SEV_INIT_STRUCT).answer == (0, 0)
        for number in range(vcpus):
            vm.create_vcpu(number)
        return vm

    def legacy(self, *, es, vcpus=0):
        """An initialised VM of the default type."""
        vm = self.create(0)
        assert self.run(vm, abi.KVM_SEV_ES_INIT if es else abi.KVM_SEV_INIT).answer == (0, 0)
        for number in range(vcpus):
            vm.create_vcpu(number)
        return vm

    def started(self, vm_type=2, vcpus=0, policy=None):
        """A guest in state LAUNCH_UPDATE."""
        vm = self.guest(vm_type, vcpus)
        assert self.start(vm, policy).answer == (0, 0)
        return vm

    def start(self, vm, policy=None, **values):
        """LAUNCH_START."""
        if policy is None:
            policy = 4 if vm.es_active else 0
        layout = abi.KVM_SEV_LAUNCH_START_STRUCT
        return self.run(vm, abi.KVM_SEV_LAUNCH_START, layout, policy=policy, **values)

    def running(self, vm_type=2, vcpus=0, policy=None, memory=None):
        """A guest in state RUNNING, with some memory loaded."""
        vm = self.started(vm_type, vcpus, policy)
        if memory is not None:
            assert self.load(vm, memory, 4096).answer == (0, 0)
        assert self.run(vm, abi.KVM_SEV_LAUNCH_FINISH).answer == (0, 0)
        return vm

    def load(self, vm, address, length):
        """LAUNCH_UPDATE_DATA."""
        layout = abi.KVM_SEV_LAUNCH_UPDATE_DATA_STRUCT
        return self.run(vm, abi.KVM_SEV_LAUNCH_UPDATE_DATA, layout, uaddr=address, len=length)

    def status(self, vm):
        """GUEST_STATUS."""
        return self.run(vm, abi.KVM_SEV_GUEST_STATUS, abi.KVM_SEV_GUEST_STATUS_STRUCT)

    def state(self, vm):
        """The state GUEST_STATUS shows."""
        return self.status(vm)["state"]

    def memory(self, data):
        """Mapped memory: its address and its bytes."""
        buffer = bytearray(data)
        return self.client.map(buffer), buffer

    def run(self, vm, number, layout=None, sev_fd=None, **values):
        """One command; with a layout there is a structure, filled from the values."""
        data = layout.pack(**values) if layout is not None else bytearray()
        address = self.client.map(data) if layout is not None else 0
        return self.run_at(vm, number, address, sev_fd, data, layout)

    def run_at(self, vm, number, address, sev_fd=None, data=None, layout=None):
        """One command with the address of its structure given."""
        fd = self.sev_fd if sev_fd is None else sev_fd
        cmd = abi.KVM_SEV_CMD.pack(
            id=number, data=address, error=UNTOUCHED, sev_fd=fd & 0xFFFF_FFFF
        )
        errno = self.errno(
            vm.ioctl, ioctls.KVM_MEMORY_ENCRYPT_OP, self.client.map(cmd), self.client
        )
        return Outcome(errno, abi.KVM_SEV_CMD.get(cmd, "error"), data, layout)

    def region(self, vm, address, size, request=ioctls.KVM_MEMORY_ENCRYPT_REG_REGION):
        """Register or unregister a region."""
        data = abi.KVM_ENC_REGION.pack(addr=address, size=size)
        return self.errno(vm.ioctl, request, self.client.map(data), self.client)

    def enable(self, vm, cap, source):
        """Mirror (197) or move (206) from a VM or a descriptor number."""
        fd = source if isinstance(source, int) else self.fd_of(source)
        data = bytearray(104)
        data[0:4] = cap.to_bytes(4, "little")
        data[8:16] = (fd & (1 << 64) - 1).to_bytes(8, "little")
        return self.errno(vm.ioctl, ioctls.KVM_ENABLE_CAP, self.client.map(data), self.client)

    def mirror(self, vm, source):
        return self.enable(vm, 197, source)

    def move(self, vm, source):
        return self.enable(vm, 206, source)

    def fd_of(self, file):
        return next(number for number, other in self.client.files.items() if other is file)

    @staticmethod
    def errno(call, *args):
        try:
            call(*args)
        except KvmError as error:
            return error.errno
        return 0


@pytest.fixture
def vmm(kvm):
    """A client on a host with 5 ASIDs for SEV (5 to 9) and 4 for SEV-ES and SNP."""
    return Vmm(kvm(SNP_HOST))


@pytest.fixture
def vmm_on(kvm):
    """Make a client on a host that is the usual one with more lines of TOML."""
    return lambda more="": Vmm(kvm(SNP_HOST + more))
