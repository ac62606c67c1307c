from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cgfs.controllers import CONTROLLERS
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from kvmsim.engine.scripted import Scripted
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.kvm.system import System
from kvmsim.vmm.timeline import Scheduled, Timeline
from kvmsim.vmm.vcpu_thread import VcpuThread
from kvmsim.vmm.vmm import Vmm


@dataclass
class Host:
    """A host in one process, with a trace of what was due when."""

    preset: str = "spr-buslock"
    stall_ns: int = 0
    trace: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roots = Roots(list(CONTROLLERS.values()))
        machine = Machine(load(self.preset), self.roots, CgroupAccounting(self.roots))
        self.system = System(machine)
        self.timeline = Timeline(
            self.roots.controller("bus_lock"), bus_lock_stall_ns=self.stall_ns, now_ns=0
        )
        self.timeline.observer = self.note
        self.write("/", "cgroup.subtree_control", "+bus_lock +misc +encryption_ids")

    def note(self, now_ns: int, who: Scheduled) -> None:
        assert isinstance(who, VcpuThread)
        self.trace.append((now_ns, who.name))

    def write(self, path: str, name: str, text: str) -> None:
        cgrp = self.roots.v2.find(path)
        found = self.roots.v2.file(cgrp, name)
        assert found is not None
        node, slot = found
        node.rows[slot - 1].write(node, text.encode(), KERNEL, self.timeline.now_ns)

    def read(self, path: str, name: str) -> str:
        found = self.roots.v2.file(self.roots.v2.find(path), name)
        assert found is not None
        node, slot = found
        return node.rows[slot - 1].show(node, KERNEL)

    def mkdir(self, path: str, limit: str = "max") -> None:
        parent, _, name = path.rpartition("/")
        self.roots.v2.mkdir(self.roots.v2.find(parent), name)
        self.write(path, "bus_lock.max", limit)

    def vm(self, *scripts, cgroup: str = "/", name: str = "vm", loop: int | None = None, **options):
        """A VM whose vCPU i plays script i (a list of stops, or an engine)."""
        owner = Owner()
        task = self.roots.spawn(self.roots.v2.find(cgroup), owner, self.timeline.now_ns)
        vmm = Vmm(name, self.system, self.timeline, pid=task.pid, **options)
        owner.vmm = vmm
        for script in scripts:
            times = 1 if loop is None else loop
            engine = Scripted(script, times or None) if isinstance(script, list) else script
            vmm.add_vcpu(engine)
        return vmm


class Owner:
    vmm: Vmm

    def killed(self, now_ns: int) -> None:
        self.vmm.killed(now_ns)

    def frozen(self, frozen: bool, now_ns: int) -> None:
        self.vmm.frozen(frozen, now_ns)

    def moved(self, now_ns: int) -> None:
        self.vmm.moved(now_ns)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def make_host():
    return Host
