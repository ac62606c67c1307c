"""The machine: a preset, what its kernel made of it, and the capacities it registered.

Making a machine is loading its KVM module: SEV is probed, and the capacities go to the cgroup
controllers the host has, ``sev`` before ``sev_es``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from kvmsim.host import sysfiles
from kvmsim.host.accounting import CHARGED_BY, has
from kvmsim.host.kernel_log import KernelLog
from kvmsim.host.lbr import LbrFacility, hardware_of
from kvmsim.host.sev_setup import set_up
from kvmsim.host.split_locks import SplitLocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cgfs.core.roots import Roots
    from kvmsim.host.accounting import Accounting
    from kvmsim.host.presets import Preset
    from kvmsim.host.quirks import Quirks


class Counted(Protocol):
    """What a machine tells a controller."""

    below_zero: bool

    def set_capacity(self, resource: str, amount: int) -> None:
        """Say how many units of a resource the machine has."""


class Extensible(Protocol):
    """What it tells misc besides: the kernel knows its resources by name, a preset may add some."""

    def add_resource(self, resource: str) -> None:
        """Know a resource; nothing if it is known already."""


class Machine:
    """One physical machine with its kernel running.

    Args:
        preset: which machine.
        roots: the hierarchies of the host; ``None`` for a machine whose capacities live elsewhere.
        accounting: who charges cgroups and admits bus locks.

    Attributes:
        preset: as given.
        accounting: as given.
        sev: SEV as KVM may use it.
        capacities: every counted resource that exists, in registration order.
        bus_lock_exit: ``none``, ``trap`` or ``fault``.
        kernel_log: what the kernel prints while it runs.
        lbr: last-branch hardware; None without, or without a PMU for guests.
        lbr_facility: who of the host has it.
        split_lock: the kernel's policy for split locks, at work.
        parameters: ``module/parameters/name`` below ``/sys/module`` -> text.
        log: what the kernel printed about SEV.
    """

    __slots__ = (
        "_cpuinfo",
        "accounting",
        "bus_lock_exit",
        "capacities",
        "kernel_log",
        "lbr",
        "lbr_facility",
        "log",
        "parameters",
        "preset",
        "sev",
        "split_lock",
    )

    def __init__(self, preset: Preset, roots: Roots | None, accounting: Accounting) -> None:
        self.preset = preset
        self.accounting = accounting
        self.sev = set_up(preset)
        self.log = self.sev.log
        self.bus_lock_exit = preset.bus_lock.exit
        self.lbr = hardware_of(preset) if preset.pmu is not None else None
        self.kernel_log = KernelLog()
        self.lbr_facility = LbrFacility(self.kernel_log)
        self.split_lock = SplitLocks(preset, self.kernel_log)
        self.capacities = {name: amount for name, amount in self._counted() if amount}
        self.parameters = sysfiles.module_parameters(preset, self.sev)
        self._cpuinfo = ""
        if roots is not None:
            self._register(roots)

    @property
    def quirks(self) -> Quirks:
        """The kernel's oddities on this machine."""
        return self.preset.quirks

    @property
    def cpuinfo(self) -> str:
        """The text of ``/proc/cpuinfo``."""
        if not self._cpuinfo:
            self._cpuinfo = sysfiles.cpuinfo(self.preset)
        return self._cpuinfo

    @property
    def bus_lock_stall_ns(self) -> int:
        """For how long one bus lock stalls every other CPU."""
        return self.preset.bus_lock.stall_cycles * 1_000_000 // self.preset.tsc_khz

    def _counted(self) -> Iterator[tuple[str, int]]:
        yield "sev", self.sev.sev_capacity
        yield "sev_es", self.sev.sev_es_capacity
        if self.preset.tdx is not None:
            yield "tdx", self.preset.tdx.keys
        yield from self.preset.misc.items()

    def _register(self, roots: Roots) -> None:
        for name, amount in self.capacities.items():
            for controller in CHARGED_BY.get(name, ("misc",)):
                if has(roots, controller):
                    counted = cast("Counted", roots.controller(controller))
                    if controller == "misc":
                        cast("Extensible", counted).add_resource(name)
                    counted.below_zero = self.quirks.move_charges_wrong_type
                    counted.set_capacity(name, amount)
