"""Drives a host's timeline by trio's clock.

The timeline does the work; this decides when to look at it. It sleeps until something is due, but
wakes up at most once per ``granularity_ns``: what became due in between then happens in one go,
each thing still at its own exact time, so the granularity is nothing a guest or a limit can notice.
Who looks at the model from outside (a read of a counter, the control socket) calls
:meth:`RunLoop.catch_up` first and so sees the present.

Under trio's real clock a host that cannot keep up falls behind: its time then passes slower than
the clock's instead of stopping the process from answering. A virtual clock waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from kvmsim.vmm.timeline import Timeline
    from kvmsim.vmm.vcpu_thread import VcpuThread

GRANULARITY_NS = 1_000_000
"""Pause between two looks at the timeline."""

MAX_STEPS = 2_000
"""Steps between two chances for other tasks to run: some ten milliseconds."""

MAX_LAG_NS = 100_000_000
"""By how much a host may be late before its time is slowed down."""


class RunLoop:
    """Time of one host, as trio's clock has it.

    Args:
        timeline: what to drive.
        granularity_ns: shortest pause between two looks at it.

    Attributes:
        timeline: as given.
        slipped_ns: by how much the host's time has fallen behind the clock for good.
    """

    def __init__(self, timeline: Timeline, *, granularity_ns: int = GRANULARITY_NS) -> None:
        self.timeline = timeline
        self.granularity_ns = granularity_ns
        self.slipped_ns = 0
        self._epoch_ns = timeline.now_ns
        self._time = trio.lowlevel.current_clock().current_time
        self._epoch_s = self._time()
        self._sooner = trio.Event()
        self._looked_ns = timeline.now_ns - granularity_ns
        timeline.on_earlier = self._wake_up

    def now_ns(self) -> int:
        """The host's time by the clock; the timeline's present may be earlier."""
        elapsed_ns = round((self._time() - self._epoch_s) * 1e9)
        return self._epoch_ns + elapsed_ns - self.slipped_ns

    def catch_up(self) -> int:
        """Bring the model up to the present, as far as that goes without a long delay.

        Returns:
            The model's time, which is what a change made now is to be given.
        """
        self._advance(self.now_ns())
        return self.timeline.now_ns

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the timeline until cancelled."""
        task_status.started()
        target_ns = self.now_ns()
        while True:
            # A sleep ends at its deadline or a rounding error before it.
            while not self._advance(max(target_ns, self.now_ns())):
                await trio.lowlevel.checkpoint()
            self._looked_ns = self.timeline.now_ns
            target_ns = await self._sleep()

    async def run_vcpu(self, thread: VcpuThread) -> VcpuThread:
        """Make one KVM_RUN on a parked thread and wait until it has returned.

        The loop has to be running. A sleep for the VMM's own limiter is part of it; the exit is
        left to the caller, in ``thread.vcpu.run``.

        Raises:
            KvmError: what KVM_RUN failed with; EIO when the VM ended meanwhile.
        """
        returned = trio.Event()
        thread.run_once(self.catch_up(), lambda _: returned.set())
        await returned.wait()
        if thread.error is not None:
            raise thread.error
        return thread

    def _advance(self, now_ns: int) -> bool:
        """Make some steps; whether ``now_ns`` was reached."""
        before_s = trio.current_time()
        if self.timeline.advance(now_ns, MAX_STEPS):
            return True
        # Only a real clock moves while the steps are made.
        lag_ns = self.now_ns() - self.timeline.now_ns
        if trio.current_time() > before_s and lag_ns > MAX_LAG_NS:
            self.slipped_ns += lag_ns
            return True
        return False

    async def _sleep(self) -> int:
        """Sleep until something is due, and not for too short; the time it was to end at."""
        self._sooner = trio.Event()
        due_ns = self.timeline.next_due_ns()
        if due_ns is None:
            await self._sooner.wait()
            return self.timeline.now_ns
        due_ns = max(due_ns, self._looked_ns + self.granularity_ns)
        deadline_s = self._epoch_s + (due_ns - self._epoch_ns + self.slipped_ns) / 1e9
        with trio.move_on_at(deadline_s) as sleep:
            await self._sooner.wait()
        return due_ns if sleep.cancelled_caught else self.timeline.now_ns

    def _wake_up(self) -> None:
        """Something came to be due earlier than what the loop sleeps for."""
        self._sooner.set()
