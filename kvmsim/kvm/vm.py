"""The VM descriptor: capabilities, vCPUs, and how long a VM lives.

A VM dies with the last reference to it: its own descriptor, those of its vCPUs, of its statistics
and of its guest memory. Then its key goes back and the charge for it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, EIO
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VCPU,
    KVM_ENABLE_CAP,
    KVM_MEMORY_ENCRYPT_OP,
)
from kvmsim.abi.structs import KVM_ENABLE_CAP as ENABLE_CAP_STRUCT
from kvmsim.errors import KvmError
from kvmsim.kvm import clock, guest_memfd, irqchip_calls, protected, routing, sev
from kvmsim.kvm.dispatch import ENABLERS, VmFile, handles
from kvmsim.kvm.memslots import SlotMemory
from kvmsim.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmsim.host.accounting import Accounting
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.coalesced import Zone
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.holder import VmHolder
    from kvmsim.kvm.memslots import GuestMemory
    from kvmsim.kvm.page import KvmRun
    from kvmsim.kvm.sev import SevCmd
    from kvmsim.kvm.system import System
    from kvmsim.kvm.vcpu import VcpuStatistics
    from kvmsim.sev.keys import Key


#: Worth something only for VM types with memory that user space cannot reach (Linux 6.12).
PRIVATE_MEMORY_CAPS = (caps.KVM_CAP_GUEST_MEMFD, caps.KVM_CAP_MEMORY_ATTRIBUTES)


@dataclass(frozen=True, slots=True)
class KvmEnableCap:
    """``struct kvm_enable_cap``.

    Attributes:
        cap: ``KVM_CAP_*``.
        args: up to four 64-bit values; those not given are 0.
        flags: 0.
    """

    cap: int
    args: tuple[int, ...] = ()
    flags: int = 0

    @property
    def arg0(self) -> int:
        """The only argument any capability here looks at."""
        return self.args[0] if self.args else 0


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """What one VM has done so far.

    Attributes:
        vm_type: ``KVM_X86_*_VM``.
        state: ``plain``, ``waiting`` (for its init command), ``active``, ``dead`` or ``destroyed``.
        asid: its ASID or key number, None without one.
        kind: what it is charged as, None when it is not.
        bus_lock_detection: ``KVM_CAP_X86_BUS_LOCK_EXIT`` is on.
        exits: as for a vCPU, summed.
        bus_locks: as for a vCPU, summed.
        throttled_ns: as for a vCPU, summed.
        owed: vCPUs that owe a bus lock.
        vcpus: each of them, by id.
    """

    vm_type: int
    state: str
    asid: int | None
    kind: str | None
    bus_lock_detection: bool
    exits: Mapping[str, int] = field(default_factory=dict)
    bus_locks: int = 0
    throttled_ns: int = 0
    owed: int = 0
    vcpus: tuple[VcpuStatistics, ...] = ()


class Vm(VmFile):
    """One VM.

    Args:
        system: the KVM it was made by.
        vm_type: ``KVM_X86_*_VM``; supported.
        creator: who made it. Only that address space may use it.

    Attributes:
        system: as given.
        machine: the machine it runs on.
        accounting: who charges cgroups and admits bus locks.
        vm_type: as given.
        vcpus: its vCPUs by id, in order of creation.
        irqchip: the local APICs are in the kernel.
        max_vcpu_ids: ids from here on are refused; 0: not limited yet.
        bus_lock_detection: the VMM enabled exits for bus locks; never goes off again.
        needs_init: an encrypted VM before its init command.
        sev_active: it has an ASID.
        es_active: its register state is encrypted.
        vmsa_features: as given at init.
        ghcb_version: as negotiated at init.
        key: the ASID or key it holds.
        dead: only closing is left.
        on_bus_lock: called with (vcpu, now_ns) whenever a guest of it takes a bus lock, detected
            or not: whoever simulates the machine stalls the other CPUs.
        on_end: called with the VM when nothing refers to it any more.
        state: parts that belong to one subsystem each; see ``state_of``.
        coalesced_zones: where the guest's writes are collected instead of being exits.
        holders: other files that keep it alive: of statistics, of guest memory.
        memory: reads guest-physical memory; by default through the slots from the creator's memory.
    """

    __slots__ = (
        *("system", "machine", "accounting", "vm_type", "vcpus", "irqchip", "max_vcpu_ids"),
        *("bus_lock_detection", "needs_init", "sev_active", "es_active", "vmsa_features"),
        *("ghcb_version", "key", "dead", "on_bus_lock", "on_end", "state", "memory"),
        *("coalesced_zones", "holders"),
        *("_creator", "_references", "_released"),
    )

    def __init__(self, system: System, vm_type: int, creator: Client) -> None:
        self.system = system
        self.machine: Machine = system.machine
        self.accounting: Accounting = system.machine.accounting
        self.vm_type = vm_type
        self.vcpus: dict[int, Vcpu] = {}
        self.irqchip = False
        self.max_vcpu_ids = 0
        self.bus_lock_detection = False
        self.needs_init = vm_type >= caps.KVM_X86_SEV_VM
        self.sev_active = False
        self.es_active = False
        self.vmsa_features = 0
        self.ghcb_version = 0
        self.key: Key | None = None
        self.dead = False
        self.on_bus_lock: Callable[[Vcpu, int], None] | None = None
        self.on_end: Callable[[Vm], None] | None = None
        self.state: dict[Callable[[Vm], object], object] = {}
        self.memory: GuestMemory = SlotMemory(self)
        self.coalesced_zones: tuple[Zone, ...] = ()
        self.holders: dict[VmHolder, None] = {}
        self._creator = creator
        self._references = 1
        self._released = False

    @property
    def creator(self) -> Client:
        """Who made it."""
        return self._creator

    @property
    def link_name(self) -> str:
        """See :attr:`KvmFile.link_name`."""
        return "kvm-vm"

    @property
    def alive(self) -> bool:
        """Whether anything still refers to it."""
        return self._references > 0

    def check(self, client: Client) -> None:
        """Refuse callers from another address space, and a dead VM.

        Raises:
            KvmError: EIO.
        """
        if client.mm != self._creator.mm or self.dead:
            raise KvmError(EIO, "not the creator's address space, or a dead VM")

    # -- capabilities ----------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: as on the system descriptor, less what the VM's type lacks."""
        if cap in PRIVATE_MEMORY_CAPS and not guest_memfd.has_private_memory(self):
            return 0
        if cap == caps.KVM_CAP_SYNC_REGS and protected.has_protected_state(self):
            return 0
        return self.system.check_extension(cap)

    def enable_cap(self, enable: KvmEnableCap, client: Client | None = None) -> int:
        """KVM_ENABLE_CAP.

        Raises:
            KvmError: EINVAL flags, an unknown capability or a bad value; EEXIST too late.
        """
        if enable.flags:
            raise KvmError(EINVAL, "flags of KVM_ENABLE_CAP")
        enabler = ENABLERS.get(enable.cap)
        if enabler is None:
            raise KvmError(EINVAL, f"capability {enable.cap} cannot be enabled")
        return enabler(self, enable, client or self._creator)

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP; ``kvmsim.kvm.irqchip_calls`` has the rules."""
        irqchip_calls.create(self)

    # -- vCPUs -----------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int, page: KvmRun | None = None) -> Vcpu:
        """KVM_CREATE_VCPU.

        Args:
            vcpu_id: its id.
            page: its ``kvm_run`` page; a private one by default.

        Raises:
            KvmError: EIO dead VM; EINVAL id or number too high; EEXIST the id is taken.
        """
        if self.dead or not self.alive:
            raise KvmError(EIO, "the VM is gone")
        if not 0 <= vcpu_id < (self.max_vcpu_ids or caps.KVM_MAX_VCPU_IDS):
            raise KvmError(EINVAL, f"vCPU id {vcpu_id}")
        if len(self.vcpus) >= caps.KVM_MAX_VCPUS:
            raise KvmError(EINVAL, "too many vCPUs")
        if vcpu_id in self.vcpus:
            raise KvmError(EEXIST, f"vCPU {vcpu_id} exists")
        if self.needs_init and self.vm_type == caps.KVM_X86_TDX_VM:
            # Linux 6.16 tdx.c tdx_vcpu_create: a trust domain has vCPUs after its init only.
            raise KvmError(EIO, "the trust domain is not initialised")
        self.max_vcpu_ids = self.max_vcpu_ids or caps.KVM_MAX_VCPU_IDS
        vcpu = Vcpu(self, vcpu_id, page)
        self.vcpus[vcpu_id] = vcpu
        self._references += 1
        return vcpu

    # -- memory encryption -----------------------------------------------------------------

    def memory_encrypt_op(self, cmd: SevCmd, client: Client | None = None) -> int:
        """KVM_MEMORY_ENCRYPT_OP with a command; ``kvmsim.kvm.sev`` has the rules."""
        return sev.memory_encrypt_op(self, cmd, client or self._creator)

    def encrypt(self) -> None:
        """Run the init command that belongs to the VM's type; nothing for an unencrypted one.

        Raises:
            KvmError: as the command.
        """
        sev.encrypt(self)

    # -- life ------------------------------------------------------------------------------

    def moved(self, now_ns: int) -> None:
        """The owner's process is in another cgroup: what its vCPUs wait for, waits there."""
        for vcpu in self.vcpus.values():
            if vcpu.owed and not vcpu.closed:
                self.accounting.bus_lock_moved(vcpu.pid, vcpu, now_ns)

    def release(self) -> None:
        """The last VM descriptor was closed. Its vCPUs keep it alive."""
        if not self._released:
            self._released = True
            routing.close(self)
            self.put()

    def close(self, now_ns: int = 0) -> None:
        """Close every descriptor of the VM and its vCPUs, as the end of its owner does."""
        for holder in list(self.holders):
            holder.release(now_ns)
        for vcpu in self.vcpus.values():
            vcpu.release(now_ns)
        self.release()

    def get(self) -> None:
        """One reference more: a mirror of its guest, or another file of the VM."""
        self._references += 1

    def put(self) -> None:
        """One reference less; the last one destroys the VM."""
        self._references -= 1
        if self._references == 0:
            self.needs_init = False
            sev.destroy(self)
            self.system.forget(self)
            if self.on_end is not None:
                self.on_end(self)

    def statistics(self) -> VmStatistics:
        """Take a snapshot."""
        vcpus = tuple(vcpu.statistics() for vcpu in self.vcpus.values())
        total: dict[str, int] = {}
        for vcpu in vcpus:
            for name, count in vcpu.exits.items():
                total[name] = total.get(name, 0) + count
        return VmStatistics(
            vm_type=self.vm_type,
            state=self._state(),
            asid=sev.asid_of(self),
            kind=None if self.key is None else self.key.charge.kind,
            bus_lock_detection=self.bus_lock_detection,
            exits=total,
            bus_locks=sum(vcpu.bus_locks for vcpu in vcpus),
            throttled_ns=sum(vcpu.throttled_ns for vcpu in vcpus),
            owed=sum(vcpu.owed for vcpu in vcpus),
            vcpus=vcpus,
        )

    def _state(self) -> str:
        if not self.alive:
            return "destroyed"
        if self.dead:
            return "dead"
        if self.key is not None or self.sev_active:
            return "active"
        return "waiting" if self.needs_init else "plain"


@handles(VmFile, KVM_CHECK_EXTENSION)
def check_extension(vm: Vm, call: Call) -> int:
    """Answer for the VM."""
    return vm.check_extension(call.value)


@handles(VmFile, KVM_ENABLE_CAP)
def enable_cap(vm: Vm, call: Call) -> int:
    """Enable a capability; the structure is read before any value is looked at."""
    data = call.read(ENABLE_CAP_STRUCT.size_bytes)
    get = ENABLE_CAP_STRUCT.get
    args = tuple(get(data, "args", index) for index in range(4))
    return vm.enable_cap(KvmEnableCap(get(data, "cap"), args, get(data, "flags")), call.client)


@handles(VmFile, KVM_CREATE_VCPU)
def create_vcpu(vm: Vm, call: Call) -> Vcpu:
    """Make a vCPU; whoever called turns the object into a descriptor."""
    vcpu = vm.create_vcpu(call.value)
    clock.vcpu_created(vcpu, call.now_ns)
    return vcpu


@handles(VmFile, KVM_MEMORY_ENCRYPT_OP)
def memory_encrypt_op(vm: Vm, call: Call) -> int:
    """Memory encryption."""
    return sev.memory_encrypt_ioctl(vm, call)
