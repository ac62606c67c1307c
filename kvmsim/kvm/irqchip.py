"""Which interrupt controllers of a VM are in the kernel.

The controllers themselves: ``kvmsim.kvm.pic``, ``ioapic`` and ``lapic``; how they are made and
moved: ``kvmsim.kvm.irqchip_calls``.
"""

from __future__ import annotations

from errno import ENXIO
from typing import TYPE_CHECKING

from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.ioapic import Ioapic
    from kvmsim.kvm.pic import Pics
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm


class Irqchip:
    """The controllers of one VM.

    Attributes:
        full: PICs and IOAPIC exist; without, the local APICs only (a split irqchip), or nothing.
        pins: IOAPIC pins user space keeps for a split irqchip.
        pics: both PICs; None unless ``full``.
        ioapic: the IOAPIC; None unless ``full``.
        handles: says of a vCPU and a vector whether it may come of the IOAPIC in user space, which
            is to hear of its end then; None without such an IOAPIC.
        boot_cpu: id of the vCPU that starts by itself.
    """

    __slots__ = ("boot_cpu", "full", "handles", "ioapic", "pics", "pins")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.full = False
        self.pins = 0
        self.pics: Pics | None = None
        self.ioapic: Ioapic | None = None
        self.handles: Callable[[Vcpu, int], bool] | None = None
        self.boot_cpu = 0


def of(vm: Vm) -> Irqchip:
    """The controllers of a VM."""
    return state_of(vm, Irqchip)


def controllers(vm: Vm) -> tuple[Pics, Ioapic]:
    """PICs and IOAPIC of a VM that has them in the kernel; KvmError ENXIO."""
    chip = of(vm)
    if chip.pics is None or chip.ioapic is None:
        raise KvmError(ENXIO, "no interrupt controllers in the kernel")
    return chip.pics, chip.ioapic
