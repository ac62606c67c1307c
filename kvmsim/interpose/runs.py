"""KVM_RUN of clients: threads that wait for their guest.

Like a VMM's thread of the host itself (``kvmsim.vmm.vcpu_thread``), but user space is another
process: the run ends with an answer to its call. Calls that come for a vCPU meanwhile wait for the
run to end, as for the vCPU's mutex.
"""

from __future__ import annotations

import logging
from errno import EIO
from typing import TYPE_CHECKING

from kvmsim.errors import KvmError
from kvmsim.kvm.run import OUT, Halted, InGuest
from kvmsim.vmm.timeline import Scheduled

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Executing
    from kvmsim.interpose.clients import Thread
    from kvmsim.interpose.executor import Executor
    from kvmsim.interpose.notify import Notification
    from kvmsim.kvm.run import Blocked
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.vmm.timeline import Timeline

log = logging.getLogger(__name__)

MAX_INLINE = 64
"""Stops without guest time a run goes through before others get their turn."""

MAX_INLINE_CODE = 16
"""The same where the guest executes code, which takes time of its own: some 100 us."""

STOP_NS = 1_500
"""What a stop without guest time takes once there have been that many: on Linux, an exit and a new
entry. A guest that does nothing else gets no more of the supervisor than of a real CPU."""

FIRST_LOOK_NS = 500_000
LAST_LOOK_NS = 5_000_000

LOOKS_APART_NS = 100_000
"""Time for each look for signals, on average: one takes about 10 us, and the supervisor has other
work, so many waiting vCPUs are looked at less often."""

# Where a run is. Plain numbers: they are compared at every step.
IDLE = 0  # in user space
GUEST = 1
HALTED = 2
THROTTLED = 3
READY = 4  # a wait is over
EXECUTING = 5  # guest code is, or waits for its turn


class Run(Scheduled):
    """KVM_RUN of one vCPU, one after the other.

    Args:
        vcpu: the vCPU.
        timeline: time of its host.
        done: called with (run, error) when KVM_RUN returns; ``error`` is None for 0.
        enters: called before the guest is entered again after its code was executed; False: the
            call is made once more by the client, and over here.

    Attributes:
        vcpu: as given.
        executor: executes its guest code; None: it has none, its engine knows what comes next.
        phase: where it is; ``IDLE`` outside of KVM_RUN.
        notification: the call, while in KVM_RUN.
        thread: who makes it.
        waiting: calls on the same vCPU that came meanwhile.
        release_due: the last descriptor was closed during KVM_RUN.
        is_due: its guest's timer wants it back, and it waits for its turn to execute.
        look_at_ns: when to look for signals next.
        look_after_ns: how long to wait between two looks.
    """

    __slots__ = (
        *("vcpu", "phase", "notification", "thread", "waiting", "release_due"),
        *("look_at_ns", "look_after_ns", "executor", "is_due"),
        *("_timeline", "_done", "_enters", "_burst_ns", "_interrupted", "_short"),
    )

    def __init__(
        self,
        vcpu: Vcpu,
        timeline: Timeline,
        done: Callable[[Run, KvmError | None], None],
        enters: Callable[[Run], bool] = lambda _: True,
    ) -> None:
        super().__init__()
        self.vcpu = vcpu
        self.executor: Executor | None = None
        self.phase = IDLE
        self.notification: Notification | None = None
        self.thread: Thread | None = None
        self.waiting: list[Notification] = []
        self.release_due = False
        self.is_due = False
        self.look_at_ns = 0
        self.look_after_ns = FIRST_LOOK_NS
        self._timeline = timeline
        self._done = done
        self._enters = enters
        self._burst_ns = 0
        self._interrupted = False
        self._short = True
        vcpu.on_wake = self._woken

    def begin(self) -> None:
        """KVM_RUN was called: guest code may execute on the event loop for a while."""
        self._short = True

    def pass_through(self, blocked: Blocked, now_ns: int) -> Blocked | None:
        """Let the guest make all the stops that take no time, or not much.

        Returns:
            What is left to wait for; None: KVM_RUN returns 0.

        Raises:
            KvmError: KVM_RUN fails.
        """
        left: Blocked | None = blocked
        for _ in range(MAX_INLINE if self.executor is None else MAX_INLINE_CODE):
            if type(left) is not InGuest or left.guest_ns:
                break
            if left.work is not None:
                if not self._execute_here(left.work):
                    break
                assert self.executor is not None
                now_ns = self.executor.now_ns()
            left = self.vcpu.resume(now_ns)
        return left

    def _execute_here(self, stop: Executing) -> bool:
        """Execute guest code on the event loop; whether that was done."""
        if not self._short or self.executor is None:
            return False
        ended = self.executor.execute_here(stop)
        self._short = bool(ended)
        return ended is not None

    def wait(
        self, blocked: Blocked, notification: Notification, thread: Thread, now_ns: int
    ) -> None:
        """Keep a KVM_RUN waiting; ``done`` is called when it returns."""
        self.notification = notification
        self.thread = thread
        self.look_at_ns = now_ns + FIRST_LOOK_NS
        self.look_after_ns = FIRST_LOOK_NS
        self._schedule(blocked, now_ns, comes=True)

    def step(self, now_ns: int) -> None:
        """The guest time or the wait is over, or the guest's timer wants it back."""
        if self.phase == EXECUTING:
            assert self.executor is not None
            self.is_due = not self.executor.kick(self)
            return
        if self.phase == HALTED:  # the guest's own timer
            self.phase = READY
            self.vcpu.wake(now_ns)
        self._resume(now_ns)

    def interrupt(self, now_ns: int) -> None:
        """A signal: KVM_RUN returns EINTR."""
        if self.phase == IDLE:
            return
        if self.phase == EXECUTING:
            assert self.executor is not None
            if self.executor.withdraw(self):
                self._interrupted = True  # as soon as the guest has stopped
                return
        error = self._break_off(now_ns)
        self._done(self, error)

    def abandon(self, now_ns: int) -> None:
        """The caller is gone: nobody gets the answer.

        Raises:
            Stuck: its guest's code does not stop.
        """
        if self.phase == IDLE:
            return
        if self.phase == EXECUTING:
            assert self.executor is not None
            self.executor.forget(self)
        self._break_off(now_ns)
        self._end()

    def give_up(self, error: KvmError, now_ns: int) -> None:
        """It cannot enter the guest again: KVM_RUN fails."""
        self._break_off(now_ns)
        self._done(self, error)

    def executed(self, error: BaseException | None) -> None:
        """Guest code was executed; see ``executor``."""
        now_ns = self._timeline.now_ns
        self._timeline.drop(self)
        self._short = self.executor is not None and self.executor.was_short
        self.is_due = False
        if error is not None:
            self._failed(error)
        elif self._interrupted:
            self._interrupted = False
            self._done(self, self._break_off(now_ns))
        elif self._enters(self):
            self._resume(now_ns)

    def finish(self) -> None:
        """The answer is given."""
        self._end()

    def _break_off(self, now_ns: int) -> KvmError | None:
        ran_ns = 0
        if self.phase == GUEST:
            left_ns = self.due_ns - self._timeline.progress_ns()
            ran_ns = self._burst_ns - max(0, left_ns)
        self._timeline.drop(self)
        self.phase = IDLE
        try:
            self.vcpu.interrupt(now_ns, ran_ns)
        except KvmError as error:
            return error
        return None

    def _end(self) -> None:
        self.phase = IDLE
        self.notification = None
        self.thread = None
        self._interrupted = False

    def _woken(self, _vcpu: Vcpu, now_ns: int) -> None:
        """A wait inside KVM_RUN is over."""
        if self.phase in (HALTED, THROTTLED):
            self.phase = READY
            self._timeline.sleep_until(self, now_ns)

    def _resume(self, now_ns: int) -> None:
        error: KvmError | None = None
        try:
            blocked = self.vcpu.resume(now_ns)
            if blocked is not None:
                blocked = self.pass_through(blocked, now_ns)
            if blocked is not None:
                self._schedule(blocked, now_ns)
                return
        except KvmError as failed:
            error = failed
        except Exception as failed:  # one guest must not end the others
            self._failed(failed)
            return
        self.phase = IDLE
        self._done(self, error)

    def _failed(self, error: BaseException) -> None:
        """This program went wrong: the VM is of no more use, the client hears of it."""
        log.error("vCPU %d cannot go on", self.vcpu.id, exc_info=error)
        self.phase = IDLE
        fail(self.vcpu)
        self._done(self, KvmError(EIO, "the guest cannot go on"))

    def _schedule(self, blocked: Blocked, now_ns: int, *, comes: bool = False) -> None:
        """Take a place on the timeline, unless something else ends the wait."""
        if type(blocked) is InGuest and self.executor is not None:
            self._execute(blocked, comes=comes)
        elif type(blocked) is InGuest:
            self.phase = GUEST
            self._burst_ns = guest_ns = blocked.guest_ns or MAX_INLINE * STOP_NS
            self._timeline.run_for(self, guest_ns)
        elif type(blocked) is Halted:
            self.phase = HALTED
            if blocked.wake_after_ns is not None:
                self._timeline.sleep_until(self, now_ns + blocked.wake_after_ns)
        else:
            self.phase = THROTTLED

    def _execute(self, blocked: InGuest, *, comes: bool) -> None:
        """Have guest code executed; after many stops without any, go on when others had a turn."""
        assert self.executor is not None
        self.phase = EXECUTING
        if blocked.deadline_ns is not None:
            self._timeline.sleep_until(self, blocked.deadline_ns)
        self.executor.hand_over(self, blocked.work, comes=comes)


def fail(vcpu: Vcpu) -> None:
    """Give a VM up whose engine went wrong; only closing is left (KVM_BUG_ON)."""
    vcpu.vm.dead = True
    vcpu.phase = OUT
    vcpu.stop = None
    vcpu.in_guest.work = None
