"""VMs of clients: their directories in debugfs, and how commands see them.

The supervisor reports them; what is shown is as old as its last report.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cgfs.core.cftype import Kind
from cgfs.views.static import Directory, TextFile
from kvmsim.builder.layout import DEBUGFS, KVM_STATISTICS
from kvmsim.control.messages import VcpuSnapshot, VmSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.builder.clients import ClientSession
    from kvmsim.builder.host import Host
    from kvmsim.control.client_messages import ClientVm, VmReport

_TSC_FRACTION_BITS = {"amd": 32, "intel": 48}


class ReportedVm:
    """One VM of a client.

    Attributes:
        latest: what its supervisor reported last.
        pid: the host's number for the thread that made it.
        since_ns: host time of the first report.
        directory: its directory in debugfs; None if the name was taken, as in Linux.
        vcpu_pids: the host's number for the thread of each vCPU, by the vCPU's id.
    """

    __slots__ = ("directory", "latest", "pid", "since_ns", "vcpu_pids")

    def __init__(self, vm: ClientVm, pid: int, since_ns: int) -> None:
        self.latest = vm
        self.pid = pid
        self.since_ns = since_ns
        self.directory: Directory | None = None
        self.vcpu_pids: dict[int, int] = {}

    @property
    def name(self) -> str:
        """As debugfs calls it (Linux 6.12 kvm_main.c kvm_create_vm_debugfs())."""
        return f"{self.pid}-{self.latest.fd}"

    def count(self, names: tuple[str, ...]) -> int:
        """Exits of some kinds, of all vCPUs; of every kind without names."""
        return sum(
            count
            for vcpu in self.latest.vcpus
            for name, count in vcpu.exits.items()
            if not names or name in names
        )


class ClientVms:
    """The VMs of one supervisor.

    Args:
        host: on which they are.
        session: whose they are.
    """

    def __init__(self, host: Host, session: ClientSession) -> None:
        self._host = host
        self._session = session
        self._vms: dict[int, ReportedVm] = {}

    def __len__(self) -> int:
        return len(self._vms)

    def report(self, report: VmReport) -> None:
        """Take note of what has changed."""
        for key in report.gone:
            self._remove(key)
        for vm in report.vms:
            reported = self._vms.get(vm.key)
            if reported is None:
                self._add(vm)
            else:
                reported.latest = vm
                self._note_vcpus(reported)

    def close(self) -> None:
        """They are gone with their supervisor."""
        for key in list(self._vms):
            self._remove(key)

    def owner(self, name: str) -> int | None:
        """The process of a VM by that name; None if there is none."""
        for vm in self._vms.values():
            if vm.name == name:
                return vm.pid
        return None

    def exits(self, names: tuple[str, ...]) -> int:
        """Exits of some kinds, of all VMs."""
        return sum(vm.count(names) for vm in self._vms.values())

    def snapshots(self, now_ns: int) -> list[VmSnapshot]:
        """Every VM at a glance."""
        return [self._snapshot(vm, now_ns) for vm in self._vms.values()]

    def _snapshot(self, vm: ReportedVm, now_ns: int) -> VmSnapshot:
        roots = self._host.roots
        cgrp = roots.cgroup_of(vm.pid, roots.v2)
        vcpus = [
            VcpuSnapshot(v.id, v.state, sum(v.exits.values()), v.bus_locks, v.throttled_ns)
            for v in vm.latest.vcpus
        ]
        return VmSnapshot(
            name=vm.name,
            type=vm.latest.type,
            pid=vm.pid,
            cgroup=cgrp.path,
            state="frozen" if cgrp.e_freeze else "running",
            asid=vm.latest.asid,
            guest=f"client {self._session.program}",
            uptime_ns=now_ns - vm.since_ns,
            bus_lock_ratelimit=0,
            bus_locks=sum(vcpu.bus_locks for vcpu in vcpus),
            bus_lock_exits=vm.count(("X86_BUS_LOCK",)),
            throttled_ns=sum(vcpu.throttled_ns for vcpu in vcpus),
            ratelimit_ns=0,
            vcpus=vcpus,
        )

    # -- debugfs ---------------------------------------------------------------------------------

    @property
    def _debugfs(self) -> Directory:
        top = self._host.tree.top
        assert isinstance(top, Directory)
        return top.subdirectory(self._host.roots, DEBUGFS)

    def _add(self, vm: ClientVm) -> None:
        pid = self._session.host_pid(vm.pid)
        reported = self._vms[vm.key] = ReportedVm(vm, pid, self._host.timeline.now_ns)
        directory = Directory(self._host.roots)
        for name, kinds in KVM_STATISTICS.items():
            directory.entries[name] = self._file(partial(reported.count, kinds))
        if reported.name not in self._debugfs.entries:
            self._host.tree.insert(self._debugfs, reported.name, directory)
            reported.directory = directory
        self._note_vcpus(reported)

    def _note_vcpus(self, vm: ReportedVm) -> None:
        for vcpu in vm.latest.vcpus:
            if vcpu.pid and vm.vcpu_pids.get(vcpu.id, 0) == 0:
                vm.vcpu_pids[vcpu.id] = self._session.host_pid(vcpu.pid)
            name = f"vcpu{vcpu.id}"
            if vm.directory is not None and name not in vm.directory.entries:
                self._host.tree.insert(vm.directory, name, self._vcpu_directory(vm, vcpu.id))

    def _vcpu_directory(self, vm: ReportedVm, vcpu: int) -> Directory:
        bits = _TSC_FRACTION_BITS[self._host.preset.vendor]
        numbers: dict[str, Callable[[], int]] = {
            "guest_mode": lambda: 0,
            "pid": lambda: vm.vcpu_pids.get(vcpu, 0),
            "tsc-offset": lambda: 0,
            "tsc-scaling-ratio": lambda: 1 << bits,
            "tsc-scaling-ratio-frac-bits": lambda: bits,
        }
        entries = {name: self._file(number) for name, number in numbers.items()}
        return Directory(self._host.roots, {**entries})

    def _file(self, number: Callable[[], int]) -> TextFile:
        return TextFile(self._host.roots, lambda: f"{number()}\n", Kind.LIVE)

    def _remove(self, key: int) -> None:
        vm = self._vms.pop(key, None)
        if vm is not None and vm.directory is not None:
            self._host.tree.remove(self._debugfs, vm.name)
