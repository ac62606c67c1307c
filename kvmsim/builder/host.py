"""One emulated host: a machine with its KVM, its cgroups, and the VMs that run on it.

The same object serves a mount (``kvmsim.builder.serve``) and a test (``kvmsim.open_host``). All
calls are synchronous and take effect at the timeline's present; ``run`` is the one task that moves
it.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, cast

from cgfs.control.errors import CommandError
from cgfs.controllers import CONTROLLERS
from cgfs.controllers.misc import Misc
from cgfs.core.roots import Roots
from cgfs.views.tree import Tree
from kvmsim.abi import caps
from kvmsim.builder.clients import Clients
from kvmsim.builder.files import Files
from kvmsim.builder.layout import KVM_STATISTICS, host_root
from kvmsim.builder.process import VmProcess
from kvmsim.control.messages import HostSnapshot, LbrState, Resource, StartVm, VmSnapshot
from kvmsim.engine.synthetic import parse_guest
from kvmsim.errors import ConfigError
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.kvm.system import System
from kvmsim.sim.streams import vcpu_stream
from kvmsim.vmm.run_loop import RunLoop
from kvmsim.vmm.timeline import Timeline
from kvmsim.vmm.vmm import Vmm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import trio

    from cgfs.control.launch import Launch
    from cgfs.control.server import Peer
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.tasks import Processes
    from kvmsim.builder.clients import ClientSession
    from kvmsim.engine.base import GuestEngine
    from kvmsim.host.presets import Preset
    from kvmsim.vmm.timeline import Limiter

    Engines = Callable[[int], GuestEngine]

log = logging.getLogger(__name__)

VM_TYPES = {
    "default": caps.KVM_X86_DEFAULT_VM,
    "sev": caps.KVM_X86_SEV_VM,
    "sev-es": caps.KVM_X86_SEV_ES_VM,
    "snp": caps.KVM_X86_SNP_VM,
    "tdx": caps.KVM_X86_TDX_VM,
}
NO_TRACKING = "none: emulated processes only"


class Host:
    """An emulated host.

    Args:
        preset: the machine.
        name: of the preset, for people.
        controllers: cgroup controllers of its kernel, by name.
        seed: chance of its guests.
        processes: who knows the real processes; None for none.
        epoch_ns: time of the epoch at the start, for the times of files.

    Attributes:
        roots: its cgroup hierarchies.
        accounting: who charges them.
        machine: the hardware, and what its kernel makes of it.
        system: its KVM.
        timeline: its time.
        loop: what moves the time.
        tree: its root directory.
        files: the same, to read and write without a mount.
        vms: its running VMs by name, oldest first.
        clients: supervisors of programs that use its KVM.
        place: where it is mounted; None without a mount.
        process_tracking: how real processes are followed, for people.
    """

    def __init__(
        self,
        preset: Preset,
        name: str,
        controllers: Sequence[str] = tuple(CONTROLLERS),
        seed: int = 0,
        processes: Processes | None = None,
        epoch_ns: int = 0,
    ) -> None:
        self.preset = preset
        self.name = name
        self.seed = seed
        self.roots = Roots([CONTROLLERS[name] for name in controllers], processes)
        misc = self.roots.controllers.get("misc")
        if isinstance(misc, Misc):
            for resource in preset.misc:
                misc.add_resource(resource)
        self.accounting = CgroupAccounting(self.roots)
        self.machine = Machine(preset, self.roots, self.accounting)
        self.machine.kernel_log.on_line = partial(log.warning, "kernel: %s")
        self.system = System(self.machine)
        limiter = cast("Limiter | None", self.roots.controllers.get("bus_lock"))
        self.timeline = Timeline(limiter, bus_lock_stall_ns=self.machine.bus_lock_stall_ns)
        self.loop = RunLoop(self.timeline)
        self.vms: dict[str, VmProcess] = {}
        self.place: Launch | None = None
        self.process_tracking = NO_TRACKING
        self._started_ns = self.timeline.now_ns
        top = host_root(self.roots, self.machine, name, self.kvm_statistics())
        self.tree = Tree(self.roots, top, epoch_ns - self._started_ns)
        self.tree.before_access = self.catch_up
        self.files = Files(self.tree, self.now_ns)
        self.clients = Clients(self)
        self.tree.settle = self.clients.before_read

    # -- time ----------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """The present of the model."""
        return self.timeline.now_ns

    def catch_up(self) -> None:
        """Brings the model up to the present of the clock."""
        self.loop.catch_up()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Moves the host's time until cancelled."""
        await self.loop.run(task_status=task_status)

    def close(self) -> None:
        """Ends every VM."""
        for process in list(self.vms.values()):
            process.killed(self.timeline.now_ns)
        self.clients.close()

    def attach_client(
        self, program: str, peer: Peer, notify: Callable[[str, object], None]
    ) -> ClientSession:
        """Lets a supervisor of client programs in."""
        return self.clients.attach(program, peer, notify)

    # -- virtual machines ------------------------------------------------------------------------

    async def settle(self) -> None:
        """Waits until clients' supervisors have given back what was closed."""
        await self.clients.settle()

    def start_vm(
        self, request: StartVm, caller_pid: int = 0, engines: Engines | None = None
    ) -> VmSnapshot:
        """Starts a VM. All or nothing.

        Args:
            request: which.
            caller_pid: in whose cgroup, where the request does not say.
            engines: makes the guest of each vCPU, by its id; None for what the request says.

        Raises:
            CommandError: the name is taken, or a word of the request is not understood.
            CgroupError: the cgroup is not there or takes no processes.
            KvmError: KVM refuses; the refused charge is its cause.
        """
        self.catch_up()
        if request.name in self.vms:
            raise CommandError("the name is taken")
        process = VmProcess(request, self._cgroup(request.cgroup, caller_pid), self.roots)
        try:
            vmm = self._boot(process, request, engines or self._guest(request))
        except BaseException:
            process.exit(self.timeline.now_ns)
            raise
        self.vms[request.name] = process
        process.run(vmm, self.timeline.now_ns)
        log.info("vm %s started in cgroup %s", request.name, process.cgroup)
        return process.snapshot(self.timeline.now_ns)

    def _guest(self, request: StartVm) -> Engines:
        """The guest that a request describes in words."""
        try:
            guest = parse_guest(request.guest)
        except ConfigError as error:
            raise CommandError(str(error), os.EX_USAGE) from error
        seed = self.seed if request.seed is None else request.seed
        return lambda vcpu: guest.engine(vcpu_stream(seed, request.name, vcpu))

    def _boot(self, process: VmProcess, request: StartVm, engines: Engines) -> Vmm:
        vm_type = self._vm_type(request.type)
        vmm = Vmm(
            request.name,
            self.system,
            self.timeline,
            pid=process.spawn(self.timeline.now_ns),
            vm_type=vm_type,
            bus_lock_ratelimit=request.bus_lock_ratelimit,
        )
        try:
            for vcpu in range(request.vcpus):
                vmm.add_vcpu(engines(vcpu))
        except BaseException:
            vmm.stop(self.timeline.now_ns)
            raise
        vmm.on_stopped = self._stopped
        return vmm

    def vmm(self, name: str) -> Vmm:
        """The VMM of a running VM; KeyError if there is none of that name."""
        return self.vms[name].vmm

    def _stopped(self, vmm: Vmm, now_ns: int) -> None:
        """A VM has ended, whoever ended it."""
        process = self.vms.pop(vmm.name, None)
        if process is not None:
            process.exit(now_ns)
            log.info("vm %s stopped", vmm.name)

    def stop_vm(self, name: str) -> VmSnapshot:
        """Stops a VM and returns what it was.

        Raises:
            CommandError: there is no such VM.
        """
        self.catch_up()
        process = self.vms.get(name)
        if process is None:
            for client in self.clients:
                if (owner := client.vms.owner(name)) is not None:
                    raise CommandError(f"it belongs to a program: end process {owner}")
            raise CommandError("no such VM")
        snapshot = process.snapshot(self.timeline.now_ns)
        process.killed(self.timeline.now_ns)
        return snapshot

    def _vm_type(self, name: str) -> int:
        vm_type = VM_TYPES.get(name)
        if vm_type is None:
            known = ", ".join(VM_TYPES)
            raise CommandError(f"no VM type {name!r} (there are: {known})", os.EX_USAGE)
        if not self.system.check_extension(caps.KVM_CAP_VM_TYPES) & 1 << vm_type:
            raise CommandError(f"this machine ({self.name}) has no {name} guests")
        return vm_type

    def _cgroup(self, path: str | None, caller_pid: int) -> Cgroup:
        if path is not None:
            return self.roots.v2.find(path)
        return self.roots.cgroup_of(caller_pid, self.roots.v2)

    # -- watching --------------------------------------------------------------------------------

    def set_lbr(self, state: LbrState) -> LbrState:
        """Let a program of the host take the last-branch records, or give them back."""
        facility = self.machine.lbr_facility
        if state.taken:
            facility.take()
        else:
            facility.release()
        self.clients.tell_lbr(state)
        return state

    def statistics(self) -> HostSnapshot:
        """The host at a glance."""
        self.catch_up()
        used = [vm.key.charge.kind for vm in self.system.vms if vm.key is not None]
        used += [kind for client in self.clients for kind in client.kinds_held()]
        place = self.place
        log_file = place.log if place else None
        return HostSnapshot(
            directory=str(place.directory) if place else "",
            preset=self.name,
            description=self.preset.description,
            vendor=self.preset.vendor,
            cpus=self.preset.cpus,
            controllers=list(self.roots.controllers),
            resources={
                name: Resource(capacity, used.count(name))
                for name, capacity in self.machine.capacities.items()
            },
            vms=len(self.vms) + sum(len(client.vms) for client in self.clients),
            cgroups=1 + self.roots.v2.root.nr_descendants,
            process_tracking=self.process_tracking,
            seed=self.seed,
            uptime_ns=self.timeline.now_ns - self._started_ns,
            pid=os.getpid(),
            uid=os.geteuid(),
            socket=str(place.socket) if place else "",
            log=str(log_file) if log_file else "",
        )

    def vm_statistics(self) -> list[VmSnapshot]:
        """Every VM, in the order they were started; those of clients after the host's own."""
        self.catch_up()
        now_ns = self.timeline.now_ns
        own = [process.snapshot(now_ns) for process in self.vms.values()]
        return own + [vm for client in self.clients for vm in client.vms.snapshots(now_ns)]

    def kvm_statistics(self) -> dict[str, Callable[[], int]]:
        """KVM's statistics files in debugfs: sums over all VMs."""

        def count(names: tuple[str, ...]) -> int:
            own = (vm.statistics().exits for vm in self.system.vms)
            return sum(
                number for exits in own for name, number in exits.items() if _counts(names, name)
            ) + sum(client.vms.exits(names) for client in self.clients)

        return {name: partial(count, names) for name, names in KVM_STATISTICS.items()}


def _counts(names: tuple[str, ...], name: str) -> bool:
    """Whether a statistic counts an exit."""
    return not names or name in names
