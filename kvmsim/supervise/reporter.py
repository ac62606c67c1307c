"""Tells the host what VMs there are and what they do, for ``vm list`` and debugfs.

Nothing on the way of a call: a task looks at the VMs a moment after something was made or closed,
and now and then while there are any. What lives shorter than that is never reported.
"""

from __future__ import annotations

from errno import EIO
from typing import TYPE_CHECKING, NamedTuple

import trio

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_CREATE_VM, KVM_RUN
from kvmsim.control.client_messages import ClientVcpu, ClientVm, VmReport
from kvmsim.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from kvmsim.interpose.clients import Process
    from kvmsim.kvm.dispatch import KvmFile
    from kvmsim.kvm.system import System
    from kvmsim.kvm.vm import Vm
    from kvmsim.supervise.connection import HostConnection

SOON_S = 0.005
"""From the making of a VM to its report."""

LOOK_S = 0.02
"""Between two looks whether a VM is gone."""

EVERY_S = 0.1
"""Between two reports of what VMs do."""

_TYPES = {
    caps.KVM_X86_DEFAULT_VM: "default",
    caps.KVM_X86_SEV_VM: "sev",
    caps.KVM_X86_SEV_ES_VM: "sev-es",
    caps.KVM_X86_SNP_VM: "snp",
    caps.KVM_X86_TDX_VM: "tdx",
}


class _Made(NamedTuple):
    """Where a VM came from."""

    key: int
    pid: int
    fd: int


class Reporter:
    """Reports the VMs of one supervisor; a tap that notes who makes and runs what.

    Without a host there is nothing to run on: every call fails with EIO.

    Args:
        system: their KVM.
        connection: to the host, attached.
    """

    def __init__(self, system: System, connection: HostConnection) -> None:
        self._system = system
        self._connection = connection
        self._made: dict[Vm, _Made] = {}
        self._runners: dict[Vcpu, int] = {}
        self._last_key = 0
        self._reported: dict[int, ClientVm] = {}
        self._news = trio.Event()

    def called(self, file: KvmFile, request: int, arg: int, caller: Process) -> int | None:
        """Note which thread runs a vCPU."""
        del arg
        if request == KVM_RUN and isinstance(file, Vcpu):
            self._runners[file] = caller.thread.number
        return EIO if self._connection.lost else None

    def returned(
        self, file: KvmFile, request: int, arg: int, caller: Process, result: int, now_ns: int
    ) -> None:
        """Note who made a VM, and under which number it is known there."""
        del arg, now_ns
        if request == KVM_CREATE_VM and result >= 0 and file is self._system:
            vm = next(reversed(self._system.vms), None)
            if vm is not None and vm not in self._made:
                self._last_key += 1
                self._made[vm] = _Made(self._last_key, caller.thread.number, result)
                self._news.set()

    async def run(self) -> None:
        """Report until cancelled."""
        reported_s = trio.current_time()
        while True:
            if self._made or self._reported:
                with trio.move_on_after(LOOK_S):
                    await self._news.wait()
            else:
                await self._news.wait()
            if self._news.is_set():
                self._news = trio.Event()
                await trio.sleep(SOON_S)
            now_s = trio.current_time()
            if self._has_come_or_gone() or now_s - reported_s >= EVERY_S:
                reported_s = now_s
                self.report()

    def report(self) -> None:
        """Tell the host what has changed since the last report."""
        present = {
            made.key: self._snapshot(vm, made)
            for vm, made in list(self._made.items())
            if vm in self._system.vms
        }
        self._made = {vm: made for vm, made in self._made.items() if vm in self._system.vms}
        self._runners = {v: tid for v, tid in self._runners.items() if v.vm in self._made}
        gone = [key for key in self._reported if key not in present]
        changed = [vm for key, vm in present.items() if self._reported.get(key) != vm]
        self._reported = present
        if gone or changed:
            self._connection.post("client.report", VmReport(changed, gone))

    def _has_come_or_gone(self) -> bool:
        return len(self._made) != len(self._reported) or len(self._system.vms) != len(self._made)

    def _snapshot(self, vm: Vm, made: _Made) -> ClientVm:
        statistics = vm.statistics()
        vcpus = [
            ClientVcpu(
                id=vcpu.id,
                pid=self._runners.get(vm.vcpus[vcpu.id], 0),
                state=vcpu.phase,
                exits=dict(vcpu.exits),
                bus_locks=vcpu.bus_locks,
                throttled_ns=vcpu.throttled_ns,
            )
            for vcpu in statistics.vcpus
        ]
        return ClientVm(
            key=made.key,
            pid=made.pid,
            fd=made.fd,
            type=_type(vm),
            state=statistics.state,
            asid=statistics.asid,
            bus_lock_exits=statistics.bus_lock_detection,
            vcpus=vcpus,
        )


def _type(vm: Vm) -> str:
    """The VM's type; one made encrypted by an old init command is what it has become."""
    if vm.vm_type == caps.KVM_X86_DEFAULT_VM and vm.sev_active:
        return "sev-es" if vm.es_active else "sev"
    return _TYPES.get(vm.vm_type, str(vm.vm_type))
