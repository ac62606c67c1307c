"""A VMM's thread for one vCPU: KVM_RUN, perhaps a sleep for the bus lock limiter, the exit, again.

As in QEMU (accel/kvm/kvm-all.c kvm_cpu_exec(), target/i386/kvm/kvm.c kvm_arch_post_run()): each
time KVM_RUN returns, with 0 or an error, the bus lock flag is looked at first. If the limiter says
so the thread sleeps, and nothing can cut that short; only then come the error and the exit reason.

The thread is a state machine on the timeline. It never blocks: it takes a place and is stepped when
its time has come.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EIO
from typing import TYPE_CHECKING

from kvmsim.abi.exits import KVM_RUN_X86_BUS_LOCK, Exit
from kvmsim.errors import KvmError
from kvmsim.kvm.page import U16_FLAGS, U32_EXIT_REASON
from kvmsim.kvm.run import Halted, InGuest
from kvmsim.vmm.timeline import Scheduled

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.run import Blocked
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.vmm.vmm import Vmm

# Where a thread is. Plain numbers: they are compared at every step.
PARKED = 0  # in user space, until the VM runs
GUEST = 1
HALTED = 2  # in KVM_RUN
THROTTLED = 3  # in KVM_RUN, waiting for admission of a bus lock
READY = 4  # that wait is over
SLEEPING = 5  # in user space, for the VMM's own limiter
STARTING = 6  # about to call KVM_RUN
IDLE = 7  # in user space after KVM_EXIT_HLT, until an interrupt
STOPPED = 8

PHASES = (
    *("parked", "guest", "halted", "throttled", "ready"),
    *("ratelimited", "ready", "halted", "stopped"),
)

MAX_STOPS_AT_ONCE = 100_000
"""Stops of one vCPU at one instant, after which its guest is taken for stuck there.

Time moves on only when nothing more is due: a guest that stops for ever and takes no time would
hold up the whole host.
"""


class VcpuThread(Scheduled):
    """The thread of one vCPU.

    Attributes:
        vmm: the VMM it belongs to.
        vcpu: the vCPU it runs.
        phase: where it is, an index into ``PHASES``.
        nr_runs: how often KVM_RUN returned.
        nr_bus_lock_exits: how often the bus lock flag was set then.
        ratelimit_ns: time slept for the VMM's limiter.
        error: what the last KVM_RUN failed with, None if it returned 0.
    """

    __slots__ = (
        "_burst_ns",
        "_done",
        "_instant_ns",
        "_nr_at_once",
        "_since_ns",
        "_work_ns",
        "error",
        "nr_bus_lock_exits",
        "nr_runs",
        "phase",
        "ratelimit_ns",
        "vcpu",
        "vmm",
    )

    def __init__(self, vmm: Vmm, vcpu: Vcpu) -> None:
        super().__init__()
        self.vmm = vmm
        self.vcpu = vcpu
        self.phase = PARKED
        self.nr_runs = 0
        self.nr_bus_lock_exits = 0
        self.ratelimit_ns = 0
        self.error: KvmError | None = None
        self._burst_ns = 0  # guest time asked for when the guest was entered
        self._work_ns = 0  # guest time of bursts that are over
        self._since_ns = 0
        self._instant_ns = 0  # when the guest was last entered for no time at all
        self._nr_at_once = 0  # and how often that was at this instant
        self._done: Callable[[int], None] | None = None
        vcpu.on_wake = self._woken

    @property
    def name(self) -> str:
        """The thread among all of the host, as ``vm/0``."""
        return f"{self.vmm.name}/{self.vcpu.id}"

    @property
    def work_ns(self) -> int:
        """Guest time executed so far, at the timeline's present."""
        if self.phase != GUEST:
            return self._work_ns
        return self._work_ns + self._burst_so_far()

    def start(self, now_ns: int) -> None:
        """Let the thread go on from user space."""
        if self.phase == PARKED:
            self._start_at(now_ns)

    def run_once(self, now_ns: int, done: Callable[[int], None]) -> None:
        """Make one KVM_RUN and handle nothing but the limiter. A frozen process waits first.

        Args:
            now_ns: when.
            done: called with the time when the thread is back in user space; ``error`` and the
                vCPU's page then say how it went.
        """
        if self.phase != PARKED:
            msg = f"{self.name} is {PHASES[self.phase]}"
            raise RuntimeError(msg)
        self._done = done
        self._start_at(now_ns)

    def step(self, now_ns: int) -> None:
        """Go on: the guest time, the wait or the sleep is over."""
        phase = self.phase
        if phase == GUEST:
            self._work_ns += self._burst_ns
            self._run(self.vcpu.resume, now_ns)
        elif phase == READY:
            self._run(self.vcpu.resume, now_ns)
        elif phase == HALTED:  # the guest's own timer
            self.phase = READY
            self.vcpu.wake(now_ns)
            self._run(self.vcpu.resume, now_ns)
        elif phase == SLEEPING:
            if self.vmm.is_frozen:
                return  # the sleep ends with the thaw
            self.ratelimit_ns += now_ns - self._since_ns
            self.phase = PARKED
            if self._returned(now_ns):
                self._run(self.vcpu.kvm_run, now_ns)
        elif phase == STARTING:
            if self.vmm.runs or (self._done is not None and not self.vmm.is_frozen):
                self._run(self.vcpu.kvm_run, now_ns)
            else:
                self.phase = PARKED

    def kick(self, now_ns: int) -> None:
        """Signal the thread, so that it leaves KVM_RUN; a sleep for the limiter goes on."""
        phase = self.phase
        if phase not in (GUEST, HALTED, THROTTLED, READY):
            return
        ran_ns = self._burst_so_far() if phase == GUEST else 0
        self._work_ns += ran_ns
        self.vmm.timeline.drop(self)
        self.phase = PARKED
        try:
            self.vcpu.interrupt(now_ns, ran_ns)
        except KvmError as error:
            self.error = error
        if self._post_run(now_ns):
            self._start_at(now_ns)

    def interrupt_guest(self, now_ns: int) -> None:
        """Deliver an interrupt to the guest: it ends a halt."""
        if self.phase == IDLE:
            self.phase = PARKED
            if self.vmm.runs:
                self._start_at(now_ns)
        else:
            self.vcpu.wake(now_ns)

    def thaw(self, now_ns: int) -> None:
        """Go on with what the freezer held up: a sleep that was over, one KVM_RUN asked for."""
        if self.phase == SLEEPING and not self.ticket:
            self.vmm.timeline.sleep_until(self, now_ns)
        elif self._done is not None:
            self.start(now_ns)

    def stop(self, now_ns: int) -> None:
        """The thread ends; whoever waits for its KVM_RUN is told so."""
        self.vmm.timeline.drop(self)
        self.phase = STOPPED
        done, self._done = self._done, None
        if done is not None:
            self.error = KvmError(EIO, "the VM has ended")
            done(now_ns)

    def _start_at(self, now_ns: int) -> None:
        self.phase = STARTING
        self.vmm.timeline.sleep_until(self, now_ns)

    def _burst_so_far(self) -> int:
        left_ns = self.due_ns - self.vmm.timeline.progress_ns()
        return self._burst_ns - max(0, left_ns)

    def _woken(self, _vcpu: Vcpu, now_ns: int) -> None:
        """A wait inside KVM_RUN is over."""
        if self.phase in (HALTED, THROTTLED):
            self.phase = READY
            self.vmm.timeline.sleep_until(self, now_ns)

    def _run(self, call: Callable[[int], Blocked | None], now_ns: int) -> None:
        """Go on with KVM_RUN, and call it again after each exit, until there is a wait."""
        while True:
            try:
                blocked = call(now_ns)
            except KvmError as error:
                self.error = error
            else:
                if type(blocked) is InGuest:
                    self.phase = GUEST
                    self._burst_ns = guest_ns = blocked.guest_ns
                    self.vmm.timeline.run_for(self, guest_ns)
                    if not guest_ns:
                        self._count_at_once(now_ns)
                    return
                if blocked is not None:
                    self._wait(blocked, now_ns)
                    return
                self.error = None
            self.phase = PARKED
            if not self._post_run(now_ns):
                return
            call = self.vcpu.kvm_run

    def _count_at_once(self, now_ns: int) -> None:
        """The guest stops without having taken time; the VM ends if that goes on for ever."""
        if now_ns != self._instant_ns:
            self._instant_ns = now_ns
            self._nr_at_once = 0
        self._nr_at_once += 1
        if self._nr_at_once > MAX_STOPS_AT_ONCE:
            self.vmm.guest_stuck(self, MAX_STOPS_AT_ONCE, now_ns)

    def _wait(self, blocked: Blocked, now_ns: int) -> None:
        if type(blocked) is not Halted:
            self.phase = THROTTLED
            return
        self.phase = HALTED
        if blocked.wake_after_ns is not None:
            self.vmm.timeline.sleep_until(self, now_ns + blocked.wake_after_ns)

    def _post_run(self, now_ns: int) -> bool:
        """KVM_RUN returned; whether to call it again at once."""
        self.nr_runs += 1
        if self.vcpu.run.u16[U16_FLAGS] & KVM_RUN_X86_BUS_LOCK:
            self.nr_bus_lock_exits += 1
            limit = self.vmm.limit
            if limit is not None and (delay_ns := limit.calculate(1, now_ns)) >= 1_000:
                self.phase = SLEEPING
                self._since_ns = now_ns
                # g_usleep(delay / 1000) ends late by what it takes to wake a thread up.
                due_ns = now_ns + delay_ns // 1_000 * 1_000 + self.vmm.wake_latency_ns
                self.vmm.timeline.sleep_until(self, due_ns)
                return False
        return self._returned(now_ns)

    def _returned(self, now_ns: int) -> bool:
        """Look at what KVM_RUN returned; whether to call it again at once."""
        done = self._done
        if done is not None:
            self._done = None
            done(now_ns)
            return False
        if self.error is not None:
            if self.error.errno not in (EINTR, EAGAIN):
                self.vmm.run_failed(self, now_ns)
        elif self.vcpu.run.u32[U32_EXIT_REASON] != Exit.X86_BUS_LOCK:
            self.vmm.handle_exit(self, now_ns)
        return self.vmm.runs and self.phase == PARKED
