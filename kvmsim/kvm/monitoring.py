"""Registers of performance monitoring among a vCPU's: counters, and last-branch records.

``kvmsim.kvm.msrs`` asks here before it looks at registers that are plain storage: some numbers of
counters are those of old processors too, for guests without a PMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.kvm import lapic, lbr, pmu

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu


def owns(vcpu: Vcpu, index: int) -> bool:
    """Whether a register is one of these; it may be refused all the same."""
    return lbr.owns(index) or pmu.owns(vcpu, index)


def knows(vcpu: Vcpu, index: int) -> bool:
    """Whether the guest has the register."""
    return lbr.has(vcpu, index) if lbr.owns(index) else pmu.owns(vcpu, index)


def read(vcpu: Vcpu, index: int) -> int | None:
    """Read a register, for guest and user space alike; None: refused."""
    return lbr.read(vcpu, index) if lbr.owns(index) else pmu.read(vcpu, index)


def write(vcpu: Vcpu, index: int, value: int, *, host_initiated: bool) -> bool:
    """Write a register; False: refused."""
    if lbr.owns(index):
        return lbr.write(vcpu, index, value)
    return pmu.write(vcpu, index, value, host_initiated=host_initiated)


# -- overflow ------------------------------------------------------------------------------------


def overflow(vcpu: Vcpu, counter: int, now_ns: int) -> bool:
    """A counter of the guest overflowed, says whoever plays its events; nothing counts here.

    Args:
        vcpu: the vCPU.
        counter: its bit in the global registers: 0 to 7 general-purpose, 32 to 34 fixed.
        now_ns: the present.

    Returns:
        Whether an interrupt was due and went to the local APIC.
    """
    if not pmu.overflowed(vcpu, counter):
        return False
    return deliver_pmi(vcpu, now_ns)


def deliver_pmi(vcpu: Vcpu, now_ns: int) -> bool:
    """A performance monitoring interrupt; only an in-kernel APIC delivers one.

    Linux 6.12 pmu.c ``kvm_pmu_deliver_pmi``: the records freeze before the interrupt is requested.
    """
    if not vcpu.vm.irqchip:
        return False
    lbr.freeze_on_pmi(vcpu)
    return lapic.of(vcpu).deliver_local(lapic.LVTPC, now_ns)
