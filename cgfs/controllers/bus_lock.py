"""bus_lock.*: how many bus locks a subtree may take per period (kvm.md C.4).

No kernel has this controller; its conventions are those of cpu.max and misc::

    /            no files, no limit
    └── tenant   bus_lock.max "4 1000000"   four at once from idle, then one every 250 ms
        ├── a    three vCPUs that always lock: one of them per 500 ms, in turn
        └── b    one vCPU that always locks: one per 500 ms

What can be relied on:

* A bus lock passes when it is within the limits of its cgroup and of all ancestors; otherwise
  its vCPU (or host task) waits, and others of its cgroup queue up behind it.
* In any interval of length T a cgroup admits at most quota + floor(T * quota / period).
* A waiter in another cgroup costs nothing unless a common ancestor's limit is short; then
  siblings take turns, however many waiters each has.
* A write to bus_lock.max that changes the limit fills the credit up and lets waiters go at once.

Counting. Only bus locks that the kernel detects count: those below a finite limit, and those of
VMs whose VMM enabled detection. ``nr_events`` counts at admission, in the cgroup of the task and in
all its ancestors, so the children's counts add up to the parent's. A bus lock that has to wait
counts one ``nr_throttled`` there (again hierarchical), and one event in the nearest cgroup, from
the task's upwards, whose own limit was short: ``max`` in that cgroup's bus_lock.events.local, and
in bus_lock.events of it and its ancestors, as misc does. However often a wait is interrupted and
resumed, or moved to another cgroup, it counts once. ``throttled_usec`` is the sum of the waits that
ended: by admission, interruption, move or cancelling.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from cgfs.core.budget import NEVER, Budget, BudgetTree
from cgfs.core.cftype import CFType, Kind, On
from cgfs.core.css import Controller, Css
from cgfs.core.parse import U32_MAX, strip
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.core.budget import Waiter
    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup

# Bounds of cpu.max (Linux kernel/sched/core.c).
MIN_PERIOD_US = 1_000
MAX_PERIOD_US = 1_000_000


class BusLockCss(Css):
    """Limit, waiters and counts of one cgroup.

    Attributes:
        budget: the limit and who waits; the budget's owner is this state.
        events: refusals here and below, of events that then waited.
        events_local: those that the cgroup's own limit refused.
    """

    __slots__ = ("budget", "events", "events_local")

    controller: BusLock
    parent: BusLockCss | None

    def __init__(
        self,
        controller: BusLock,
        cgrp: Cgroup,
        parent: BusLockCss | None,
        owner: Caller,
        now_ns: int,
    ) -> None:
        super().__init__(controller, cgrp, parent, owner, now_ns)
        self.events = 0
        self.events_local = 0
        self.budget: Budget[BusLockCss]
        if parent is None:
            self.budget = controller.plant(self).root
        else:
            self.budget = parent.budget.tree.add(parent.budget, self)

    def limited(self) -> bool:
        """Whether this cgroup or an ancestor has a finite limit."""
        return bool(self.budget.limits)

    def request(self, waiter: Waiter, now_ns: int) -> bool:
        """One bus lock of a task of this cgroup.

        Returns:
            True when it is admitted at once; False when it is queued: ``waiter.admitted`` will be
            called, unless the wait is withdrawn or cancelled before.
        """
        budget = self.budget
        owed = budget.tree.owed
        again = bool(owed) and waiter in owed
        refusing = budget.request(waiter, now_ns)
        if refusing is None:
            return True
        if not again:
            refusing.owner.count_event()
        return False

    def count_event(self) -> None:
        """Count a refusal by this cgroup's own limit here and in every ancestor but the root."""
        self.events_local += 1
        self.notify("bus_lock.events.local")
        css = self
        while css.parent is not None:
            css.events += 1
            css.notify("bus_lock.events")
            css = css.parent

    def offline(self, now_ns: int) -> None:
        """Hand those who wait here to the parent, whose limits are theirs from here on."""
        if self.parent is not None:
            self.budget.tree.remove(self.budget, now_ns)
            self.controller.limits_changed()


def _max_show(css: BusLockCss, _caller: Caller) -> str:
    budget = css.budget
    return f"{budget.quota or 'max'} {budget.period_ns // 1000}\n"


def _parse_number(field: bytes, smallest: int, largest: int) -> int:
    if not field.isdigit() or not smallest <= int(field) <= largest:
        raise CgroupError(EINVAL)
    return int(field)


def parse_max(text: bytes, period_ns: int) -> tuple[int, int]:
    """Parse ``QUOTA [PERIOD]``; fields are separated by white space.

    Args:
        text: what was written.
        period_ns: the period to keep when none is given.

    Returns:
        Quota (0 for ``max``) and period in ns.

    Raises:
        CgroupError: EINVAL for anything else, also where cpu.max forgives what follows.
    """
    fields = strip(text).split()
    if not 1 <= len(fields) <= 2:
        raise CgroupError(EINVAL)
    quota = 0 if fields[0] == b"max" else _parse_number(fields[0], 1, U32_MAX)
    if len(fields) == 2:
        period_ns = _parse_number(fields[1], MIN_PERIOD_US, MAX_PERIOD_US) * 1000
    return quota, period_ns


def _max_write(css: BusLockCss, text: bytes, _opener: Caller, now_ns: int) -> None:
    quota, period_ns = parse_max(text, css.budget.period_ns)
    css.budget.tree.set_limit(css.budget, quota, period_ns, now_ns)
    css.controller.limits_changed()


def _stat_show(css: BusLockCss, _caller: Caller) -> str:
    budget = css.budget
    return (
        f"nr_events {budget.nr_events}\n"
        f"nr_throttled {budget.nr_throttled}\n"
        f"throttled_usec {budget.throttled_ns // 1000}\n"
        f"nr_cancelled {budget.nr_cancelled}\n"
    )


def _events_show(css: BusLockCss, _caller: Caller) -> str:
    return f"max {css.events}\n"


def _events_local_show(css: BusLockCss, _caller: Caller) -> str:
    return f"max {css.events_local}\n"


class BusLock(Controller):
    """The bus_lock controller of one host.

    Attributes:
        on_ready: called when the next admission is due earlier than it was; must only record.
        on_limits: called when some cgroup's limit is another one, or is gone.
    """

    name = "bus_lock"
    files = (
        CFType(
            "bus_lock.max",
            show=_max_show,
            write=_max_write,
            on=On.NON_ROOT,
            doc="Bus locks per period (in microseconds) of the cgroup and its descendants; write "
            "`<number|max> [<period>]`.",
        ),
        CFType(
            "bus_lock.stat",
            show=_stat_show,
            on=On.NON_ROOT,
            kind=Kind.LIVE,
            doc="Here and below: bus locks admitted, those that had to wait, microseconds of all "
            "waits that ended, those dropped with their vCPU before they were admitted.",
        ),
        CFType(
            "bus_lock.events",
            show=_events_show,
            on=On.NON_ROOT,
            kind=Kind.LIVE,
            notify=True,
            doc="`max`: bus locks that had to wait for the limit of this cgroup or of one below; "
            "each counts once, at the nearest cgroup whose own limit was short.",
        ),
        CFType(
            "bus_lock.events.local",
            show=_events_local_show,
            on=On.NON_ROOT,
            kind=Kind.LIVE,
            notify=True,
            doc="The same, only those that this cgroup's own limit made wait.",
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self._tree: BudgetTree[BusLockCss] | None = None
        self.on_ready: Callable[[], None] | None = None
        self.on_limits: Callable[[], None] | None = None

    def limits_changed(self) -> None:
        """Tell whoever keeps in mind which cgroups are limited."""
        if self.on_limits is not None:
            self.on_limits()

    def css_alloc(self, cgrp: Cgroup, parent: Css | None, owner: Caller, now_ns: int) -> BusLockCss:
        """State without a limit."""
        assert parent is None or isinstance(parent, BusLockCss)
        return BusLockCss(self, cgrp, parent, owner, now_ns)

    def plant(self, root: BusLockCss) -> BudgetTree[BusLockCss]:
        """The tree of a hierarchy the controller has just come to; it belongs to one at a time."""
        self._tree = BudgetTree(root)
        self._tree.on_ready = self._ready
        return self._tree

    def _ready(self) -> None:
        if self.on_ready is not None:
            self.on_ready()

    def pump(self, now_ns: int) -> None:
        """Admit everyone whose turn came up to ``now_ns``, each at its own time."""
        if self._tree is not None:
            self._tree.pump(now_ns)

    def next_ready_ns(self) -> int | None:
        """When :meth:`pump` may find something to do; never too late, None when nobody waits."""
        if self._tree is None or self._tree.next_ns == NEVER:
            return None
        return self._tree.next_ns

    def withdraw(self, waiter: Waiter, now_ns: int) -> bool:
        """Interrupt a wait: the event stays owed, the waiter's next request is the same event.

        Returns:
            False if the waiter was not waiting.
        """
        return self._tree is not None and self._tree.withdraw(waiter, now_ns)

    def cancel(self, waiter: Waiter, css: BusLockCss, now_ns: int) -> bool:
        """Drop a waiter's event for good: queued, owed, or still to be asked for.

        It counts in ``nr_cancelled`` where it waited; in ``css``, where the waiter's task is, if
        it never did.

        Returns:
            False if it was admitted at this very moment.
        """
        return css.budget.tree.cancel(waiter, now_ns, css.budget)

    def move(self, waiter: Waiter, css: BusLockCss, now_ns: int) -> None:
        """The waiter's task is in another cgroup: what it waits for or owes goes there."""
        css.budget.tree.move(waiter, css.budget, now_ns)


CONTROLLER = BusLock
