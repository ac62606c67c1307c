"""A client that gives SEV guests their commands through the ioctl, as a program would."""

from dataclasses import dataclass

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.devsev import SevFile

PID = 4194304
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
