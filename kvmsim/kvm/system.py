"""``/dev/kvm``: versions, capabilities, new VMs."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, ENXIO
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_DEVICE_ATTR,
    KVM_GET_EMULATED_CPUID,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_HAS_DEVICE_ATTR,
)
from kvmsim.abi.run import MMAP_SIZE_BYTES
from kvmsim.abi.structs import (
    KVM_DEVICE_ATTR,
    KVM_X86_GRP_SEV,
    KVM_X86_GRP_SYSTEM,
    KVM_X86_SEV_VMSA_FEATURES,
    KVM_X86_XCOMP_GUEST_SUPP,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import (
    capabilities,
    cpuid,
    subsystems,  # noqa: F401 - enters their handlers
)
from kvmsim.kvm.client import Client, LocalClient, copy_to_user
from kvmsim.kvm.dispatch import SystemFile, handles
from kvmsim.kvm.vm import Vm
from kvmsim.sev.firmware import Firmware
from kvmsim.sev.keys import Keys

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.dispatch import Call
    from kvmsim.sev.asid import AsidStatistics


@dataclass(frozen=True, slots=True)
class SystemStatistics:
    """What KVM as a whole holds.

    Attributes:
        vms: VMs that are not destroyed.
        vcpus: their vCPUs.
        asids: the ASID pool.
        tdx_free: trust domain keys nobody holds.
    """

    vms: int
    vcpus: int
    asids: AsidStatistics
    tdx_free: int


class System(SystemFile):
    """KVM of one machine.

    Args:
        machine: what it runs on.
        chip: makes the secure processor differ from that of another machine.

    Attributes:
        machine: as given.
        keys: what it can encrypt guests with.
        firmware: the secure processor; it answers on a machine with SEV only.
        vms: VMs that are not destroyed, in order of creation.
        supported_cpuid: what a guest can have of CPUID.
        epoch_ns: the time of day, from 1970 on, at time 0 of the model; None: it has no real time.
    """

    __slots__ = (
        *("_creator", "_extensions", "epoch_ns", "firmware", "keys", "machine"),
        *("supported_cpuid", "vms"),
    )

    def __init__(self, machine: Machine, chip: bytes = b"") -> None:
        self.machine = machine
        self.keys = Keys(machine)
        self.firmware = Firmware(chip, machine.sev.min_sev_asid)
        if machine.sev.sev:
            # Loading the driver initialises the platform (Linux psp_init_on_probe).
            self.firmware.init()
        self.firmware.snp.initialised = machine.sev.sev_snp
        self.keys.asids.on_flush = self.firmware.df_flush
        self.vms: dict[Vm, None] = {}
        self.supported_cpuid = cpuid.supported(machine)
        self.epoch_ns: int | None = None
        self._creator = LocalClient(0)
        self._extensions = capabilities.extensions(machine)

    @property
    def creator(self) -> Client:
        """Nobody in particular."""
        return self._creator

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: what a capability is worth; 0 for one that is not known."""
        return self._extensions.get(cap, 0)

    def create_vm(self, vm_type: int = 0, owner: int | Client = 0) -> Vm:
        """KVM_CREATE_VM.

        Args:
            vm_type: ``KVM_X86_*_VM``.
            owner: the calling process, or just its pid.

        Raises:
            KvmError: EINVAL, a type this machine does not have.
        """
        if not 0 <= vm_type < 32 or not self._extensions[caps.KVM_CAP_VM_TYPES] & 1 << vm_type:
            raise KvmError(EINVAL, f"VM type {vm_type}")
        vm = Vm(self, vm_type, LocalClient(owner) if isinstance(owner, int) else owner)
        self.vms[vm] = None
        return vm

    def forget(self, vm: Vm) -> None:
        """A VM is destroyed."""
        del self.vms[vm]

    def statistics(self) -> SystemStatistics:
        """Take a snapshot."""
        return SystemStatistics(
            vms=len(self.vms),
            vcpus=sum(len(vm.vcpus) for vm in self.vms),
            asids=self.keys.asids.statistics(),
            tdx_free=len(self.keys.tdx_free),
        )


@handles(SystemFile, KVM_GET_API_VERSION)
def get_api_version(system: System, call: Call) -> int:
    """12, for ever."""
    del system
    if call.value:
        raise KvmError(EINVAL, "KVM_GET_API_VERSION takes no argument")
    return caps.KVM_API_VERSION


@handles(SystemFile, KVM_CREATE_VM)
def create_vm(system: System, call: Call) -> Vm:
    """Make a VM; whoever called turns the object into a descriptor."""
    return system.create_vm(call.value, call.client)


@handles(SystemFile, KVM_CHECK_EXTENSION)
def check_extension(system: System, call: Call) -> int:
    """Answer for the machine."""
    return system.check_extension(call.value)


@handles(SystemFile, KVM_GET_VCPU_MMAP_SIZE)
def get_vcpu_mmap_size(system: System, call: Call) -> int:
    """Three pages: kvm_run, port data, coalesced MMIO."""
    del system
    if call.value:
        raise KvmError(EINVAL, "KVM_GET_VCPU_MMAP_SIZE takes no argument")
    return MMAP_SIZE_BYTES


@handles(SystemFile, KVM_GET_SUPPORTED_CPUID)
def get_supported_cpuid(system: System, call: Call) -> int:
    """The CPUID a guest can have."""
    return cpuid.copy_out_supported(call, system.supported_cpuid)


@handles(SystemFile, KVM_GET_EMULATED_CPUID)
def get_emulated_cpuid(system: System, call: Call) -> int:
    """The CPUID a guest can have although the processor lacks it."""
    del system
    return cpuid.copy_out_supported(call, cpuid.emulated())


@handles(SystemFile, KVM_HAS_DEVICE_ATTR)
def has_device_attr(system: System, call: Call) -> int:
    """Whether an attribute exists."""
    _device_attr(system, call)
    return 0


@handles(SystemFile, KVM_GET_DEVICE_ATTR)
def get_device_attr(system: System, call: Call) -> int:
    """Copy an attribute's value out."""
    address, value = _device_attr(system, call)
    copy_to_user(call.client, address, value.to_bytes(8, "little"))
    return 0


def _device_attr(system: System, call: Call) -> tuple[int, int]:
    """Where an attribute's value goes, and the value."""
    data = call.read(KVM_DEVICE_ATTR.size_bytes)
    get = KVM_DEVICE_ATTR.get
    values = {(KVM_X86_GRP_SYSTEM, KVM_X86_XCOMP_GUEST_SUPP): cpuid.supported_xcr0(system.machine)}
    if system.machine.sev.sev:
        values[KVM_X86_GRP_SEV, KVM_X86_SEV_VMSA_FEATURES] = system.machine.sev.vmsa_features
    wanted = (get(data, "group"), get(data, "attr"))
    if wanted not in values or get(data, "flags"):
        raise KvmError(ENXIO, f"no attribute {wanted}")
    return get(data, "addr"), values[wanted]
