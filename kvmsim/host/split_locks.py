"""The split lock policy of one machine at work: log lines, SIGBUS, sleeps, the one semaphore.

Linux 6.12 ``arch/x86/kernel/cpu/bus_lock.c`` (before 6.13 in ``intel.c``), kvm.md B.6::

    mode         bus lock #DB of a task           split lock #AC of a task
    off          -                                -
    warn         a log line                       once a log line; sleep 10 ms, wait for the one
                                                  semaphore, go on without detection for 2 ticks
    fatal        SIGBUS                           SIGBUS
    ratelimit:N  sleep 20 ms until N per second   #AC is off
                 of the machine allow it, a line

The hardware's #DB is used where it has no #AC, and for ``ratelimit``.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from kvmsim.host.split_lock import KernelRatelimit, Mode, parse_split_lock_detect

if TYPE_CHECKING:
    from kvmsim.host.kernel_log import KernelLog
    from kvmsim.host.presets import Preset

NS_PER_S = 1_000_000_000
MISERY_NS = 10_000_000
"""How long a task sleeps before its split lock is let through."""

DETECTION_OFF_TICKS = 2
PREFIX = "x86/split lock detection: "
#: Linux DEFAULT_RATELIMIT: log lines per five seconds.
PRINTK_NS, PRINTK_BURST = 5 * NS_PER_S, 10


class Verdict(Enum):
    """What becomes of a task that took a bus lock."""

    GO_ON = auto()
    SLEEP = auto()  # ``split_lock.POLL_NS``, and ask again
    SIGBUS = auto()  # si_code BUS_ADRALN


class SplitLocks:
    """The policy of one machine.

    Args:
        preset: the machine.
        log: where the kernel prints.

    Attributes:
        policy: the option as the kernel understood it.
        raises_ac: the processor raises #AC for split locks, in guests too.
        raises_db: the processor raises #DB for bus locks of tasks (host DEBUGCTL[2]).
        has_ac: the processor could raise #AC.
        mitigates: sysctl ``kernel.split_lock_mitigate``.
        detection_off_ns: for how long detection stays off on a CPU that let a split lock through.
        log: as given.
    """

    __slots__ = (
        *("_detection_off_until_ns", "_fatal_warned", "_printk", "_ratelimit", "_waiting"),
        *("detection_off_ns", "has_ac", "log", "mitigates", "policy", "raises_ac", "raises_db"),
    )

    def __init__(self, preset: Preset, log: KernelLog) -> None:
        hardware, kernel = preset.bus_lock, preset.kernel
        capable = hardware.detect or hardware.split_lock_detect
        self.policy = parse_split_lock_detect(kernel.split_lock_detect, capable=capable)
        mode = self.policy.mode
        self.has_ac = hardware.split_lock_detect
        self.raises_ac = self.has_ac and mode in {Mode.WARN, Mode.FATAL}
        self.raises_db = hardware.detect and mode is not Mode.OFF and not self.raises_ac
        self.mitigates = kernel.split_lock_mitigate
        self.detection_off_ns = DETECTION_OFF_TICKS * NS_PER_S // kernel.hz
        self.log = log
        self._printk = KernelRatelimit(PRINTK_NS, PRINTK_BURST)
        self._ratelimit = KernelRatelimit.of(self.policy)
        self._waiting: list[object] = []
        self._detection_off_until_ns = 0
        self._fatal_warned = False

    # -- tasks of the host ---------------------------------------------------------------------

    def bus_lock(self, comm: str, pid: int, ip: int, now_ns: int) -> Verdict:
        """A task of the host got a bus lock #DB; the lock has happened."""
        mode = self.policy.mode
        if not self.raises_db:
            return Verdict.GO_ON
        if mode is Mode.FATAL:
            return Verdict.SIGBUS
        if mode is Mode.RATELIMIT and not self._ratelimit.try_take(now_ns):
            return Verdict.SLEEP
        self._print(f"#DB: {comm}/{pid} took a bus_lock trap at address: {ip:#x}", now_ns)
        return Verdict.GO_ON

    # -- split locks by #AC, of tasks and vCPU threads -------------------------------------------

    def warn(self, comm: str, pid: int, ip: int, now_ns: int) -> None:
        """Print that a task took a split lock; the kernel does so once for each."""
        self._print(f"#AC: {comm}/{pid} took a split_lock trap at address: {ip:#x}", now_ns)

    def refuse(self, comm: str, pid: int, ip: int) -> None:
        """Print, once, that a split lock of a guest ends its VM."""
        if not self._fatal_warned:
            self._fatal_warned = True
            kind = "fatal" if self.policy.mode is Mode.FATAL else "bogus"
            self.log.print(f"{PREFIX}#AC: {comm}/{pid} {kind} split_lock trap at address: {ip:#x}")

    def let_through(self, waiter: object, now_ns: int) -> int:
        """A sleeper wants its split lock to pass: one CPU at a time is without detection.

        Returns:
            0: detection is off for it from now on, for ``detection_off_ns``. Else: how long to
            wait, in line, before asking again.
        """
        if not self.mitigates:
            return 0
        if waiter not in self._waiting:
            self._waiting.append(waiter)
        place = self._waiting.index(waiter)
        free_ns = max(0, self._detection_off_until_ns - now_ns)
        if place or free_ns:
            return free_ns + place * self.detection_off_ns
        self._waiting.pop(0)
        self._detection_off_until_ns = now_ns + self.detection_off_ns
        return 0

    def leave(self, waiter: object) -> None:
        """A sleeper was interrupted."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)

    def _print(self, line: str, now_ns: int) -> None:
        if self._printk.try_take(now_ns):
            self.log.print(PREFIX + line)
