"""KVM_RUNs that wait for their guests, and the look for signals of the threads that make them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kvmsim.interpose.runs import LAST_LOOK_NS, LOOKS_APART_NS
from kvmsim.interpose.signals import pending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsim.interpose.notify import Listener
    from kvmsim.interpose.runs import Run
    from kvmsim.vmm.run_loop import RunLoop


class Parked:
    """All of them, of one client tree.

    Args:
        listener: where their calls came out.
        loop: time of the host.
        gone: called with a run whose caller is gone, and the time.
    """

    def __init__(self, listener: Listener, loop: RunLoop, gone: Callable[[Run, int], None]) -> None:
        self._listener = listener
        self._loop = loop
        self._gone = gone
        self._runs: dict[Run, None] = {}
        self._one = trio.Event()

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs))

    def add(self, run: Run) -> None:
        """A KVM_RUN waits from now on."""
        self._runs[run] = None
        self._one.set()

    def remove(self, run: Run) -> None:
        """It is over."""
        self._runs.pop(run, None)

    def threads(self) -> set[int]:
        """Every thread that waits: in KVM_RUN, or for a vCPU that is in it."""
        waiting = {run.thread.number for run in self._runs if run.thread is not None}
        return waiting | {late[1] for run in self._runs for late in run.waiting}

    async def watch_signals(self) -> None:
        """Look for signals until cancelled."""
        while True:
            if not self._runs:
                self._one = trio.Event()
                await self._one.wait()
                continue  # it may be over by now
            now_ns = self._loop.now_ns()
            look_at_ns = min(run.look_at_ns for run in self._runs)
            if look_at_ns > now_ns:
                await trio.sleep((look_at_ns - now_ns) / 1e9)
            now_ns = self._loop.catch_up()
            for run in [run for run in self._runs if run.look_at_ns <= now_ns]:
                self._look(run, now_ns)
            await trio.lowlevel.checkpoint()

    def _look(self, run: Run, now_ns: int) -> None:
        assert run.notification is not None
        assert run.thread is not None
        if not self._listener.is_valid(run.notification[0]):
            self._gone(run, now_ns)
            return
        try:
            mask: int | None = getattr(run.vcpu, "signal_mask", None)
            signalled = pending(run.thread.text("status"), mask)
        except OSError:
            signalled = False
        if signalled:
            run.interrupt(now_ns)
            return
        longest_ns = max(LAST_LOOK_NS, len(self._runs) * LOOKS_APART_NS)
        run.look_after_ns = min(run.look_after_ns * 2, longest_ns)
        run.look_at_ns = now_ns + run.look_after_ns
