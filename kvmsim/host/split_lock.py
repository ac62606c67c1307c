"""Host policy for bus locks of host applications: ``split_lock_detect=`` (kvm.md B.6, C.2).

It concerns tasks of the host. Bus locks of VMs never pass through it, as on Linux; their limits are
the VMM's (``kvmsim.vmm.ratelimit``) and the cgroup's (``cgfs.controllers.bus_lock``). But where the
processor raises #AC for split locks, it does so in guests too, and the thread that runs the vCPU is
treated like a task that took one (``kvmsim.kvm.split_lock``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

MAX_RATE = 1000
"""Largest N of ``ratelimit:N``."""

POLL_NS = 20_000_000
"""A refused task sleeps this long before it tries again (Linux: msleep(20))."""


class Mode(Enum):
    """What a host task's bus lock leads to."""

    OFF = "off"
    WARN = "warn"
    FATAL = "fatal"
    RATELIMIT = "ratelimit"


@dataclass(frozen=True, slots=True)
class SplitLockDetect:
    """The option as the kernel understood it.

    Attributes:
        mode: the policy.
        rate: bus locks per second of the whole machine in mode RATELIMIT; 0 does not limit.
    """

    mode: Mode
    rate: int = 0

    def __str__(self) -> str:
        """The option's spelling."""
        return f"ratelimit:{self.rate}" if self.mode is Mode.RATELIMIT else self.mode.value


# Linux sscanf("%d%n"): white space and a sign may come first, anything may follow.
_LEADING_INT = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_RATELIMIT = "ratelimit:"


def parse_split_lock_detect(option: str | None, *, capable: bool) -> SplitLockDetect:
    """Parse ``split_lock_detect=``.

    Args:
        option: what follows the equals sign; None when the option is absent.
        capable: whether the CPU has bus lock detection or split lock #AC.

    Quirks of Linux 6.12 (match_option() and split_lock_setup() in arch/x86/kernel/cpu/bus_lock.c,
    before 6.13 in intel.c): what follows the number of ``ratelimit:N`` is ignored, the bare word
    ``ratelimit:`` selects the mode without a limit, a number out of range is an unknown option.

    Returns:
        The policy; an absent or unknown option is ``warn``. Without the CPU feature it is ``off``.
    """
    if not capable:
        return SplitLockDetect(Mode.OFF)
    for mode in (Mode.OFF, Mode.WARN, Mode.FATAL):
        if option == mode.value:
            return SplitLockDetect(mode)
    if option is not None and option.startswith(_RATELIMIT):
        return _parse_ratelimit(option.removeprefix(_RATELIMIT))
    return SplitLockDetect(Mode.WARN)


def _parse_ratelimit(text: str) -> SplitLockDetect:
    if not text:
        return SplitLockDetect(Mode.RATELIMIT)
    number = _LEADING_INT.match(text)
    if number is None or not 0 < int(number[1]) <= MAX_RATE:
        return SplitLockDetect(Mode.WARN)
    return SplitLockDetect(Mode.RATELIMIT, int(number[1]))


class KernelRatelimit:
    """Linux ``struct ratelimit_state``: a fixed window that opens with its first event (C.2).

    Attributes:
        interval: length of the window, in the unit of the times given; 0 does not limit.
        burst: events allowed per window.
        printed: events allowed in this window.
        missed: events refused since they were last reported; a new window keeps it.
        begin: when the window opened; 0 before the first event.
        contended: somebody else holds the internal lock: every try is refused meanwhile (before
            Linux 6.16).
    """

    __slots__ = ("begin", "burst", "contended", "interval", "missed", "printed")

    def __init__(self, interval: int, burst: int) -> None:
        self.interval = interval
        self.burst = burst
        self.printed = 0
        self.missed = 0
        self.begin = 0
        self.contended = False

    @classmethod
    def of(cls, policy: SplitLockDetect, interval: int = 1_000_000_000) -> KernelRatelimit:
        """The machine's limiter under a policy; its interval is one second."""
        return cls(interval if policy.rate else 0, policy.rate)

    def try_take(self, now: int) -> bool:
        """Whether an event at ``now`` is allowed; there is no queue and no carry-over."""
        if not self.interval:
            return True
        if self.contended:
            return False
        if not self.begin:
            self.begin = now
        if now > self.begin + self.interval:
            self.begin = now
            self.printed = 0
        if self.burst > self.printed:
            self.printed += 1
            return True
        self.missed += 1
        return False
