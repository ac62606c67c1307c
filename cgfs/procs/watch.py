"""The task that brings news of real processes to the model although nobody asks.

Without it an exit would be noticed at the next read only: no event, no v1 release agent.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import trio

from cgfs.procs.scan import LOOK_EVERY_S

if TYPE_CHECKING:
    from cgfs.procs.processes import RealProcesses

BURST_S = 0.003  # news within this time of the last is delivered together
ENFORCE_EVERY_S = 0.02
ENFORCE_SHARE = 40  # looking after the frozen takes at most one part in so many of the time


async def run(
    processes: RealProcesses,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Deliver news until cancelled, a few milliseconds after it happens.

    On a machine that forks without pause this wakes at most every `BURST_S`, and while nobody is
    watched not at all.
    """
    task_status.started()
    enforce_at = 0.0
    while True:
        with trio.move_on_after(_patience(processes, enforce_at)):
            await trio.lowlevel.wait_readable(processes.fileno())
        processes.woken()
        processes.sync()
        if processes.nr_frozen and time.perf_counter() >= enforce_at:
            began = time.perf_counter()
            processes.enforce_frozen()
            spent = time.perf_counter() - began
            enforce_at = began + max(ENFORCE_EVERY_S, ENFORCE_SHARE * spent)
        await trio.sleep(BURST_S)


def _patience(processes: RealProcesses, enforce_at: float) -> float:
    """Seconds after which something has to be done although nothing became readable."""
    patience = LOOK_EVERY_S if processes.must_look else math.inf
    if processes.nr_frozen:
        patience = min(patience, max(0.0, enforce_at - time.perf_counter()))
    return patience
