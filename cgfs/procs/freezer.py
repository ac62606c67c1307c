"""Freezing real processes from user space: SIGSTOP and SIGCONT.

/proc shows state T instead of S, and a parent that waits for stops is told. Otherwise:

- A process that was stopped before stays stopped after thaw, also when somebody stops it while it
  is frozen, unless somebody continues it then.
- Somebody's SIGCONT to a frozen process lets it run for a moment; `enforce` stops it again.
- A signal that would end a frozen process ends it, as it does on Linux: SIGKILL at once, another
  one, neither handled nor blocked, when `enforce` sees it waiting. In a process that was stopped
  before it waits for SIGCONT, frozen or not (Linux kernel/signal.c wants_signal()).
- Stopped, traced and waiting for a vfork child all count as frozen.
- Kernel threads and the server itself are left running: a stopped server would hang the mount, and
  with it everybody who looks at it.

A process inside a system call of our own mount cannot stop before it gets its reply, so nothing
here waits when it freezes. `is_frozen` waits, at most until `SETTLE_S` after the freeze.
"""

import os
import signal
import time
from collections.abc import Callable

from cgfs.procs import proc
from cgfs.procs.pidfds import Pidfds

SETTLE_S = 0.1
SETTLE_STEP_S = 0.0002


def _bits(*signals: signal.Signals) -> int:
    return sum(1 << (signum - 1) for signum in signals)


STOP_BITS = _bits(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
HARMLESS_BITS = STOP_BITS | _bits(
    signal.SIGCONT, signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG
)  # all others end a process that does nothing about them (signal(7))


class _Frozen:
    """One frozen process.

    Attributes:
        was_stopped: it was stopped before, so a thaw must not continue it.
        settled_by: monotonic seconds after which nobody waits for it any more.
        ending: it got SIGCONT to die of a waiting signal.
        repeated: it got more than one SIGSTOP of ours; the second may wait beside the first.
        late: somebody was told that it does not stand still yet.
    """

    __slots__ = ("ending", "late", "repeated", "settled_by", "was_stopped")

    def __init__(self, was_stopped: bool, settled_by: float) -> None:
        self.was_stopped = was_stopped
        self.settled_by = settled_by
        self.ending = False
        self.repeated = False
        self.late = False


class Freezer:
    """The frozen processes and what they were before."""

    def __init__(self, pidfds: Pidfds, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._pidfds = pidfds
        self._frozen: dict[int, _Frozen] = {}
        self._monotonic = monotonic

    def __len__(self) -> int:
        return len(self._frozen)

    def freeze(self, tgid: int) -> None:
        """Stop a process, now or when it leaves the kernel."""
        if tgid in self._frozen or _exempt(tgid):
            return
        was_stopped = _stopped(tgid)
        self._frozen[tgid] = _Frozen(was_stopped, self._monotonic() + SETTLE_S)
        if not was_stopped:
            self._pidfds.send(tgid, signal.SIGSTOP)

    def thaw(self, tgid: int) -> None:
        """Let a process run again, unless it was stopped for another reason."""
        frozen = self._frozen.pop(tgid, None)
        if frozen is None or frozen.was_stopped:
            return
        if frozen.repeated or not _stopped_again(tgid):
            self._pidfds.send(tgid, signal.SIGCONT)

    def thaw_all(self) -> None:
        """Let all frozen processes go on."""
        for tgid in list(self._frozen):
            self.thaw(tgid)

    def forget(self, tgid: int) -> None:
        """The process is gone."""
        self._frozen.pop(tgid, None)

    def is_frozen(self, tgid: int) -> bool:
        """Whether all live threads stand still; waits for a process that was frozen just now."""
        frozen = self._frozen.get(tgid)
        if _still(tgid) or (frozen is None and _exempt(tgid)):
            return True
        while frozen is not None and self._monotonic() < frozen.settled_by:
            time.sleep(SETTLE_STEP_S)
            if _still(tgid):
                return True
        if frozen is not None:
            frozen.late = True
        return False

    def enforce(self) -> list[int]:
        """Stop what somebody continued; let end what a waiting signal should have ended.

        Returns:
            processes that stand still now, of which `is_frozen` had to say that they do not.
        """
        stopped = []
        for tgid, frozen in list(self._frozen.items()):
            status = proc.read_status(tgid)
            if status is None:
                continue
            if _fatal(status) and not frozen.ending and not frozen.was_stopped:
                # Woken, it takes the signal before it gets back to its own code.
                frozen.ending = True
                self._pidfds.send(tgid, signal.SIGCONT)
            elif not _still(tgid):
                self._stop_again(tgid, frozen)
            elif frozen.late:
                frozen.late = False
                stopped.append(tgid)
        return stopped

    def _stop_again(self, tgid: int, frozen: _Frozen) -> None:
        if self._monotonic() >= frozen.settled_by:
            frozen.was_stopped = frozen.ending = False
            frozen.repeated = True
            frozen.settled_by = self._monotonic() + SETTLE_S
            self._pidfds.send(tgid, signal.SIGSTOP)


def _exempt(tgid: int) -> bool:
    """Whether a process is one that must run: the server itself or the kernel's own."""
    if tgid == os.getpid():
        return True
    stat = proc.read_stat(tgid)
    return stat is not None and stat.kthread


def _stopped(tgid: int) -> bool:
    """Whether every live thread of a process is stopped by job control."""
    states = proc.thread_states(tgid)
    return bool(states) and all(letter == "T" for letter in states.values())


def _stopped_again(tgid: int) -> bool:
    """Whether a SIGSTOP waits beside the one in effect: somebody else's, as ours has worked."""
    status = proc.read_status(tgid)
    return status is not None and bool(status.pending & _bits(signal.SIGSTOP)) and _stopped(tgid)


def _still(tgid: int) -> bool:
    """Whether no live thread of a process can run on: stopped, traced or waiting for vfork."""
    return all(
        letter in proc.STOPPED_STATES or (letter == "D" and proc.waits_for_vfork(tid))
        for tid, letter in proc.thread_states(tgid).items()
    )


def _fatal(status: proc.Status) -> bool:
    """Whether a signal waits that would have ended the process had it not been stopped."""
    spared = status.blocked | status.ignored | status.caught | HARMLESS_BITS
    return bool(status.pending & ~spared)
