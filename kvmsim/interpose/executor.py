"""Guest code off the event loop: one thread for each VM that needs one.

A vCPU that does not stop soon is handed over as a :class:`Turn`. Turns of one VM are taken one
after the other, in the order they came, each in two halves::

    thread      work()                        work() of the next
    event loop          resume the vCPU, ...                     resume ...

What touches KVM's model happens on the event loop only, and never while ``work`` of the same VM is
under way. Where several vCPUs want in, each keeps its turn for ``TURN_NS`` before it is kicked: a
guest that waits in a loop for another vCPU of its own gets somewhere. Who comes from its client
may well be back there soon, and waits for less than that.

Most guests stop before a change of threads is over. So who comes from its client executes on the
event loop first, where nobody else of the VM wants to; a :class:`Watchdog` ends that in time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol

import trio

from kvmsim.vmm.timeline import Scheduled

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Executing
    from kvmsim.vmm.run_loop import RunLoop

log = logging.getLogger(__name__)

TURN_NS: Final = 1_000_000
"""How long a vCPU executes while another one of the VM waits."""

SHORT_NS: Final = 100_000
"""Guest code that stops within this time may execute on the event loop next time."""

PATIENCE_S: Final = 2.0
"""How long to wait for a guest that was kicked: it looks at every block of its code."""


class Executes(Protocol):
    """A KVM_RUN whose guest code is executed here."""

    @property
    def is_due(self) -> bool:
        """Whether something waits for it to enter the guest anew, rather than to go on."""

    def executed(self, error: BaseException | None) -> None:
        """Its turn is over; it may hand over the next one."""


class Stuck(Exception):
    """Guest code does not stop when it is kicked."""


class Turn:
    """One vCPU's turn to execute.

    Attributes:
        who: whose it is; None when nobody wants to know any more.
        stop: what to execute; None: nothing, others are to have a turn in between.
        error: what ``work`` failed with.
        was_short: it stopped soon.
    """

    __slots__ = ("error", "stop", "was_short", "who")

    def __init__(self, who: Executes, stop: Executing | None) -> None:
        self.who: Executes | None = who
        self.stop = stop
        self.error: BaseException | None = None
        self.was_short = False

    def kick(self) -> None:
        """Let it end soon."""
        if self.stop is not None:
            self.stop.kick()


class Watchdog:
    """Kicks guest code that keeps the event loop.

    Its thread looks every ``PERIOD_S`` while code executes there now and then, and sleeps when that
    has not happened for a while: to wake a thread each time would take longer than most guests.
    """

    PERIOD_S: Final = 0.0001
    LOOKS: Final = 20

    __slots__ = ("_closed", "_kicked", "_short", "_thread", "_wanted", "_watched")

    def __init__(self) -> None:
        self._watched: Executing | None = None
        self._kicked: Executing | None = None
        self._short: SimpleQueue[Turn] = SimpleQueue()
        self._closed = False
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def execute(self, stop: Executing) -> bool:
        """Execute guest code here, for one or two periods; whether it stopped by itself."""
        self._watched = stop
        if not self._wanted.is_set():
            self._wake()
        try:
            stop.work()
        finally:
            self._watched = None
        return self._kicked is not stop

    def shorten(self, turn: Turn) -> None:
        """Let a turn end in one or two periods."""
        self._short.put(turn)
        if not self._wanted.is_set():
            self._wake()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _wake(self) -> None:
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="watchdog", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while not self._closed:
            self._wanted.wait()
            last, looks = None, 0
            while looks < self.LOOKS and not self._closed:
                nr_short = self._short.qsize()
                time.sleep(self.PERIOD_S)
                for _ in range(nr_short):
                    _kick(self._short.get_nowait())
                seen = self._watched
                looks = looks + 1 if seen is None else 0
                if seen is not None and seen is last and seen is not self._kicked:
                    self._kicked = seen
                    _kick(seen)
                last = seen
            # A guest that is gone is not kept, with all its memory.
            self._kicked = last = seen = None
            self._wanted.clear()
            if self._watched is not None or self._short.qsize():  # it came in between
                self._wanted.set()


def _kick(what: Executing | Turn) -> None:
    """Kick, whatever comes of it: without this thread guests would keep the event loop."""
    try:
        what.kick()
    except Exception:
        log.exception("a guest cannot be kicked")


class Executor(Scheduled):
    """Executes the guest code of one VM.

    Args:
        loop: time of the host.
        watchdog: for what is executed on the event loop.
        before: called on the event loop before each turn.
        after: the same behind it.

    Attributes:
        now_ns: the time of the host.
        nr_turns: turns taken so far.
        nr_kicks: turns that were kicked for others.
        was_short: the turn before this moment stopped soon.
    """

    __slots__ = (
        *("nr_turns", "nr_kicks", "was_short", "now_ns"),
        *("_timeline", "_watchdog", "_before", "_after"),
        *("_turns", "_current", "_handling", "_holder", "_held_since_ns"),
        *("_idle", "_jobs", "_thread", "_token"),
    )

    def __init__(
        self,
        loop: RunLoop,
        watchdog: Watchdog,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        super().__init__()
        self.nr_turns = 0
        self.nr_kicks = 0
        self.was_short = False
        self.now_ns = loop.now_ns
        self._watchdog = watchdog
        self._holder: Executes | None = None
        self._held_since_ns = 0
        self._timeline = loop.timeline
        self._before = before
        self._after = after
        self._turns: deque[Turn] = deque()
        self._current: Turn | None = None
        self._handling = False
        self._idle = threading.Event()
        self._idle.set()
        self._jobs: SimpleQueue[Turn | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._token = trio.lowlevel.current_trio_token()

    @property
    def is_executing(self) -> bool:
        """Whether guest code may be executing at this moment."""
        return not self._idle.is_set()

    def hand_over(self, who: Executes, stop: Executing | None, *, comes: bool = False) -> None:
        """Let a vCPU execute when its turn comes; ``who.executed`` follows.

        Args:
            who: whose turn it is to be.
            stop: what to execute; None: nothing, but others' turns are to come before.
            comes: its client has just called.
        """
        turn = Turn(who, stop)
        goes_on = self._handling and who is self._holder and stop is not None and not stop.yields
        if goes_on and self.now_ns() - self._held_since_ns < TURN_NS:
            self._turns.appendleft(turn)
        else:
            self._turns.append(turn)
        if self._current is None:
            if not self._handling:
                self._next()
        elif comes:
            self.nr_kicks += 1
            self._holder = None
            self._watchdog.shorten(self._current)
        else:
            self._watch_turn()

    def execute_here(self, stop: Executing) -> bool | None:
        """Execute a vCPU's code on the event loop for a short time.

        Returns:
            Whether it stopped by itself; None: it is others' turn.
        """
        if self._current is not None or self._turns:
            return None
        return self._watchdog.execute(stop)

    def kick(self, who: Executes) -> bool:
        """Let somebody's turn end soon, if it has begun; whether it has."""
        if self._current is None or self._current.who is not who:
            return False
        self._current.kick()
        return True

    def withdraw(self, who: Executes) -> bool:
        """Take somebody's turn away, unless it has begun.

        Returns:
            Whether guest code of it is still executing or to be followed up: it was kicked, and
            ``executed`` comes.
        """
        if self._current is not None and self._current.who is who:
            self._current.kick()
            return True
        self._turns = deque(turn for turn in self._turns if turn.who is not who)
        return False

    def forget(self, who: Executes) -> None:
        """End somebody's turn without telling; guest code of it has stopped then.

        Raises:
            Stuck: it does not stop.
        """
        if self.withdraw(who):
            assert self._current is not None
            self._wait()
            self._current.who = None

    def pause(self) -> None:
        """Let no guest code execute until the caller goes back to the event loop.

        Raises:
            Stuck: it does not stop.
        """
        if self._current is not None:
            self._current.kick()
            self._wait()

    def close(self) -> None:
        """End the thread."""
        self._turns.clear()
        self._timeline.drop(self)
        if self._current is not None:
            self._current.who = None
            self._current.kick()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(PATIENCE_S)
            self._thread = None

    def step(self, now_ns: int) -> None:
        """The present turn has been long enough, if somebody else waits."""
        if not self._turns:
            return
        if self._current is not None and now_ns - self._held_since_ns >= TURN_NS:
            self.nr_kicks += 1
            self._holder = None
            self._current.kick()
        self._watch_turn()

    def _watch_turn(self) -> None:
        """Look again when the present turn has been long enough."""
        if not self.ticket:
            due_ns = max(self._held_since_ns + TURN_NS, self._timeline.now_ns + TURN_NS // 2)
            self._timeline.sleep_until(self, due_ns)

    def _wait(self) -> None:
        if not self._idle.wait(PATIENCE_S):
            raise Stuck

    def _next(self) -> None:
        """Begin the next turn."""
        if not self._turns:
            self._timeline.drop(self)
            return
        turn = self._turns.popleft()
        if turn.who is not None and turn.who.is_due:
            again = self._again(turn.who)
            if again is None:
                self._next()
                return
            turn = again
        self._current = turn
        self.nr_turns += 1
        if turn.who is not self._holder:
            self._holder, self._held_since_ns = turn.who, self.now_ns()
        if self._turns:
            self._watch_turn()
        if turn.stop is None:
            turn.was_short = True
            self._token.run_sync_soon(self._over, turn)
            return
        self._before()
        self._idle.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="vcpus", daemon=True)
            self._thread.start()
        self._jobs.put(turn)

    def _again(self, who: Executes) -> Turn | None:
        """Let somebody enter anew instead of taking its turn; the turn it then wants, if any."""
        self._heard(who, None)
        for turn in self._turns:
            if turn.who is who:
                self._turns.remove(turn)
                return turn
        return None

    def _heard(self, who: Executes, error: BaseException | None) -> None:
        """Tell somebody that its turn is over; what it hands over now waits."""
        self._handling = True
        try:
            who.executed(error)
        finally:
            self._handling = False

    def _serve(self) -> None:
        """The thread: execute what comes."""
        while (turn := self._jobs.get()) is not None:
            assert turn.stop is not None
            began_ns = time.monotonic_ns()
            try:
                turn.stop.work()
            except BaseException as error:  # its vCPU is told
                turn.error = error
            turn.was_short = time.monotonic_ns() - began_ns < SHORT_NS
            self._idle.set()
            try:
                self._token.run_sync_soon(self._over, turn)
            except trio.RunFinishedError:
                return

    def _over(self, turn: Turn) -> None:
        """On the event loop: a turn has ended. The next begins when its vCPU was heard."""
        if self._current is not turn:  # closed meanwhile
            return
        self._current = None
        self.was_short = turn.was_short
        self._after()
        if turn.who is not None:
            self._heard(turn.who, turn.error)
        if self._current is None:
            self._next()
