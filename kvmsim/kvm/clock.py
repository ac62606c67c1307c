"""Time as guests see it: kvmclock, time-stamp counters, their offsets.

The machine's counter runs at the preset's frequency from time 0 of the model. A VM's kvmclock
starts with the VM, its vCPUs' counters with its first vCPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, ENXIO
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import (
    KVM_GET_CLOCK,
    KVM_GET_DEVICE_ATTR,
    KVM_GET_TSC_KHZ,
    KVM_HAS_DEVICE_ATTR,
    KVM_KVMCLOCK_CTRL,
    KVM_SET_CLOCK,
    KVM_SET_DEVICE_ATTR,
    KVM_SET_TSC_KHZ,
)
from kvmsim.abi.irq import (
    KVM_CLOCK_DATA,
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
)
from kvmsim.abi.structs import KVM_DEVICE_ATTR
from kvmsim.errors import KvmError
from kvmsim.kvm.client import copy_from_user, copy_to_user
from kvmsim.kvm.dispatch import VcpuFile, VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm

U64_MASK = (1 << 64) - 1
#: Widest scaling the processors can do: guest frequency over host frequency.
MAX_RATIO = 255


class VmClock:
    """The time of one VM.

    Args:
        vm: whose.

    Attributes:
        started_ns: when kvmclock was 0; None until somebody looks.
        tsc_khz: frequency of vCPUs made from here on.
        written: the last write of a counter that user space or a new vCPU made.
        tsc_offset: guest counter minus (scaled) host counter of vCPUs that are in step.
        user_set_tsc: user space has written a counter.
        changes: how often the relation between counters and kvmclock has become another.
    """

    __slots__ = ("changes", "started_ns", "tsc_khz", "tsc_offset", "user_set_tsc", "written")

    def __init__(self, vm: Vm) -> None:
        self.started_ns: int | None = None
        self.tsc_khz = vm.machine.preset.tsc_khz
        self.written: TscWrite | None = None
        self.tsc_offset = 0
        self.user_set_tsc = False
        self.changes = 0


@dataclass(frozen=True, slots=True)
class TscWrite:
    """A write of a time-stamp counter.

    Attributes:
        value: what was written.
        now_ns: when.
        tsc_khz: frequency of the counter.
    """

    value: int
    now_ns: int
    tsc_khz: int

    def cycles_later(self, now_ns: int) -> int:
        """What the counter is now."""
        return self.value + (now_ns - self.now_ns) * self.tsc_khz // 1_000_000


class VcpuClock:
    """The time-stamp counter of one vCPU.

    Args:
        vcpu: whose.

    Attributes:
        tsc_khz: its frequency.
        offset: guest counter minus (scaled) host counter, 64 bits.
        adjust: IA32_TSC_ADJUST: what the guest itself has added to its counter.
        system_time: KVM_SYSTEM_TIME: where the guest's kvmclock is, bit 0: it is enabled.
        stopped: the guest is to be told by its kvmclock that it was paused.
    """

    __slots__ = ("adjust", "offset", "stopped", "system_time", "tsc_khz")

    def __init__(self, vcpu: Vcpu) -> None:
        self.tsc_khz = of(vcpu.vm).tsc_khz
        self.offset: int = 0
        self.adjust: int = 0
        self.system_time = 0
        self.stopped = False


def of(vm: Vm) -> VmClock:
    """The time of a VM."""
    return state_of(vm, VmClock)


def of_vcpu(vcpu: Vcpu) -> VcpuClock:
    """The counter of a vCPU."""
    return state_of(vcpu, VcpuClock)


def changed(vm: Vm) -> None:
    """Counters and kvmclock of a VM are related in another way: guests are told at entry."""
    of(vm).changes += 1


def kvmclock_ns(vm: Vm, now_ns: int) -> int:
    """Nanoseconds of the VM; they begin when somebody looks first."""
    clock = of(vm)
    if clock.started_ns is None:
        clock.started_ns = now_ns
    return now_ns - clock.started_ns & U64_MASK


def wall_ns(vm: Vm, now_ns: int) -> int:
    """The time of day, from 1970 on; without a real clock that of the model."""
    return now_ns + (vm.system.epoch_ns or 0)


def host_tsc(machine: Machine, now_ns: int) -> int:
    """The machine's time-stamp counter."""
    return now_ns * machine.preset.tsc_khz // 1_000_000


def vcpu_created(vcpu: Vcpu, now_ns: int) -> None:
    """A vCPU was made: its counter is in step with the others'."""
    _synchronize(vcpu, 0, now_ns)


def _synchronize(vcpu: Vcpu, value: int, now_ns: int) -> None:
    """Write a counter. What looks like an attempt to keep vCPUs in step keeps them so.

    That is a zero, as for a new vCPU, and what is within a second of where the counter would be;
    the vCPU then gets the offset of the others (Linux 6.12 x86.c kvm_synchronize_tsc).
    """
    vm, own = of(vcpu.vm), of_vcpu(vcpu)
    last, khz = vm.written, own.tsc_khz
    in_step = value == 0
    if value and vm.user_set_tsc and last is not None:
        in_step = abs(value - last.cycles_later(now_ns)) < khz * 1000
    if not (in_step and last is not None and last.tsc_khz == khz):
        vm.tsc_offset = value - now_ns * khz // 1_000_000 & U64_MASK
    vm.written = TscWrite(value, now_ns, khz)
    own.offset = vm.tsc_offset


def guest_tsc(vcpu: Vcpu, now_ns: int) -> int:
    """What RDTSC gives in the guest."""
    clock = of_vcpu(vcpu)
    return now_ns * clock.tsc_khz // 1_000_000 + clock.offset & U64_MASK


def set_guest_tsc(vcpu: Vcpu, value: int, now_ns: int) -> None:
    """User space writes IA32_TSC."""
    _synchronize(vcpu, value, now_ns)
    of(vcpu.vm).user_set_tsc = True
    changed(vcpu.vm)


def adjust_guest_tsc(vcpu: Vcpu, delta: int) -> None:
    """The guest moves its counter, by either of its registers for that."""
    clock = of_vcpu(vcpu)
    clock.offset = clock.offset + delta & U64_MASK
    clock.adjust = clock.adjust + delta & U64_MASK
    changed(vcpu.vm)


# -- kvmclock ------------------------------------------------------------------------------------


@handles(VmFile, KVM_GET_CLOCK)
def get_clock(vm: Vm, call: Call) -> int:
    """Nanoseconds of the VM, with the host counter they belong to."""
    real = vm.system.epoch_ns is not None
    call.write(
        KVM_CLOCK_DATA.pack(
            clock=kvmclock_ns(vm, call.now_ns),
            flags=KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC | (KVM_CLOCK_REALTIME if real else 0),
            realtime=wall_ns(vm, call.now_ns) if real else 0,
            host_tsc=host_tsc(vm.machine, call.now_ns),
        )
    )
    return 0


@handles(VmFile, KVM_SET_CLOCK)
def set_clock(vm: Vm, call: Call) -> int:
    """Set the VM's nanoseconds, as they were at the time of day given with them."""
    data = call.read(KVM_CLOCK_DATA.size_bytes)
    flags = KVM_CLOCK_DATA.get(data, "flags")
    if flags & ~caps.KVM_CLOCK_VALID_FLAGS:
        raise KvmError(EINVAL, "flags of KVM_SET_CLOCK")
    value = KVM_CLOCK_DATA.get(data, "clock")
    if flags & KVM_CLOCK_REALTIME and vm.system.epoch_ns is not None:
        value += max(0, wall_ns(vm, call.now_ns) - KVM_CLOCK_DATA.get(data, "realtime"))
    of(vm).started_ns = call.now_ns - value
    changed(vm)
    return 0


@handles(VcpuFile, KVM_KVMCLOCK_CTRL)
def kvmclock_ctrl(vcpu: Vcpu, call: Call) -> int:
    """Tell the guest it was paused; EINVAL unless it has enabled its clock."""
    del call
    if not of_vcpu(vcpu).system_time & 1:
        raise KvmError(EINVAL, "the guest has no kvmclock")
    of_vcpu(vcpu).stopped = True
    changed(vcpu.vm)
    return 0


# -- time-stamp counters -------------------------------------------------------------------------


def _checked_khz(machine: Machine, khz: int) -> int:
    """A frequency to set; 0 means the host's. KvmError EINVAL beyond what scaling can do."""
    if not 0 <= khz <= machine.preset.tsc_khz * MAX_RATIO or khz >= 1 << 31:
        raise KvmError(EINVAL, f"{khz} kHz")
    return khz or machine.preset.tsc_khz


@handles(VmFile, KVM_GET_TSC_KHZ)
def get_vm_tsc_khz(vm: Vm, call: Call) -> int:
    """The frequency a new vCPU starts with."""
    del call
    return of(vm).tsc_khz


@handles(VmFile, KVM_SET_TSC_KHZ)
def set_vm_tsc_khz(vm: Vm, call: Call) -> int:
    """Choose the frequency new vCPUs start with, before there is any."""
    khz = _checked_khz(vm.machine, call.value & 0xFFFF_FFFF)
    if vm.vcpus:
        raise KvmError(EINVAL, "vCPUs exist")
    of(vm).tsc_khz = khz
    return 0


@handles(VcpuFile, KVM_GET_TSC_KHZ)
def get_tsc_khz(vcpu: Vcpu, call: Call) -> int:
    """The frequency of the vCPU's counter."""
    del call
    return of_vcpu(vcpu).tsc_khz


@handles(VcpuFile, KVM_SET_TSC_KHZ)
def set_tsc_khz(vcpu: Vcpu, call: Call) -> int:
    """Choose the frequency of the vCPU's counter."""
    of_vcpu(vcpu).tsc_khz = _checked_khz(vcpu.vm.machine, call.value & 0xFFFF_FFFF)
    changed(vcpu.vm)
    return 0


# -- attributes of a vCPU ------------------------------------------------------------------------


def _offset_address(call: Call) -> int:
    """Where the value of the offset is; KvmError ENXIO for any other attribute."""
    data = call.read(KVM_DEVICE_ATTR.size_bytes)
    get = KVM_DEVICE_ATTR.get
    wanted = (get(data, "group"), get(data, "attr"))
    if wanted != (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET):
        raise KvmError(ENXIO, f"no attribute {wanted}")
    return get(data, "addr")


@handles(VcpuFile, KVM_HAS_DEVICE_ATTR)
def has_device_attr(vcpu: Vcpu, call: Call) -> int:
    """Whether an attribute exists."""
    del vcpu
    _offset_address(call)
    return 0


@handles(VcpuFile, KVM_GET_DEVICE_ATTR)
def get_device_attr(vcpu: Vcpu, call: Call) -> int:
    """Copy the offset of the counter out."""
    offset = of_vcpu(vcpu).offset
    copy_to_user(call.client, _offset_address(call), offset.to_bytes(8, "little"))
    return 0


@handles(VcpuFile, KVM_SET_DEVICE_ATTR)
def set_device_attr(vcpu: Vcpu, call: Call) -> int:
    """Take the offset of the counter over."""
    data = copy_from_user(call.client, _offset_address(call), 8)
    of_vcpu(vcpu).offset = int.from_bytes(data, "little")
    changed(vcpu.vm)
    return 0
