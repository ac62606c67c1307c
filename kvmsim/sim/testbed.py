"""A host without edges: cgroups, KVM and time in one object, for scenarios and measurements.

It has no clock and does no I/O: :meth:`Testbed.run` is as fast as the machine it runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cgfs.controllers.bus_lock import BusLock, BusLockCss
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from kvmsim.engine.synthetic import parse_guest
from kvmsim.errors import KvmError
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.kvm.system import System
from kvmsim.sim.streams import vcpu_stream
from kvmsim.vmm.timeline import Timeline
from kvmsim.vmm.vmm import Vmm

if TYPE_CHECKING:
    from cgfs.core.cgroup import Cgroup

NS_PER_S = 1_000_000_000


class Testbed:
    """One host with the bus_lock controller.

    Args:
        preset: name of the machine.
        seed: the chance of its guests.
        bus_lock_stall_ns: what a bus lock costs every CPU; the machine's own value by default.

    Attributes:
        seed: as given.
        roots: its cgroups.
        system: its KVM.
        timeline: its time.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(
        self, preset: str = "spr-buslock", *, seed: int = 1, bus_lock_stall_ns: int | None = None
    ) -> None:
        self.seed = seed
        self.roots = Roots([BusLock])
        machine = Machine(load(preset), self.roots, CgroupAccounting(self.roots))
        self.system = System(machine)
        limiter = self.roots.controller("bus_lock")
        assert isinstance(limiter, BusLock)
        if bus_lock_stall_ns is None:
            bus_lock_stall_ns = machine.bus_lock_stall_ns
        self.timeline = Timeline(limiter, bus_lock_stall_ns=bus_lock_stall_ns)
        self.write(self.roots.v2.root, "cgroup.subtree_control", "+bus_lock")

    def write(self, cgrp: Cgroup, file: str, text: str) -> None:
        """Write a control file, as root would.

        Raises:
            CgroupError: as the file does.
        """
        found = self.roots.v2.file(cgrp, file)
        assert found is not None
        node, slot = found
        write = node.rows[slot - 1].write
        assert write is not None
        write(node, text.encode(), KERNEL, self.timeline.now_ns)

    def group(self, name: str, limit: str = "max", parent: Cgroup | None = None) -> Cgroup:
        """Make a cgroup; ``limit`` is written to its ``bus_lock.max``."""
        hierarchy = self.roots.v2
        cgrp = hierarchy.mkdir(parent or hierarchy.root, name, now_ns=self.timeline.now_ns)
        self.write(cgrp, "bus_lock.max", limit)
        return cgrp

    def state(self, cgrp: Cgroup) -> BusLockCss:
        """The bus_lock state of a cgroup."""
        css = cgrp.css["bus_lock"]
        assert isinstance(css, BusLockCss)
        return css

    def vm(
        self,
        name: str,
        guest: str,
        cgrp: Cgroup | None = None,
        *,
        nr_vcpus: int = 1,
        bus_lock_ratelimit: int = 0,
    ) -> Vmm:
        """Start a VM now.

        Raises:
            ConfigError: the words for the guest are not understood.
            KvmError: as :class:`Vmm`; nothing is left behind.
        """
        spec = parse_guest(guest)
        owner = _Owner()
        now_ns = self.timeline.now_ns
        task = self.roots.spawn(cgrp or self.roots.v2.root, owner, now_ns)
        try:
            vmm = owner.vmm = Vmm(
                name,
                self.system,
                self.timeline,
                pid=task.pid,
                bus_lock_ratelimit=bus_lock_ratelimit,
            )
        except KvmError:
            self.roots.exit(task, now_ns)
            raise
        vmm.on_stopped = lambda _, ended_ns: self.roots.exit(task, ended_ns)
        for vcpu_id in range(nr_vcpus):
            vmm.add_vcpu(spec.engine(vcpu_stream(self.seed, name, vcpu_id)))
        if task.frozen:
            vmm.frozen(frozen=True, now_ns=now_ns)
        vmm.start(now_ns)
        return vmm

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.timeline.advance(self.timeline.now_ns + round(seconds * NS_PER_S))


class _Owner:
    """The emulated process of one VM.

    Attributes:
        vmm: what runs the VM; None while it is being made.
    """

    __slots__ = ("vmm",)

    def __init__(self) -> None:
        self.vmm: Vmm | None = None

    def killed(self, now_ns: int) -> None:
        """SIGKILL."""
        if self.vmm is not None:
            self.vmm.killed(now_ns)

    def frozen(self, frozen: bool, now_ns: int) -> None:
        """Frozen or thawed."""
        if self.vmm is not None:
            self.vmm.frozen(frozen, now_ns)

    def moved(self, now_ns: int) -> None:
        """In another cgroup."""
        if self.vmm is not None:
            self.vmm.moved(now_ns)
