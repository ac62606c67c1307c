"""The emulated process that owns a VM: what ``cgroup.procs`` shows, moves, freezes and kills."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.control.messages import StartVm, VcpuSnapshot, VmSnapshot

if TYPE_CHECKING:
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.roots import Roots
    from cgfs.core.tasks import Task
    from kvmsim.vmm.vmm import Vmm


class VmProcess:
    """A VM's process.

    Args:
        request: how the VM was asked for.
        cgroup: where it starts.
        roots: the host's hierarchies.
    """

    def __init__(self, request: StartVm, cgroup: Cgroup, roots: Roots) -> None:
        self._request = request
        self._start = cgroup
        self._roots = roots
        self._task: Task | None = None
        self._vmm: Vmm | None = None
        self._frozen = False
        self._killed = False
        self._started_ns = 0

    @property
    def cgroup(self) -> str:
        """Path of the cgroup it is in."""
        if self._task is None:
            return self._start.path
        return self._task.place(self._roots.v2).path

    @property
    def vmm(self) -> Vmm:
        """What runs it, once it has booted."""
        assert self._vmm is not None
        return self._vmm

    def spawn(self, now_ns: int) -> int:
        """Makes the process, before it has opened KVM; returns its pid.

        Raises:
            CgroupError: its cgroup takes no processes.
        """
        self._task = self._roots.spawn(self._start, self, now_ns)
        self._started_ns = now_ns
        return self._task.pid

    def run(self, vmm: Vmm, now_ns: int) -> None:
        """The VM is made; its vCPUs go, unless the cgroup is frozen or has killed the process."""
        self._vmm = vmm
        if self._killed:
            vmm.killed(now_ns)
            return
        if self._frozen:
            vmm.frozen(frozen=True, now_ns=now_ns)
        vmm.start(now_ns)

    def exit(self, now_ns: int) -> None:
        """The process has ended."""
        if self._task is not None:
            self._roots.exit(self._task, now_ns)
            self._task = None

    # -- what a cgroup does to its members (cgfs TaskOwner) --------------------------------------

    def killed(self, now_ns: int) -> None:
        """SIGKILL; the VM gives everything back, one that is being made once it is."""
        self._killed = True
        if self._vmm is not None:
            self._vmm.killed(now_ns)

    def frozen(self, frozen: bool, now_ns: int) -> None:
        """The cgroup was frozen or thawed."""
        self._frozen = frozen
        if self._vmm is not None:
            self._vmm.frozen(frozen=frozen, now_ns=now_ns)

    def moved(self, now_ns: int) -> None:
        """It is in another cgroup."""
        if self._vmm is not None:
            self._vmm.moved(now_ns)

    # -- watching --------------------------------------------------------------------------------

    def snapshot(self, now_ns: int) -> VmSnapshot:
        """The VM at a glance."""
        vmm = self.vmm.statistics()
        request = self._request
        return VmSnapshot(
            name=request.name,
            type=request.type,
            pid=self._task.pid if self._task else 0,
            cgroup=self.cgroup,
            state="frozen" if vmm.frozen else vmm.state,
            asid=self.vmm.vm.statistics().asid,
            guest=request.guest,
            uptime_ns=now_ns - self._started_ns,
            bus_lock_ratelimit=request.bus_lock_ratelimit,
            bus_locks=vmm.nr_bus_locks,
            bus_lock_exits=vmm.nr_bus_lock_exits,
            throttled_ns=vmm.throttled_ns,
            ratelimit_ns=vmm.ratelimit_ns,
            vcpus=[
                VcpuSnapshot(
                    id=thread.id,
                    state=thread.phase,
                    runs=thread.nr_runs,
                    bus_locks=thread.nr_bus_locks,
                    throttled_ns=thread.throttled_ns,
                )
                for thread in vmm.threads
            ],
            error=vmm.error,
        )
