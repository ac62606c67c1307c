"""KVM_GET_MSRS and KVM_SET_MSRS: tables of registers, as many entries as go well.

A register is a row: what it holds after reset and which values it takes from user space. A read or
write that KVM refuses ends the table; the call returns how many entries were done. Rules: Linux
6.12 x86.c ``kvm_set_msr_common``. The guest's own RDMSR and WRMSR come in by :func:`guest_read` and
:func:`guest_write`, whose differences are in ``kvmsim.kvm.msr_guest``.
"""

from __future__ import annotations

from errno import E2BIG
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmsim.abi import msrs as abi
from kvmsim.abi.ioctls import (
    KVM_GET_MSR_FEATURE_INDEX_LIST,
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_MSRS,
    KVM_SET_MSRS,
)
from kvmsim.abi.regs import EFER_LMA
from kvmsim.abi.structs import KVM_MSR_ENTRY, KVM_MSR_LIST, KVM_MSRS, MAX_IO_MSRS
from kvmsim.errors import KvmError
from kvmsim.kvm import (
    clock,
    cpuid,
    debugctl,
    mce,
    monitoring,
    msr_guest,
    msr_rules,
    pmu,
    protected,
    sregs,
)
from kvmsim.kvm.dispatch import SystemFile, VcpuFile, handles, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmsim.host.machine import Machine
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.msr_rules import Accept
    from kvmsim.kvm.system import System
    from kvmsim.kvm.vcpu import Vcpu

_ENTRY_BYTES = KVM_MSR_ENTRY.size_bytes


# -- one register --------------------------------------------------------------------------------


def read(vcpu: Vcpu, index: int, now_ns: int) -> int | None:
    """A register as user space reads it; None: refused."""
    if protected.hides_msr(vcpu, index):
        return None if vcpu.state_protected else 0
    special = SPECIAL.get(index)
    if special is not None:
        return special.read(vcpu, now_ns)
    if mce.owns(vcpu, index):
        return mce.read(vcpu, index)
    if monitoring.owns(vcpu, index):
        return monitoring.read(vcpu, index)
    value = _read_stored(vcpu, index)
    # Linux 6.12 kvm_do_msr_access: what is in the list reads as 0, also without the feature.
    listed = index in abi.SAVED[vcpu.vm.machine.preset.vendor]
    return 0 if value is None and listed and not _has_rule(vcpu, index) else value


def guest_read(vcpu: Vcpu, index: int, now_ns: int) -> int | None:
    """A register as the guest reads it; None: #GP."""
    special = SPECIAL.get(index)
    if special is not None:
        return (special.guest_read or special.read)(vcpu, now_ns)
    if mce.owns(vcpu, index):
        return mce.read(vcpu, index)
    if monitoring.owns(vcpu, index):
        return monitoring.read(vcpu, index)
    return _read_stored(vcpu, index) if msr_guest.may_read(vcpu, index) else None


def _read_stored(vcpu: Vcpu, index: int) -> int | None:
    if index in abi.WRITE_ONLY or not _announced(vcpu, index):
        return None
    vendor = vcpu.vm.machine.preset.vendor
    value = state_of(vcpu, msr_rules.Msrs).values.get(index)
    if value is not None:
        return value
    rule = msr_rules.RULES.get(index)
    if rule is not None and rule.vendor in {None, vendor}:
        return abi.FEATURES[vendor].get(index, rule.reset) if rule.of_host else rule.reset
    return None


def _announced(vcpu: Vcpu, index: int) -> bool:
    """Whether a paravirtual register is there for a guest whose CPUID is enforced."""
    bit = msr_guest.PARAVIRTUAL.get(index)
    return bit is None or msr_guest.pv_has(vcpu, bit)


def write(vcpu: Vcpu, index: int, value: int, now_ns: int) -> bool:
    """Set a register from user space; False: refused, nothing changed."""
    if protected.hides_msr(vcpu, index):
        return not vcpu.state_protected
    special = SPECIAL.get(index)
    if special is not None:
        return special.write(vcpu, value, now_ns)
    if mce.owns(vcpu, index):
        return mce.write(vcpu, index, value)
    if monitoring.owns(vcpu, index):
        return monitoring.write(vcpu, index, value, host_initiated=True)
    vendor = vcpu.vm.machine.preset.vendor
    if _write_stored(vcpu, index, value, None):
        return True
    return index in abi.SAVED[vendor] and not _has_rule(vcpu, index) and value == 0


def guest_write(vcpu: Vcpu, index: int, value: int, now_ns: int) -> bool:
    """Set a register from the guest; False: #GP, nothing changed."""
    special = SPECIAL.get(index)
    if special is not None:
        return (special.guest_write or special.write)(vcpu, value, now_ns)
    if mce.owns(vcpu, index):
        return mce.guest_write(vcpu, index, value)
    if monitoring.owns(vcpu, index):
        return monitoring.write(vcpu, index, value, host_initiated=False)
    return _write_stored(vcpu, index, value, msr_guest.accept(vcpu, index))


def known(vcpu: Vcpu, index: int) -> bool:
    """Whether KVM knows a register, for this or some other guest of the machine.

    It decides what user space hears of an access that was refused: a value that cannot be, or a
    register that is unknown.
    """
    by_number = index in SPECIAL or index in REFUSED or mce.owns(vcpu, index)
    return by_number or monitoring.knows(vcpu, index) or _has_rule(vcpu, index)


def _has_rule(vcpu: Vcpu, index: int) -> bool:
    rule = msr_rules.RULES.get(index)
    return rule is not None and rule.vendor in {None, vcpu.vm.machine.preset.vendor}


def _write_stored(vcpu: Vcpu, index: int, value: int, accept: Accept | None) -> bool:
    if not _has_rule(vcpu, index) or not _announced(vcpu, index):
        return False
    kept = (accept or msr_rules.RULES[index].accept)(vcpu, value)
    if kept is None:
        return False
    if kept is not msr_rules.IGNORED:
        state_of(vcpu, msr_rules.Msrs).keep(index, kept)
    return True


# -- registers that other state stands behind ----------------------------------------------------


class Special(NamedTuple):
    """How to reach a register: a reader answers None to refuse, a writer False.

    Attributes:
        read: (vcpu, now_ns), for user space.
        write: (vcpu, value, now_ns), for user space.
        guest_read: the same for the guest; None: as for user space.
        guest_write: the same for the guest; None: as for user space.
    """

    read: Callable[[Vcpu, int], int | None]
    write: Callable[[Vcpu, int, int], bool]
    guest_read: Callable[[Vcpu, int], int | None] | None = None
    guest_write: Callable[[Vcpu, int, int], bool] | None = None


def _segment_base(name: str) -> Special:
    def write_base(vcpu: Vcpu, value: int, now_ns: int) -> bool:
        del now_ns
        if not msr_rules.canonical(value):
            return False
        sregs.of(vcpu).put(name, value)
        return True

    return Special(lambda vcpu, now_ns: sregs.of(vcpu).get(name), write_base)


def _read_kernel_gs(vcpu: Vcpu, now_ns: int) -> int | None:
    """SWAPGS exchanges it without KVM."""
    del now_ns
    if vcpu.mirror is not None and abi.KERNEL_GS_BASE not in state_of(vcpu, msr_rules.Msrs).changed:
        return vcpu.mirror.fetch_msr(abi.KERNEL_GS_BASE)
    return msr_rules.stored(vcpu, abi.KERNEL_GS_BASE)


def _write_kernel_gs(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    del now_ns
    return _write_stored(vcpu, abi.KERNEL_GS_BASE, value, None)


def _write_tsc(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    clock.set_guest_tsc(vcpu, value, now_ns)
    return True


def _guest_write_tsc(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    """The guest sees in IA32_TSC_ADJUST what it has done; user space's writes do not show there."""
    clock.adjust_guest_tsc(vcpu, value - clock.guest_tsc(vcpu, now_ns))
    return True


def _has_tsc_adjust(vcpu: Vcpu) -> bool:
    return bool(cpuid.guest_register(vcpu, 7, "ebx") >> 1 & 1)


def _write_tsc_adjust(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    """Kept only for a guest whose CPUID shows the register; the counter stays."""
    del now_ns
    if _has_tsc_adjust(vcpu):
        clock.of_vcpu(vcpu).adjust = value
    return True


def _guest_write_tsc_adjust(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    del now_ns
    if _has_tsc_adjust(vcpu):
        clock.adjust_guest_tsc(vcpu, value - clock.of_vcpu(vcpu).adjust)
    return True


def _write_efer(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    """EFER.LMA follows from LME and paging: a write does not change it."""
    del now_ns
    if not sregs.valid_efer(vcpu, value):
        return False
    registers = sregs.of(vcpu)
    registers.put("efer", (value & ~EFER_LMA) | (registers.get("efer") & EFER_LMA))
    return True


SPECIAL: dict[int, Special] = {
    abi.FS_BASE: _segment_base("fs.base"),
    abi.GS_BASE: _segment_base("gs.base"),
    abi.KERNEL_GS_BASE: Special(_read_kernel_gs, _write_kernel_gs),
    abi.IA32_TSC: Special(clock.guest_tsc, _write_tsc, guest_write=_guest_write_tsc),
    abi.IA32_TSC_ADJUST: Special(
        lambda vcpu, now_ns: clock.of_vcpu(vcpu).adjust,
        _write_tsc_adjust,
        guest_write=_guest_write_tsc_adjust,
    ),
    abi.EFER: Special(lambda vcpu, now_ns: sregs.of(vcpu).get("efer"), _write_efer),
    abi.IA32_DEBUGCTL: Special(
        lambda vcpu, now_ns: debugctl.read(vcpu),
        lambda vcpu, value, now_ns: debugctl.write(vcpu, value, host_initiated=True),
        guest_write=lambda vcpu, value, now_ns: debugctl.write(vcpu, value, host_initiated=False),
    ),
    abi.IA32_PERF_CAPABILITIES: Special(
        lambda vcpu, now_ns: pmu.read_capabilities(vcpu),
        lambda vcpu, value, now_ns: pmu.write_capabilities(vcpu, value),
        guest_read=lambda vcpu, now_ns: pmu.guest_read_capabilities(vcpu),
        guest_write=lambda vcpu, value, now_ns: False,
    ),
}
#: Registers KVM knows that no machine here has: commands to flush the L1 cache.
REFUSED: Final = frozenset({0x10B})


# -- tables --------------------------------------------------------------------------------------


def _entries(call: Call) -> list[bytearray]:
    """The entries of a table.

    Raises:
        KvmError: EFAULT; E2BIG, 256 entries or more.
    """
    count = KVM_MSRS.get(call.read(KVM_MSRS.size_bytes), "nmsrs")
    if count >= MAX_IO_MSRS:
        raise KvmError(E2BIG, f"{count} MSRs")
    data = bytearray(call.read(count * _ENTRY_BYTES, KVM_MSRS.size_bytes) if count else b"")
    return [data[at : at + _ENTRY_BYTES] for at in range(0, len(data), _ENTRY_BYTES)]


def _read_table(call: Call, read_one: Callable[[int], int | None]) -> int:
    """Fill a table in up to the first register that cannot be read; how many could."""
    entries = _entries(call)
    done = 0
    for entry in entries:
        value = read_one(KVM_MSR_ENTRY.get(entry, "index"))
        if value is None:
            break
        KVM_MSR_ENTRY.put(entry, "data", value)
        done += 1
    if entries:
        call.write(b"".join(entries), KVM_MSRS.size_bytes)
    return done


@handles(VcpuFile, KVM_GET_MSRS)
def get_msrs(vcpu: Vcpu, call: Call) -> int:
    """Read registers; how many were read."""
    return _read_table(call, lambda index: read(vcpu, index, call.now_ns))


@handles(VcpuFile, KVM_SET_MSRS)
def set_msrs(vcpu: Vcpu, call: Call) -> int:
    """Write registers; how many were written."""
    done = 0
    for entry in _entries(call):
        index, value = KVM_MSR_ENTRY.get(entry, "index"), KVM_MSR_ENTRY.get(entry, "data")
        if not write(vcpu, index, value, call.now_ns):
            break
        done += 1
    return done


@handles(SystemFile, KVM_GET_MSRS)
def get_feature_msrs(system: System, call: Call) -> int:
    """Read what the host has of features announced by registers; how many were read."""
    machine = system.machine
    features = {
        **abi.FEATURES[machine.preset.vendor],
        abi.IA32_PERF_CAPABILITIES: pmu.supported_capabilities(machine),
    }
    return _read_table(call, features.get)


@handles(SystemFile, KVM_GET_MSR_INDEX_LIST)
def get_msr_index_list(system: System, call: Call) -> int:
    """Which registers to save and restore with a guest."""
    saved = abi.SAVED[system.machine.preset.vendor]
    emulated = saved.index(abi.KVM_WALL_CLOCK)
    counters = pmu.saved(system.machine)
    return _list(call, (*saved[:emulated], *counters, *saved[emulated:]))


@handles(SystemFile, KVM_GET_MSR_FEATURE_INDEX_LIST)
def get_msr_feature_index_list(system: System, call: Call) -> int:
    """Which registers announce features."""
    return _list(call, abi.FEATURES[system.machine.preset.vendor])


def saved(machine: Machine) -> tuple[int, ...]:
    """Registers to save and restore, in the kernel's order: the processor's, then KVM's own."""
    listed = abi.SAVED[machine.preset.vendor]
    last = listed.index(abi.LAST_BRANCH[-1]) + 1
    return *listed[:last], *pmu.saved(machine), *listed[last:]


def _list(call: Call, indices: Iterable[int]) -> int:
    """Answer with the number of indices, also when they do not fit (E2BIG)."""
    room = KVM_MSR_LIST.get(call.read(KVM_MSR_LIST.size_bytes), "nmsrs")
    data = b"".join(index.to_bytes(4, "little") for index in indices)
    call.write(KVM_MSR_LIST.pack(nmsrs=len(data) // 4))
    if room < len(data) // 4:
        raise KvmError(E2BIG, f"{len(data) // 4} MSRs")
    call.write(data, KVM_MSR_LIST.size_bytes)
    return 0
