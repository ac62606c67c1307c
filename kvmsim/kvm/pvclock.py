"""kvmclock: the page of a vCPU from which its guest tells the time, and the wall clock.

The guest names an address by an MSR; KVM writes there at the next entry, and again whenever the
relation between the time-stamp counter and the VM's nanoseconds has become another. The structure
says how to get from one to the other::

    ns = system_time + (tsc - tsc_timestamp << tsc_shift) * tsc_to_system_mul >> 32

Linux 6.12 x86.c ``kvm_guest_time_update``, ``kvm_write_wall_clock``; asm/pvclock-abi.h.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmsim.abi import msrs as abi
from kvmsim.engine.x86.memory import NoMemory
from kvmsim.kvm import clock, memslots, msr_guest, msrs
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.x86.memory import Memory
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm

#: version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags.
TIME_INFO = Struct("<I4xQQIbB2x")
#: version, seconds, nanoseconds.
WALL_CLOCK = Struct("<III")
TSC_STABLE, GUEST_STOPPED = 1 << 0, 1 << 1
ENABLED = 1
NS_PER_S = 1_000_000_000


class WallClock:
    """Where the guests of a VM asked for the wall clock last.

    Attributes:
        address: as the register reads.
        due: it is to be written there at the next entry.
    """

    __slots__ = ("address", "due")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.address = 0
        self.due = False


class PvClock:
    """The kvmclock of one vCPU.

    Attributes:
        seen: ``VmClock.changes`` when the page was written last.
        version: of the page; odd while it is written.
    """

    __slots__ = ("seen", "version")

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.seen = 0
        self.version = 0


def of(vcpu: Vcpu) -> PvClock:
    """The kvmclock of a vCPU."""
    return state_of(vcpu, PvClock)


def scale(tsc_khz: int) -> tuple[int, int]:
    """Multiplier and shift from a counter to nanoseconds (x86.c ``kvm_get_time_scale``)."""
    shift, ticks, scaled = 0, tsc_khz * 1000, NS_PER_S
    while ticks > scaled * 2 or ticks >> 32:
        ticks >>= 1
        shift -= 1
    while ticks <= scaled:
        if ticks & 0x8000_0000:
            scaled >>= 1
        else:
            ticks <<= 1
        shift += 1
    return (scaled << 32) // ticks, shift


def enter(vcpu: Vcpu, memory: Memory, now_ns: int) -> None:
    """The vCPU enters the guest: what is due is written. An address without memory is skipped."""
    wall = state_of(vcpu.vm, WallClock)
    if wall.due:
        wall.due = False
        _write_wall_clock(vcpu.vm, memory, wall.address, now_ns)
    state, changes = of(vcpu), clock.of(vcpu.vm).changes
    if state.seen != changes:
        state.seen = changes
        if clock.of_vcpu(vcpu).system_time & ENABLED:
            _write_time(vcpu, state, memory, now_ns)


def _write_time(vcpu: Vcpu, state: PvClock, memory: Memory, now_ns: int) -> None:
    own = clock.of_vcpu(vcpu)
    state.version += 2
    flags = TSC_STABLE | (GUEST_STOPPED if own.stopped else 0)
    own.stopped = False
    multiplier, shift = scale(own.tsc_khz)
    data = TIME_INFO.pack(
        *(state.version, clock.guest_tsc(vcpu, now_ns), clock.kvmclock_ns(vcpu.vm, now_ns)),
        *(multiplier, shift, flags),
    )
    put(vcpu.vm, memory, own.system_time & ~ENABLED, data)


def _write_wall_clock(vm: Vm, memory: Memory, address: int, now_ns: int) -> None:
    """The wall clock when kvmclock was 0."""
    began_ns = clock.wall_ns(vm, now_ns) - clock.kvmclock_ns(vm, now_ns)
    seconds, rest_ns = divmod(began_ns, NS_PER_S)
    put(vm, memory, address, WALL_CLOCK.pack(2, seconds & 0xFFFF_FFFF, rest_ns))


def put(vm: Vm, memory: Memory, gpa: int, data: bytes) -> None:
    """Write to guest memory as KVM does for a guest; nothing, where there is none."""
    try:
        memory.write(gpa, data)
    except NoMemory:
        return
    memslots.of(vm).mark_dirty(gpa, len(data))


# -- registers -------------------------------------------------------------------------------------


def _read_time(vcpu: Vcpu, now_ns: int) -> int:
    del now_ns
    return clock.of_vcpu(vcpu).system_time


def _write_time_msr(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    del now_ns
    clock.of_vcpu(vcpu).system_time = value
    clock.changed(vcpu.vm)
    return True


def _read_wall(vcpu: Vcpu, now_ns: int) -> int:
    del now_ns
    return state_of(vcpu.vm, WallClock).address


def _write_wall_msr(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    del now_ns
    wall = state_of(vcpu.vm, WallClock)
    wall.address, wall.due = value, bool(value)
    clock.changed(vcpu.vm)
    return True


def _announced(
    bit: int, read: Callable[[Vcpu, int], int], write: Callable[[Vcpu, int, int], bool]
) -> msrs.Special:
    """Registers that a guest without a feature does not have, nor user space for it."""
    return msrs.Special(
        lambda vcpu, now_ns: read(vcpu, now_ns) if msr_guest.pv_has(vcpu, bit) else None,
        lambda vcpu, value, now_ns: msr_guest.pv_has(vcpu, bit) and write(vcpu, value, now_ns),
    )


# The earlier and the later number are one register.
msrs.SPECIAL[abi.KVM_SYSTEM_TIME] = _announced(0, _read_time, _write_time_msr)
msrs.SPECIAL[abi.KVM_SYSTEM_TIME_NEW] = _announced(3, _read_time, _write_time_msr)
msrs.SPECIAL[abi.KVM_WALL_CLOCK] = _announced(0, _read_wall, _write_wall_msr)
msrs.SPECIAL[abi.KVM_WALL_CLOCK_NEW] = _announced(3, _read_wall, _write_wall_msr)
