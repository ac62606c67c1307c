"""Performance monitoring of a guest, as far as last-branch records need it (kvm.md E.3, F.2).

A guest has a PMU if the host gives KVM one (``[pmu]`` of the preset), its VM was not made without
(``KVM_CAP_PMU_CAPABILITY``) and its CPUID has leaf 0xA. The counters are registers that keep what
is written to them; nothing counts, so they never overflow and never interrupt.

``IA32_PERF_CAPABILITIES`` (0x345)::

    5:0 format of last-branch records    13 counters can be written in full width
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid
from kvmsim.kvm.dispatch import enables, state_of

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import KvmEnableCap, Vm

LBR_FORMAT = 0x3F
FULL_WIDTH_WRITES = 1 << 13
PMU_CAP_DISABLE = 1
PDCM = 15
MAX_COUNTERS, MAX_FIXED = 8, 3

COUNTER, EVENT_SELECT, FULL_WIDTH_COUNTER, FIXED_COUNTER = 0xC1, 0x186, 0x4C1, 0x309
FIXED_CTRL, GLOBAL_STATUS, GLOBAL_CTRL, GLOBAL_OVF_CTRL = 0x38D, 0x38E, 0x38F, 0x390
_GLOBAL = frozenset({GLOBAL_STATUS, GLOBAL_CTRL, GLOBAL_OVF_CTRL})
#: Linux 6.12 pmu_intel.c: what an event select register does not take.
EVENT_RESERVED = 0xFFFF_FFFF_0020_0000
#: Enabled, and an interrupt at overflow.
EVENT_ON_AND_INTERRUPTS = 1 << 22 | 1 << 20
FIXED_INTERRUPTS = 1 << 3
FIRST_FIXED_BIT = 32
RDPMC_FIXED, RDPMC_FAST = 1 << 30, 1 << 31
OVF_CTRL_ANYWHERE = 3 << 62
_U64 = (1 << 64) - 1


class VmPmu:
    """Whether the guests of a VM may have a PMU.

    Attributes:
        enabled: they may.
    """

    __slots__ = ("enabled",)

    def __init__(self, vm: Vm) -> None:
        self.enabled = vm.machine.preset.pmu is not None


class Pmu:
    """The PMU of one vCPU.

    Attributes:
        capabilities: ``IA32_PERF_CAPABILITIES`` as set.
        values: register -> value, those that were written.
    """

    __slots__ = ("capabilities", "values")

    def __init__(self, vcpu: Vcpu) -> None:
        self.capabilities = supported_capabilities(vcpu.vm.machine)
        self.values: dict[int, int] = {}

    def reset(self) -> None:
        """Power-on; the capabilities stay."""
        self.values.clear()


def of(vcpu: Vcpu) -> Pmu:
    """The PMU of a vCPU."""
    return state_of(vcpu, Pmu)


@enables(caps.KVM_CAP_PMU_CAPABILITY)
def set_pmu_capability(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Bit 0: no PMU for this VM; before the first vCPU, and where KVM has one to give."""
    del client
    if vm.machine.preset.pmu is None or enable.arg0 & ~PMU_CAP_DISABLE or vm.vcpus:
        raise KvmError(EINVAL, f"PMU capability {enable.arg0:#x}")
    state_of(vm, VmPmu).enabled = not enable.arg0 & PMU_CAP_DISABLE
    return 0


# -- what it is ------------------------------------------------------------------------------------


def supported_capabilities(machine: Machine) -> int:
    """0x345 as KVM can show it; 0 without a PMU.

    A format of last-branch records that have no call-stack mode is not shown (Linux 6.10 and
    later).
    """
    if machine.preset.pmu is None:
        return 0
    found = machine.lbr
    if found is None or not (found.call_stack or machine.quirks.lbr_first_series):
        return FULL_WIDTH_WRITES
    return FULL_WIDTH_WRITES | found.format


def version(vcpu: Vcpu) -> int:
    """The PMU version of a guest; 0: it has none."""
    if not state_of(vcpu.vm, VmPmu).enabled:
        return 0
    return cpuid.guest_register(vcpu, 0xA, "eax") & 0xFF


def _counters(vcpu: Vcpu) -> int:
    pmu = vcpu.vm.machine.preset.pmu
    shown = cpuid.guest_register(vcpu, 0xA, "eax") >> 8 & 0xFF
    return min(shown, pmu.counters if pmu is not None else 0, MAX_COUNTERS)


def _fixed_counters(vcpu: Vcpu) -> int:
    pmu = vcpu.vm.machine.preset.pmu
    if version(vcpu) < 2 or pmu is None:
        return 0
    shown = cpuid.guest_register(vcpu, 0xA, "edx") & 0x1F
    return min(shown, pmu.fixed_counters, MAX_FIXED)


def has_pdcm(vcpu: Vcpu) -> bool:
    """Whether the guest's CPUID shows 0x345."""
    return bool(cpuid.guest_register(vcpu, 1, "ecx") >> PDCM & 1)


def effective_capabilities(vcpu: Vcpu) -> int:
    """0x345 as it counts for the guest: nothing without PDCM."""
    return of(vcpu).capabilities if has_pdcm(vcpu) else 0


# -- 0x345 -----------------------------------------------------------------------------------------


def read_capabilities(vcpu: Vcpu) -> int:
    """0x345 for user space."""
    return of(vcpu).capabilities


def guest_read_capabilities(vcpu: Vcpu) -> int | None:
    """0x345 for the guest; None: #GP. A write is always #GP."""
    return of(vcpu).capabilities if has_pdcm(vcpu) else None


def write_capabilities(vcpu: Vcpu, value: int) -> bool:
    """User space sets 0x345; False: refused. After the first run only what it is already."""
    state, machine = of(vcpu), vcpu.vm.machine
    if vcpu.has_run:
        return value == state.capabilities
    supported = supported_capabilities(machine)
    if value & ~supported & ~LBR_FORMAT or (value and not version(vcpu)):
        return False
    wanted = value & LBR_FORMAT
    fits = wanted == supported & LBR_FORMAT and cpuid.guest_model(vcpu) == machine.preset.model
    if wanted and not fits:
        if not machine.quirks.lbr_first_series:
            return False
        value &= ~LBR_FORMAT
    state.capabilities = value
    refresh(vcpu)
    return True


def refresh(vcpu: Vcpu) -> None:
    """CPUID or 0x345 was set: the PMU starts anew (Linux 6.12 ``kvm_pmu_refresh``)."""
    state = vcpu.state.get(Pmu)
    if isinstance(state, Pmu):
        state.reset()
    if vcpu.debug is not None and vcpu.debug.lbr is not None:
        vcpu.debug.lbr.release()
    machine = vcpu.vm.machine
    if machine.quirks.lbr_first_series and (
        version(vcpu) < 2 or cpuid.guest_model(vcpu) != machine.preset.model
    ):
        of(vcpu).capabilities &= ~LBR_FORMAT


# -- counters --------------------------------------------------------------------------------------


def owns(vcpu: Vcpu, index: int) -> bool:
    """Whether a register is one of the guest's PMU."""
    if vcpu.vm.machine.preset.pmu is None or not version(vcpu):
        return False
    if index in _GLOBAL or index == FIXED_CTRL:
        return version(vcpu) > 1
    if FULL_WIDTH_COUNTER <= index < FULL_WIDTH_COUNTER + _counters(vcpu):
        return bool(effective_capabilities(vcpu) & FULL_WIDTH_WRITES)
    return (
        COUNTER <= index < COUNTER + _counters(vcpu)
        or EVENT_SELECT <= index < EVENT_SELECT + _counters(vcpu)
        or FIXED_COUNTER <= index < FIXED_COUNTER + _fixed_counters(vcpu)
    )


def read(vcpu: Vcpu, index: int) -> int:
    """Read a register it owns."""
    return of(vcpu).values.get(_place(index), 0) if index != GLOBAL_OVF_CTRL else 0


def write(vcpu: Vcpu, index: int, value: int, *, host_initiated: bool) -> bool:
    """Write a register it owns; False: #GP, or refused."""
    values = of(vcpu).values
    if index == GLOBAL_OVF_CTRL:
        if value & ~(_counter_bits(vcpu) | OVF_CTRL_ANYWHERE):
            return False
        if not host_initiated:
            values[GLOBAL_STATUS] = values.get(GLOBAL_STATUS, 0) & ~value
        return True
    kept = _kept(vcpu, index, value, host_initiated=host_initiated)
    if kept is None:
        return False
    values[_place(index)] = kept
    return True


def _kept(vcpu: Vcpu, index: int, value: int, *, host_initiated: bool) -> int | None:
    """What a register holds after a write; None: it does not take the value."""
    width = (1 << 48) - 1
    if index == GLOBAL_STATUS:
        allowed = _counter_bits(vcpu) | OVF_CTRL_ANYWHERE if host_initiated else 0
        return None if value & ~allowed or not host_initiated else value
    if index == GLOBAL_CTRL:
        return None if value & ~_counter_bits(vcpu) else value
    if index == FIXED_CTRL:
        allowed = sum(0xB << 4 * at for at in range(_fixed_counters(vcpu)))
        return None if value & ~allowed else value
    if EVENT_SELECT <= index < EVENT_SELECT + MAX_COUNTERS:
        return None if value & EVENT_RESERVED else value
    if index >= FULL_WIDTH_COUNTER:
        return None if value & ~width else value
    if COUNTER <= index < COUNTER + MAX_COUNTERS and not host_initiated:
        # The guest writes 32 bits, sign-extended (SDM volume 3, 20.2.3).
        value &= 0xFFFF_FFFF
        value |= (_U64 << 32) & _U64 if value >> 31 else 0
    return value & width


def rdpmc(vcpu: Vcpu, index: int) -> int | None:
    """A counter by its number for RDPMC; None: #GP.

    Linux 6.12 pmu_intel.c ``intel_rdpmc_ecx_to_pmc``: bit 30 fixed counters, bit 31 only 32 bits.
    """
    if not version(vcpu):
        return None
    fixed, number = bool(index & RDPMC_FIXED), index & ~(RDPMC_FIXED | RDPMC_FAST)
    if number >= (_fixed_counters(vcpu) if fixed else _counters(vcpu)):
        return None
    value = of(vcpu).values.get((FIXED_COUNTER if fixed else COUNTER) + number, 0)
    return value & 0xFFFF_FFFF if index & RDPMC_FAST else value


def overflowed(vcpu: Vcpu, counter: int) -> bool:
    """A counter overflowed: its status bit is set; whether that is to interrupt the guest."""
    bit = 1 << counter
    if not _counter_bits(vcpu) & bit or version(vcpu) < 2:
        return False
    values = of(vcpu).values
    values[GLOBAL_STATUS] = values.get(GLOBAL_STATUS, 0) | bit
    if counter >= FIRST_FIXED_BIT:
        control = values.get(FIXED_CTRL, 0) >> 4 * (counter - FIRST_FIXED_BIT)
        wanted = bool(control & 3) and bool(control & FIXED_INTERRUPTS)
    else:
        select = values.get(EVENT_SELECT + counter, 0)
        wanted = select & EVENT_ON_AND_INTERRUPTS == EVENT_ON_AND_INTERRUPTS
    return wanted and bool(values.get(GLOBAL_CTRL, 0) & bit)


def _counter_bits(vcpu: Vcpu) -> int:
    """Global control: one bit for each counter."""
    return (1 << _counters(vcpu)) - 1 | ((1 << _fixed_counters(vcpu)) - 1) << 32


def _place(index: int) -> int:
    """Both numbers of a counter are one register."""
    full_width = FULL_WIDTH_COUNTER <= index < FULL_WIDTH_COUNTER + MAX_COUNTERS
    return index - FULL_WIDTH_COUNTER + COUNTER if full_width else index


def saved(machine: Machine) -> tuple[int, ...]:
    """What KVM_GET_MSR_INDEX_LIST shows of it; last-branch records are not among them."""
    pmu = machine.preset.pmu
    if pmu is None:
        return ()
    return (
        *range(FIXED_COUNTER, FIXED_COUNTER + pmu.fixed_counters),
        *(FIXED_CTRL, GLOBAL_STATUS, GLOBAL_CTRL),
        *range(COUNTER, COUNTER + pmu.counters),
        *range(EVENT_SELECT, EVENT_SELECT + pmu.counters),
    )
