"""Registers of performance monitoring among a vCPU's: counters, and last-branch records.

``kvmsim.kvm.msrs`` asks here before it looks at registers that are plain storage: some numbers of
counters are those of old processors too, for guests without a PMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.kvm import lbr, pmu

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
