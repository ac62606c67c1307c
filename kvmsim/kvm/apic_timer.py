"""The timer of a local APIC: one-shot, periodic and TSC-deadline.

Nothing runs by itself: the timer knows when it is due, and whoever brings the vCPU up to date
calls :meth:`ApicTimer.expire`. A periodic timer counts from its own last deadline and does not
drift. Behaviour: Linux 6.12 lapic.c; its bus runs at 1 GHz.
"""

from __future__ import annotations

ONE_SHOT, PERIODIC, DEADLINE = 0, 1 << 17, 2 << 17
#: Linux 6.12 lapic.c ``limit_periodic_timer_frequency``, module parameter min_timer_period_us.
MIN_PERIOD_NS = 200_000
BUS_CYCLE_NS = 1


class ApicTimer:
    """When the timer of one local APIC is due.

    Attributes:
        mode: ``ONE_SHOT``, ``PERIODIC`` or ``DEADLINE``.
        divide: bus cycles for one count.
        period_ns: from the initial count to 0; 0: not armed.
        due_ns: when it is 0 next; None: never.
        deadline: what the guest wrote to IA32_TSC_DEADLINE, 0 once it has passed.
    """

    __slots__ = ("deadline", "divide", "due_ns", "mode", "period_ns")

    def __init__(self) -> None:
        self.mode = ONE_SHOT
        self.divide = 2
        self.period_ns = 0
        self.due_ns: int | None = None
        self.deadline = 0

    def reset(self) -> None:
        """Power-on or INIT. Linux keeps what was set, stopped (6.12 ``kvm_lapic_reset``)."""
        self.due_ns = None
        self.deadline = 0
        self.period_ns = 0
        self.mode = ONE_SHOT
        self.divide = 2

    def stop(self) -> None:
        """It is due no more."""
        self.due_ns = None

    def set_mode(self, mode: int) -> bool:
        """Follow LVTT; True: the mode's kind changed, so the initial count is 0 from now on."""
        if mode == self.mode:
            return False
        other_kind = DEADLINE in {mode, self.mode}
        if other_kind:
            self.due_ns = None
            self.period_ns = self.deadline = 0
        self.mode = mode
        self._limit()
        return other_kind

    def start(self, initial: int, current: int | None, now_ns: int) -> None:
        """Count from ``initial`` to 0; after a restore, the first time from ``current``."""
        self.due_ns = None
        self.period_ns = initial * BUS_CYCLE_NS * self.divide
        if not self.period_ns:
            return
        self._limit()
        left_ns = self.period_ns
        if current is not None:
            left_ns = min(current * BUS_CYCLE_NS * self.divide, self.period_ns)
            if not left_ns and self.mode == PERIODIC:
                left_ns = self.period_ns
        self.due_ns = now_ns + left_ns

    def start_deadline(self, deadline: int, tsc: int, tsc_khz: int, now_ns: int) -> None:
        """Be due when the guest's time-stamp counter, now ``tsc``, gets to ``deadline``."""
        self.deadline = deadline
        self.due_ns = None
        if deadline:
            cycles = max(0, deadline - tsc)
            self.due_ns = now_ns + -(-cycles * 1_000_000 // tsc_khz)

    def set_divide(self, divide: int, initial: int, now_ns: int) -> None:
        """Another speed: what is left takes as many counts as before."""
        old, self.divide = self.divide, divide
        if divide == old or not self.period_ns:
            return
        self.period_ns = initial * BUS_CYCLE_NS * divide
        self._limit()
        if self.due_ns is not None:
            self.due_ns = now_ns + max(0, self.due_ns - now_ns) * divide // old

    def current(self, now_ns: int) -> int:
        """The current count."""
        if self.mode == DEADLINE or not self.period_ns or self.due_ns is None:
            return 0
        left_ns = max(0, self.due_ns - now_ns) % self.period_ns
        return left_ns // (BUS_CYCLE_NS * self.divide)

    def expire(self, now_ns: int) -> None:
        """It is due, or was: one interrupt however many periods have gone by."""
        due_ns = self.due_ns
        if due_ns is None or due_ns > now_ns:
            return
        if self.mode != PERIODIC:
            self.due_ns = None
            self.deadline = 0
            return
        # A multiple of the period behind the last deadline, so that nothing adds up.
        missed = (now_ns - due_ns) // self.period_ns
        self.due_ns = due_ns + (missed + 1) * self.period_ns

    def _limit(self) -> None:
        if self.mode == PERIODIC and 0 < self.period_ns < MIN_PERIOD_NS:
            self.period_ns = MIN_PERIOD_NS


def divide_of(tdcr: int) -> int:
    """Bus cycles for one count, from the divide configuration register."""
    code = (tdcr & 3) | (tdcr & 8) >> 1
    return 1 << (code + 1 & 7)
