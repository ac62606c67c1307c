"""The timeline of one host: who does what next, and how bus locks slow everybody down.

Two kinds of time are kept. *Host time* is what clocks show. *Progress* is what a busy CPU gets
done: host time minus all stalls. A bus lock stalls every CPU of the machine for
``bus_lock_stall_ns``, so progress stands still that long for all guests at once::

    host time  0    10    20  23    33     guest A: bus locks at progress 10 and 20, stall 3
    progress   0    10 │  17  20 │  27     guest B: runs 27 of the first 33 ns

Guests wait in a heap keyed by progress, sleepers in one keyed by host time. Delaying every guest
of the machine is then one addition, whatever their number.

Nothing here reads a clock: :meth:`Timeline.advance` is told how far to go, and everything due until
then happens at its own exact time. Order at one instant: admissions of the bus lock limiter first,
then whoever was scheduled first.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = 1 << 200
"""A time after every other."""

_MAX_DROPPED = 1_000
"""Void entries that are not worth clearing away."""


class Scheduled:
    """Something with at most one place on the timeline.

    Attributes:
        ticket: number of its valid place; 0 when it has none.
        due_ns: when it is due, in progress for a guest and in host time for a sleeper.
    """

    __slots__ = ("due_ns", "ticket")

    def __init__(self) -> None:
        self.ticket = 0
        self.due_ns = 0

    def step(self, now_ns: int) -> None:
        """Its time has come; it may take a new place."""
        raise NotImplementedError


class Limiter(Protocol):
    """Who admits waiting bus locks (the bus_lock controller of the host's cgroups)."""

    on_ready: Callable[[], None] | None

    def pump(self, now_ns: int) -> None:
        """Admit everyone due up to ``now_ns``."""

    def next_ready_ns(self) -> int | None:
        """When :meth:`pump` may have something to do."""


class Timeline:
    """Time of one host.

    Args:
        limiter: whose deadlines belong to this timeline.
        bus_lock_stall_ns: what one bus lock costs every CPU.
        now_ns: where time starts; above 0, because a limiter's initial state is older than its
            first event.

    Attributes:
        now_ns: the present; only :meth:`advance` moves it.
        stalled_ns: sum of all stalls so far.
        nr_bus_locks: how many there were.
        nr_steps: things that were due and done.
        on_earlier: called when something came to be due earlier than all the rest while nobody was
            advancing; must only record.
        observer: called with the time and who is due before each step; for traces.
    """

    __slots__ = (
        "_advancing",
        "_frozen_at",
        "_limiter",
        "_limiter_ns",
        "_nr_dropped",
        "_running",
        "_sleeping",
        "_tickets",
        "bus_lock_stall_ns",
        "now_ns",
        "nr_bus_locks",
        "nr_steps",
        "observer",
        "on_earlier",
        "stalled_ns",
    )

    def __init__(
        self, limiter: Limiter | None = None, *, bus_lock_stall_ns: int = 3_500, now_ns: int = 1
    ) -> None:
        self.now_ns = now_ns
        self.bus_lock_stall_ns = bus_lock_stall_ns
        self.stalled_ns = 0
        self.nr_bus_locks = 0
        self.nr_steps = 0
        self.on_earlier: Callable[[], None] | None = None
        self.observer: Callable[[int, Scheduled], None] | None = None
        self._frozen_at = now_ns  # progress at the last bus lock; it never goes back
        self._running: list[tuple[int, int, Scheduled]] = []
        self._sleeping: list[tuple[int, int, Scheduled]] = []
        self._tickets = 0
        self._nr_dropped = 0
        self._advancing = False
        self._limiter = limiter
        self._limiter_ns = NEVER
        if limiter is not None:
            limiter.on_ready = self._limiter_ready
            self._look_at_limiter()

    @property
    def has_limiter(self) -> bool:
        """Whether somebody's deadlines are kept here besides the guests'."""
        return self._limiter is not None

    def progress_ns(self) -> int:
        """How much a CPU that never stopped would have got done by now."""
        progress = self.now_ns - self.stalled_ns
        return max(progress, self._frozen_at)

    def run_for(self, who: Scheduled, guest_ns: int) -> None:
        """Let a guest execute for ``guest_ns``, stalls excluded."""
        progress = self.now_ns - self.stalled_ns
        if progress < self._frozen_at:  # noqa: PLR1730 - a call of max() shows in the profile
            progress = self._frozen_at
        self._tickets = who.ticket = ticket = self._tickets + 1
        who.due_ns = due_ns = progress + guest_ns
        heappush(self._running, (due_ns, ticket, who))
        if not self._advancing:
            self._announce(due_ns + self.stalled_ns)

    def sleep_until(self, who: Scheduled, due_ns: int) -> None:
        """Let somebody sleep until a host time."""
        self._tickets = who.ticket = ticket = self._tickets + 1
        who.due_ns = due_ns
        heappush(self._sleeping, (due_ns, ticket, who))
        if not self._advancing:
            self._announce(due_ns)

    def drop(self, who: Scheduled) -> None:
        """Take somebody off the timeline. The entry stays in its heap until it comes up."""
        if not who.ticket:
            return
        who.ticket = 0
        self._nr_dropped += 1
        if self._nr_dropped > _MAX_DROPPED + (len(self._running) + len(self._sleeping)) // 2:
            self._nr_dropped = 0
            for heap in (self._running, self._sleeping):
                heap[:] = [entry for entry in heap if entry[2].ticket == entry[1]]
                heapify(heap)

    def bus_lock(self, _by: object, now_ns: int) -> None:
        """A bus lock is taken: every CPU stalls, one lock after the other."""
        progress = now_ns - self.stalled_ns
        if progress > self._frozen_at:  # noqa: PLR1730 - as above
            self._frozen_at = progress
        self.nr_bus_locks += 1
        self.stalled_ns += self.bus_lock_stall_ns

    def next_due_ns(self) -> int | None:
        """The next time at which something may happen, None when nothing ever will."""
        if self._limiter is not None:
            self._look_at_limiter()
        for heap in (self._running, self._sleeping):
            while heap and heap[0][2].ticket != heap[0][1]:
                heappop(heap)
        due_ns = min(self._first_running(), self._first_sleeping(), self._limiter_ns)
        return None if due_ns >= NEVER else max(due_ns, self.now_ns)

    def advance(self, now_ns: int, max_steps: int = NEVER) -> bool:
        """Do everything due up to ``now_ns``, each thing at its own time.

        Args:
            now_ns: how far to go; a time in the past changes nothing.
            max_steps: stop early after so many steps.

        Returns:
            Whether ``now_ns`` was reached. If not, the present is the time of the last step.
        """
        assert not self._advancing, "advance() was called from inside a step"
        self._advancing = True
        last = self.nr_steps + max_steps
        try:
            while (who := self._next(now_ns)) is not None:
                self.nr_steps += 1
                if self.observer is not None:
                    self.observer(self.now_ns, who)
                who.step(self.now_ns)
                if self.nr_steps >= last:
                    return False
        finally:
            self._advancing = False
        self.now_ns = max(self.now_ns, now_ns)
        return True

    def _next(self, limit_ns: int) -> Scheduled | None:
        """Move the present to the next due time and take who is due, None beyond the limit."""
        running, sleeping = self._running, self._sleeping
        while True:
            heap = running
            due_ns = running[0][0] + self.stalled_ns if running else NEVER
            if sleeping:
                asleep = sleeping[0]
                if asleep[0] < due_ns or (asleep[0] == due_ns and asleep[1] < running[0][1]):
                    heap, due_ns = sleeping, asleep[0]
            if self._limiter_ns <= due_ns:
                if self._limiter_ns > limit_ns:
                    return None
                self._pump()
                continue
            if due_ns > limit_ns:
                return None
            _, ticket, who = heappop(heap)
            if who.ticket == ticket:
                who.ticket = 0
                if due_ns > self.now_ns:  # noqa: PLR1730 - as above
                    self.now_ns = due_ns
                return who

    def _pump(self) -> None:
        """Let the limiter admit those whose time has come."""
        assert self._limiter is not None
        self.now_ns = max(self.now_ns, self._limiter_ns)
        self._limiter.pump(self.now_ns)
        self._look_at_limiter()

    def _look_at_limiter(self) -> None:
        """Note the limiter's deadline; between two looks it can only have become later."""
        assert self._limiter is not None
        ready_ns = self._limiter.next_ready_ns()
        self._limiter_ns = NEVER if ready_ns is None else ready_ns

    def _limiter_ready(self) -> None:
        """The limiter's deadline is earlier than it was."""
        self._look_at_limiter()
        if not self._advancing:
            self._announce(self._limiter_ns)

    def _announce(self, due_ns: int) -> None:
        """Tell whoever sleeps until the next due time, if this is the one."""
        if self.on_earlier is not None and due_ns <= min(
            self._first_running(), self._first_sleeping(), self._limiter_ns
        ):
            self.on_earlier()

    def _first_running(self) -> int:
        return self._running[0][0] + self.stalled_ns if self._running else NEVER

    def _first_sleeping(self) -> int:
        return self._sleeping[0][0] if self._sleeping else NEVER
