"""The VMM of one VM: opens it as QEMU does, runs its vCPU threads, handles their exits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from errno import ENOTSUP
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.exits import KVM_EXIT_IO_IN, Exit
from kvmsim.errors import KvmError
from kvmsim.kvm.vm import KvmEnableCap
from kvmsim.vmm.ratelimit import RateLimit
from kvmsim.vmm.vcpu_thread import IDLE, PHASES, VcpuThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import GuestEngine
    from kvmsim.kvm.system import System
    from kvmsim.kvm.vm import Vm
    from kvmsim.vmm.timeline import Timeline

# A read that no device answers: the bus floats high.
_FLOATING = b"\xff"

_CONTINUE = frozenset({Exit.INTR, Exit.IRQ_WINDOW_OPEN, Exit.X86_BUS_LOCK, Exit.IOAPIC_EOI})


class RunState(Enum):
    """What a VM does, as QEMU's ``query-status`` names it."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INTERNAL_ERROR = "internal-error"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class ThreadStatistics:
    """What one vCPU thread has done so far.

    Attributes:
        id: the vCPU's id.
        phase: ``guest``, ``halted``, ``throttled``, ``ratelimited``, ``ready``, ``parked`` or
            ``stopped``.
        nr_runs: returns of KVM_RUN.
        nr_bus_locks: bus locks the guest took, seen or not.
        nr_bus_lock_exits: returns of KVM_RUN with the bus lock flag.
        work_ns: guest time executed.
        throttled_ns: time spent in the kernel waiting for ``bus_lock.max``, waits that are over.
        ratelimit_ns: time slept in the VMM for ``bus_lock_ratelimit``, sleeps that are over.
    """

    id: int
    phase: str
    nr_runs: int
    nr_bus_locks: int
    nr_bus_lock_exits: int
    work_ns: int
    throttled_ns: int
    ratelimit_ns: int


@dataclass(frozen=True, slots=True)
class VmmStatistics:
    """What one VM has done so far; sums over its threads."""

    name: str
    state: str
    frozen: bool
    error: str
    nr_runs: int
    nr_bus_locks: int
    nr_bus_lock_exits: int
    work_ns: int
    throttled_ns: int
    ratelimit_ns: int
    threads: tuple[ThreadStatistics, ...]


class Vmm:
    """One VM and the program that runs it.

    Args:
        name: of the VM.
        system: KVM of the host.
        timeline: of the host.
        pid: the process that owns the VM; its cgroup is charged.
        vm_type: ``KVM_X86_*_VM``.
        bus_lock_ratelimit: QEMU's machine property: bus locks per second of the whole VM. With 0
            the VMM does not enable detection at all.
        wake_latency_ns: by how much a sleeping thread wakes up late.

    Attributes:
        vm: the VM in KVM.
        limit: the limiter of bus locks, None without one.
        threads: one per vCPU.
        state: what the VM does.
        is_frozen: its process is in a frozen cgroup.
        error: why it is in INTERNAL_ERROR.
        on_stopped: called with (vmm, now_ns) when the VM has ended and given everything back.

    Raises:
        KvmError: the VM cannot be made: EINVAL type, EBUSY no ASID (with the refused charge as its
            cause), ENOTSUP no bus lock detection. Nothing is left behind.
    """

    __slots__ = (
        "error",
        "is_frozen",
        "limit",
        "name",
        "on_stopped",
        "runs",
        "state",
        "threads",
        "timeline",
        "vm",
        "wake_latency_ns",
    )

    def __init__(
        self,
        name: str,
        system: System,
        timeline: Timeline,
        *,
        pid: int = 0,
        vm_type: int = caps.KVM_X86_DEFAULT_VM,
        bus_lock_ratelimit: int = 0,
        wake_latency_ns: int = 0,
    ) -> None:
        self.name = name
        self.timeline = timeline
        self.wake_latency_ns = wake_latency_ns
        self.threads: list[VcpuThread] = []
        self.state = RunState.PRELAUNCH
        self.is_frozen = False
        self.runs = False
        self.error = ""
        self.on_stopped: Callable[[Vmm, int], None] | None = None
        self.vm: Vm = system.create_vm(vm_type, pid)
        self.vm.on_bus_lock = timeline.bus_lock
        try:
            self.vm.encrypt()
            self.limit = _enable_ratelimit(system, self.vm, bus_lock_ratelimit)
            self.vm.create_irqchip()
        except BaseException:
            self.vm.close(timeline.now_ns)
            raise

    def add_vcpu(self, engine: GuestEngine) -> VcpuThread:
        """Make the next vCPU; guests without code need no boot, so each can run at once.

        Raises:
            KvmError: as KVM_CREATE_VCPU.
        """
        vcpu = self.vm.create_vcpu(len(self.threads))
        vcpu.engine = engine
        vcpu.set_mp_state(caps.KVM_MP_STATE_RUNNABLE)
        thread = VcpuThread(self, vcpu)
        self.threads.append(thread)
        return thread

    # -- what it does ------------------------------------------------------------------------

    def start(self, now_ns: int) -> None:
        """Let the vCPUs run: for the first time, or after a pause."""
        if self.state in (RunState.PRELAUNCH, RunState.PAUSED):
            self._enter(RunState.RUNNING, now_ns)

    def pause(self, now_ns: int) -> None:
        """Stop the vCPUs; one that sleeps for the limiter goes on sleeping first, as in QEMU."""
        if self.state is RunState.RUNNING:
            self._enter(RunState.PAUSED, now_ns)

    def stop(self, now_ns: int) -> None:
        """End the VM and give everything back. What it waited for in a limiter is cancelled."""
        if self.state is RunState.SHUTDOWN:
            return
        self.state = RunState.SHUTDOWN
        self.runs = False
        for thread in self.threads:
            thread.stop(now_ns)
        self.vm.close(now_ns)
        if self.on_stopped is not None:
            self.on_stopped(self, now_ns)

    # What happens to the owner's process (cgfs TaskOwner).

    def killed(self, now_ns: int) -> None:
        """SIGKILL ends the VM."""
        self.stop(now_ns)

    def frozen(self, frozen: bool, now_ns: int) -> None:
        """The freezer signals threads out of KVM_RUN; an owed bus lock stays owed."""
        self.is_frozen = frozen
        self._enter(self.state, now_ns)
        if not frozen:
            for thread in self.threads:
                thread.thaw(now_ns)

    def moved(self, now_ns: int) -> None:
        """Bus locks that wait do so in the new cgroup from here on."""
        self.vm.moved(now_ns)

    def _enter(self, state: RunState, now_ns: int) -> None:
        self.state = state
        self.runs = state is RunState.RUNNING and not self.is_frozen
        for thread in self.threads:
            if self.runs:
                thread.start(now_ns)
            else:
                thread.kick(now_ns)

    # -- exits -------------------------------------------------------------------------------

    def handle_exit(self, thread: VcpuThread, now_ns: int) -> None:
        """Do what an exit asks for; the vCPU goes on afterwards if the VM still runs."""
        run = thread.vcpu.run
        reason = run.exit_reason
        if reason == Exit.IO:
            direction, size, _, count = run.io
            if direction == KVM_EXIT_IO_IN:
                run.io_data(_FLOATING * (size * count))
        elif reason == Exit.MMIO:
            _, data, is_write = run.mmio
            if not is_write:
                run.answer_mmio(_FLOATING * len(data))
        elif reason == Exit.HLT:
            thread.phase = IDLE
        elif reason == Exit.SHUTDOWN:
            self.stop(now_ns)
        elif reason == Exit.INTERNAL_ERROR:
            self._fail(f"KVM internal error. Suberror: {run.u32[8]}", now_ns)
        elif reason not in _CONTINUE:
            self._fail(f"KVM: unknown exit, reason {reason}", now_ns)

    def run_failed(self, thread: VcpuThread, now_ns: int) -> None:
        """KVM_RUN returned an error nobody expects."""
        assert thread.error is not None
        self._fail(f"error: kvm run failed {os.strerror(thread.error.errno)}", now_ns)

    def guest_stuck(self, thread: VcpuThread, nr_stops: int, now_ns: int) -> None:
        """A guest does not get on: it stops again and again at one instant."""
        self._fail(f"vCPU {thread.vcpu.id}: {nr_stops} stops in a row took no time", now_ns)

    def _fail(self, error: str, now_ns: int) -> None:
        self.error = error
        self._enter(RunState.INTERNAL_ERROR, now_ns)

    # -- watching ----------------------------------------------------------------------------

    def statistics(self) -> VmmStatistics:
        """Take a snapshot, at the timeline's present."""
        threads = tuple(
            ThreadStatistics(
                id=thread.vcpu.id,
                phase=PHASES[thread.phase],
                nr_runs=thread.nr_runs,
                nr_bus_locks=thread.vcpu.bus_locks,
                nr_bus_lock_exits=thread.nr_bus_lock_exits,
                work_ns=thread.work_ns,
                throttled_ns=thread.vcpu.throttled_ns,
                ratelimit_ns=thread.ratelimit_ns,
            )
            for thread in self.threads
        )
        return VmmStatistics(
            name=self.name,
            state=self.state.value,
            frozen=self.is_frozen,
            error=self.error,
            nr_runs=sum(thread.nr_runs for thread in threads),
            nr_bus_locks=sum(thread.nr_bus_locks for thread in threads),
            nr_bus_lock_exits=sum(thread.nr_bus_lock_exits for thread in threads),
            work_ns=sum(thread.work_ns for thread in threads),
            throttled_ns=sum(thread.throttled_ns for thread in threads),
            ratelimit_ns=sum(thread.ratelimit_ns for thread in threads),
            threads=threads,
        )


def _enable_ratelimit(system: System, vm: Vm, per_second: int) -> RateLimit | None:
    """QEMU target/i386/kvm/kvm.c kvm_arch_init(): detection is enabled only to limit it.

    Raises:
        KvmError: ENOTSUP without the mechanism, with QEMU's text.
    """
    if not per_second:
        return None
    extension = system.check_extension(caps.KVM_CAP_X86_BUS_LOCK_EXIT)
    if not extension & caps.KVM_BUS_LOCK_DETECTION_EXIT:
        raise KvmError(ENOTSUP, "kvm: bus lock detection unsupported")
    args = (caps.KVM_BUS_LOCK_DETECTION_EXIT,)
    try:
        vm.enable_cap(KvmEnableCap(caps.KVM_CAP_X86_BUS_LOCK_EXIT, args))
    except KvmError as error:
        reason = os.strerror(error.errno)
        message = f"kvm: Failed to enable bus lock detection cap: {reason}"
        raise KvmError(error.errno, message) from error
    return RateLimit(per_second)
