"""KVM_GET_STATS_FD: counters as a file that describes itself.

Layout: kvm.md F.8. The counters KVM has on x86 come first, in its order; those it counts and a
model does not are 0. kvmsim's own are at the end of the vCPU's.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack
from typing import TYPE_CHECKING

from kvmsim.abi import stats as abi
from kvmsim.abi.exits import Exit
from kvmsim.abi.ioctls import KVM_GET_STATS_FD
from kvmsim.abi.stats import NAME_BYTES
from kvmsim.kvm.dispatch import VcpuFile, VmFile, handles
from kvmsim.kvm.holder import VmHolder
from kvmsim.kvm.run import HALTED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm

HIST_VALUES = 32
NANOSECONDS = abi.KVM_STATS_UNIT_SECONDS


@dataclass(frozen=True, slots=True)
class Stat:
    """One counter or histogram.

    Attributes:
        name: as in the file.
        flags: ``KVM_STATS_*``: type and unit.
        exponent: power of ten of the unit.
        values: 64-bit numbers it has.
        exits: the KVM_RUN exit it counts.
        count: what it counts otherwise; None: 0.
    """

    name: str
    flags: int = abi.KVM_STATS_TYPE_CUMULATIVE
    exponent: int = 0
    values: int = 1
    exits: Exit | None = None
    count: Callable[[Vcpu], int] | None = None

    def value(self, vcpu: Vcpu) -> int:
        """What a vCPU has counted."""
        if self.exits is not None:
            return vcpu.exits[self.exits]
        return 0 if self.count is None else self.count(vcpu)


def _duration(name: str) -> Stat:
    return Stat(name, NANOSECONDS, -9)


def _histogram(name: str) -> Stat:
    return Stat(name, NANOSECONDS | abi.KVM_STATS_TYPE_LOG_HIST, -9, HIST_VALUES)


_BOOLEAN = abi.KVM_STATS_TYPE_INSTANT | abi.KVM_STATS_UNIT_BOOLEAN
VCPU_STATS: Sequence[Stat] = (
    *map(Stat, ("halt_successful_poll", "halt_attempted_poll", "halt_poll_invalid")),
    Stat("halt_wakeup"),
    *map(_duration, ("halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns")),
    *map(_histogram, ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")),
    Stat("blocking", _BOOLEAN, count=lambda vcpu: int(vcpu.phase == HALTED)),
    *map(Stat, ("pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast")),
    *map(Stat, ("pf_mmio_spte_created", "pf_guest", "tlb_flush", "invlpg")),
    Stat("exits", count=lambda vcpu: sum(vcpu.exits)),
    Stat("io_exits", exits=Exit.IO),
    Stat("mmio_exits", exits=Exit.MMIO),
    Stat("signal_exits", exits=Exit.INTR),
    Stat("irq_window_exits", exits=Exit.IRQ_WINDOW_OPEN),
    *map(Stat, ("nmi_window_exits", "l1d_flush")),
    Stat("halt_exits", exits=Exit.HLT),
    *map(Stat, ("request_irq_exits", "irq_exits", "host_state_reload", "fpu_reload")),
    *map(Stat, ("insn_emulation", "insn_emulation_fail", "hypercalls", "irq_injections")),
    *map(Stat, ("nmi_injections", "req_event", "nested_run", "directed_yield_attempted")),
    *map(Stat, ("directed_yield_successful", "preemption_reported", "preemption_other")),
    Stat("guest_mode", _BOOLEAN),
    Stat("notify_window_exits", exits=Exit.NOTIFY),
    Stat("bus_lock_exits", exits=Exit.X86_BUS_LOCK),
    Stat("bus_locks", count=lambda vcpu: vcpu.bus_locks),
    Stat("bus_lock_throttled_ns", NANOSECONDS, -9, count=lambda vcpu: vcpu.throttled_ns),
)
VM_STATS: Sequence[Stat] = (
    *map(Stat, ("remote_tlb_flush", "remote_tlb_flush_requests", "mmu_shadow_zapped")),
    *map(Stat, ("mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled")),
    Stat("mmu_cache_miss"),
    *(
        Stat(name, abi.KVM_STATS_TYPE_INSTANT)
        for name in ("mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits")
    ),
    Stat("max_mmu_rmap_size", abi.KVM_STATS_TYPE_PEAK),
    Stat("max_mmu_page_hash_collisions", abi.KVM_STATS_TYPE_PEAK),
)


class StatsFile(VmHolder):
    """The file, for reading only. Since Linux 6.5 it keeps its VM alive.

    Args:
        vm: the VM.
        name: what the file calls itself.
        stats: what is counted.
        vcpu: whose counters; None: the VM's own, all 0.

    Attributes:
        name: as given.
    """

    __slots__ = ("_head", "_stats", "_vcpu", "name")

    def __init__(self, vm: Vm, name: str, stats: Sequence[Stat], vcpu: Vcpu | None = None) -> None:
        super().__init__(vm)
        self.name = name
        self._stats = stats
        self._vcpu = vcpu
        self._head = _head(name, stats)

    @property
    def link_name(self) -> str:
        """See :attr:`KvmFile.link_name`."""
        return "kvm-vm-stats" if self._vcpu is None else f"kvm-vcpu-stats:{self._vcpu.id}"

    def content(self) -> bytes:
        """The whole file as it is now."""
        values = b"".join(
            pack(f"<{stat.values}Q", self._value(stat), *([0] * (stat.values - 1)))
            for stat in self._stats
        )
        return self._head + values

    def _value(self, stat: Stat) -> int:
        return 0 if self._vcpu is None else stat.value(self._vcpu)


def _head(name: str, stats: Sequence[Stat]) -> bytes:
    """Header, name and descriptors: what never changes."""
    id_offset = abi.KVM_STATS_HEADER.size_bytes
    desc_offset = id_offset + NAME_BYTES
    data_offset = desc_offset + len(stats) * (abi.KVM_STATS_DESC.size_bytes + NAME_BYTES)
    head = abi.KVM_STATS_HEADER.pack(
        name_size=NAME_BYTES,
        num_desc=len(stats),
        id_offset=id_offset,
        desc_offset=desc_offset,
        data_offset=data_offset,
    )
    head += name.encode()[: NAME_BYTES - 1].ljust(NAME_BYTES, b"\0")
    offset = 0
    for stat in stats:
        head += abi.KVM_STATS_DESC.pack(
            flags=stat.flags, exponent=stat.exponent, size=stat.values, offset=offset
        )
        head += stat.name.encode().ljust(NAME_BYTES, b"\0")
        offset += 8 * stat.values
    return bytes(head)


@handles(VmFile, KVM_GET_STATS_FD)
def get_vm_stats(vm: Vm, call: Call) -> StatsFile:
    """Make the file of a VM's counters; whoever called turns the object into a descriptor."""
    return StatsFile(vm, f"kvm-{call.client.pid}", VM_STATS)


@handles(VcpuFile, KVM_GET_STATS_FD)
def get_vcpu_stats(vcpu: Vcpu, call: Call) -> StatsFile:
    """Make the file of a vCPU's counters."""
    name = f"kvm-{vcpu.creator.pid}/vcpu-{vcpu.id}"
    del call
    return StatsFile(vcpu.vm, name, VCPU_STATS, vcpu)
