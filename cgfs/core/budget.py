"""Rates charged up the tree: so many events per period, paced, and fair between siblings.

The rules are kvm.md C.4. A budget belongs to one cgroup. A limited one holds a credit that grows by
``quota`` units per nanosecond up to ``quota * period_ns``; an event costs ``period_ns`` units. An
event of a cgroup is admissible when every limited budget from the cgroup to the root can pay; then
all of them pay at once, so nothing is held while waiting and nothing can deadlock::

        /            no limit
        └─ tenant    4 per second   one event every 250 ms once the first four are spent
           ├─ a      no limit       a1 a2 a3 wait here, first in first out
           └─ b      no limit       b1 waits here; tenant's turns go a b a b

* What can rely on this: in any interval of length T a cgroup admits at most
  ``quota + floor(T * quota / period)`` events; a cgroup is delayed only by its own limit and those
  of its ancestors; between siblings the one served longest ago goes first (then the older one).
* An arrival that is admissible passes at once, after everyone who became admissible earlier.
* Integers only. The credit is kept as the scaled instant at which it would have been nothing
  (``empty_at = now * quota - credit``), so that looking at it needs no update.

Queue structure: each budget files the children that have waiters in two heaps. ``later`` is keyed
by a time before which the child cannot be admissible (it may be too early, never too late, and is
put right when it comes up); ``eligible`` holds those whose own subtree is ready, keyed by last
service.
Admitting one event therefore costs O(depth * log(siblings)), whatever the number of waiters.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = 1 << 200
"""A time after every other; also the filing key of a budget that has no waiters."""

_ELIGIBLE = -1
"""The filing key of a budget that stands in its parent's ``eligible`` heap."""


class Waiter(Protocol):
    """Somebody who may have to wait for an event of theirs to be admitted. Hashed by identity."""

    def admitted(self, now_ns: int) -> None:
        """The event was admitted at ``now_ns``; called once per queued event."""


OwnerT = TypeVar("OwnerT")


class Budget(Generic[OwnerT]):
    """The rate limit of one cgroup, and those who wait in it.

    Attributes:
        owner: What the budget belongs to (a controller's css).
        quota: Events per period; 0 is no limit.
        period_ns: Length of the period; also the price of one event.
        empty_at: Credit as explained at the top of the file, in ns * quota.
        nr_events: Events admitted here and below.
        nr_throttled: Events that had to wait, here and below; each counted once.
        throttled_ns: Sum of the waits that are over, here and below.
        nr_cancelled: Events dropped while they waited or were owed, here and below.
        nr_waiting: Waiters here and below at this moment.
        path: From this budget to the root.
        limits: Those of the path that have a limit.
        order: Creation order; breaks ties between siblings.
        served: When an event of this subtree was last admitted, as a running number.
        queue: Those who wait in this very cgroup, first in first out, and since when.
        queue_served: As ``served``, for the queue, which takes turns with the children.
        eligible: Heap of (served, order, child) of the children that only wait for this budget or
            one above.
        later: Heap of (not before, order, child) of the other children with waiters.
        filed_at: The key under which the parent's heaps hold this budget; older entries are void.
    """

    __slots__ = (
        "children",
        "eligible",
        "empty_at",
        "filed_at",
        "later",
        "limits",
        "nr_cancelled",
        "nr_events",
        "nr_throttled",
        "nr_waiting",
        "order",
        "owner",
        "parent",
        "path",
        "period_ns",
        "queue",
        "queue_served",
        "quota",
        "served",
        "throttled_ns",
        "tree",
    )

    def __init__(
        self, tree: BudgetTree[OwnerT], parent: Budget[OwnerT] | None, owner: OwnerT, order: int
    ) -> None:
        self.tree = tree
        self.parent = parent
        self.owner = owner
        self.children: dict[Budget[OwnerT], None] = {}
        self.quota = 0
        self.period_ns = 1_000_000_000
        self.empty_at = 0
        self.nr_events = self.nr_throttled = self.throttled_ns = self.nr_cancelled = 0
        self.nr_waiting = 0
        self.order = order
        self.served = self.queue_served = 0
        self.queue: OrderedDict[Waiter, int] = OrderedDict()
        self.eligible: list[tuple[int, int, Budget[OwnerT]]] = []
        self.later: list[tuple[int, int, Budget[OwnerT]]] = []
        self.filed_at = NEVER
        self.path: tuple[Budget[OwnerT], ...] = (self, *(parent.path if parent else ()))
        self.limits: tuple[Budget[OwnerT], ...] = parent.limits if parent else ()
        if parent is not None:
            parent.children[self] = None

    @property
    def limited(self) -> bool:
        """Whether this budget or an ancestor has a limit."""
        return bool(self.limits)

    def credit(self, now_ns: int) -> int:
        """What is left at ``now_ns`` in ns * quota; only meaningful with a limit."""
        return min(self.quota * self.period_ns, now_ns * self.quota - self.empty_at)

    def request(self, waiter: Waiter, now_ns: int) -> Budget[OwnerT] | None:
        """One event at ``now_ns``.

        Returns:
            None when it was admitted at once. Otherwise the waiter is queued and the result is the
            nearest budget, from here to the root, whose own limit refused.
        """
        tree = self.tree
        if tree.next_ns <= now_ns:
            tree.pump(now_ns)
        for node in self.limits:
            if node.empty_at + node.period_ns > now_ns * node.quota:
                tree.wait(self, waiter, now_ns)
                return node
        if tree.owed:
            tree.owed.pop(waiter, None)
        tree.charge(self, now_ns)
        return None

    def ready_ns(self) -> int:
        """Earliest time at which the own limit can pay for one event."""
        quota = self.quota
        return -(-(self.empty_at + self.period_ns) // quota) if quota else 0

    def pay(self, now_ns: int) -> None:
        """Take one event out of a limited budget that can pay."""
        full = now_ns * self.quota - self.quota * self.period_ns
        self.empty_at = max(full, self.empty_at) + self.period_ns

    def not_before(self) -> int:
        """A time before which no waiter of this subtree is admissible by the subtree's limits."""
        if self.queue or self.eligible:
            inner = 0
        elif self.later:
            inner = self.later[0][0]
        else:
            return NEVER
        own = self.ready_ns()
        return max(own, inner)

    def collect(self, now_ns: int) -> None:
        """Move the children whose time has come from ``later`` to ``eligible``."""
        later = self.later
        while later and later[0][0] <= now_ns:
            key, order, child = heappop(later)
            if child.filed_at != key:
                continue
            if not child.nr_waiting:
                child.filed_at = NEVER
                continue
            ready = child.ready_ns()
            if ready > now_ns:
                child.filed_at = ready
                heappush(later, (ready, order, child))
            else:
                child.filed_at = _ELIGIBLE
                heappush(self.eligible, (child.served, order, child))

    def first(self) -> Budget[OwnerT] | None:
        """Whose turn it is among the eligible children and the own queue (self), if anybody's."""
        eligible = self.eligible
        while eligible:
            served, order, child = eligible[0]
            if not child.nr_waiting:
                heappop(eligible)
                child.filed_at = NEVER
            elif served != child.served:
                heapreplace(eligible, (child.served, order, child))
            elif self.queue and (self.queue_served, self.order) < (served, order):
                return self
            else:
                return child
        return self if self.queue else None

    def refile(self, now_ns: int) -> None:
        """Take this budget, the first of its parent's ``eligible``, to where it belongs by then."""
        parent = self.parent
        assert parent is not None
        not_before = self.not_before() if self.nr_waiting else NEVER
        if not_before <= now_ns:
            heapreplace(parent.eligible, (self.served, self.order, self))
            return
        heappop(parent.eligible)
        self.filed_at = not_before
        if not_before < NEVER:
            heappush(parent.later, (not_before, self.order, self))

    def file(self) -> None:
        """Let the ancestors know that a waiter here may be admissible earlier than they think."""
        node = self
        while (parent := node.parent) is not None:
            not_before = node.not_before()
            if not_before < node.filed_at:
                node.filed_at = not_before
                heappush(parent.later, (not_before, node.order, node))
            elif node.nr_waiting > 1:
                return  # with an earlier waiter in it, it is filed all the way up
            node = parent


class BudgetTree(Generic[OwnerT]):
    """All budgets of one controller on one hierarchy.

    Attributes:
        next_ns: The next time at which :meth:`pump` may find work; NEVER if nobody waits.
        owed: Waiters whose wait was interrupted: their event is still to be admitted.
        on_ready: Called when ``next_ns`` has become earlier, so that whoever sleeps until then
            looks again. It must only record.
    """

    __slots__ = ("_orders", "_served", "_waiting", "next_ns", "on_ready", "owed", "root")

    def __init__(self, owner: OwnerT) -> None:
        self._orders = 0
        self._served = 0
        self._waiting: dict[Waiter, Budget[OwnerT]] = {}
        self.next_ns = NEVER
        self.owed: dict[Waiter, Budget[OwnerT]] = {}
        self.on_ready: Callable[[], None] | None = None
        self.root: Budget[OwnerT] = Budget(self, None, owner, 0)

    def add(self, parent: Budget[OwnerT], owner: OwnerT) -> Budget[OwnerT]:
        """A new budget without limit below ``parent``."""
        self._orders += 1
        return Budget(self, parent, owner, self._orders)

    def remove(self, budget: Budget[OwnerT], now_ns: int) -> None:
        """Take a leaf out of the tree; its waiters go to the tail of its parent's queue."""
        parent = budget.parent
        if parent is None or budget.children:
            msg = "only a leaf below the root can be removed"
            raise ValueError(msg)
        self.pump(now_ns)
        for waiter in list(budget.queue):
            self.move(waiter, parent, now_ns)
        for waiter in [waiter for waiter, at in self.owed.items() if at is budget]:
            self.owed[waiter] = parent
        parent.children.pop(budget, None)

    def set_limit(self, budget: Budget[OwnerT], quota: int, period_ns: int, now_ns: int) -> None:
        """Install, change or (``quota`` 0) lift a limit.

        A changed limit starts with full credit. Writing the limit that is already in force changes
        nothing, so that repeating a setting does not buy a burst. The root has no limit.
        """
        if budget is self.root:
            msg = "the root has no limit"
            raise ValueError(msg)
        if (quota, period_ns) == (budget.quota, budget.period_ns):
            return
        self.pump(now_ns)
        budget.quota, budget.period_ns = quota, period_ns
        budget.empty_at = now_ns * quota - quota * period_ns
        todo = [budget]
        while todo:
            node = todo.pop()
            above = node.parent.limits if node.parent is not None else ()
            node.limits = (node, *above) if node.quota else above
            todo.extend(node.children)
        if budget.nr_waiting:
            budget.file()
            self._serve(now_ns)

    def is_waiting(self, waiter: Waiter) -> bool:
        """Whether the waiter stands in a queue."""
        return waiter in self._waiting

    def charge(self, budget: Budget[OwnerT], now_ns: int) -> None:
        """Pay for one admissible event of ``budget``, up to the root."""
        for node in budget.limits:
            node.pay(now_ns)
        self._served = served = self._served + 1
        for node in budget.path:
            node.served = served
            node.nr_events += 1
        budget.queue_served = served

    def wait(self, budget: Budget[OwnerT], waiter: Waiter, now_ns: int) -> None:
        """Queue an event that is not admissible at ``now_ns``."""
        if waiter in self._waiting:
            msg = "one event of a waiter at a time"
            raise ValueError(msg)
        new = self.owed.pop(waiter, None) is None
        for node in budget.path:
            node.nr_waiting += 1
            node.nr_throttled += new
        self._enqueue(budget, waiter, now_ns)

    def withdraw(self, waiter: Waiter, now_ns: int) -> bool:
        """Interrupt a wait. The event stays owed: the waiter's next request is the same event.

        Returns:
            False if the waiter was not waiting (its event may have been admitted just before).
        """
        self.pump(now_ns)
        budget = self._leave(waiter, now_ns)
        if budget is None:
            return False
        self.owed[waiter] = budget
        return True

    def cancel(self, waiter: Waiter, now_ns: int, budget: Budget[OwnerT] | None = None) -> bool:
        """Drop the waiter's event, queued or owed: it is not charged but counted as cancelled.

        Args:
            waiter: whose event.
            now_ns: when.
            budget: where an event counts that was still to be asked for; None: there is no such.

        Returns:
            False if there was no such event (it may have been admitted just before).
        """
        was_waiting = waiter in self._waiting
        self.pump(now_ns)
        at = self._leave(waiter, now_ns) or self.owed.pop(waiter, None)
        if at is None and not was_waiting:
            at = budget
        if at is None:
            return False
        for node in at.path:
            node.nr_cancelled += 1
        return True

    def move(self, waiter: Waiter, budget: Budget[OwnerT], now_ns: int) -> None:
        """The waiter's task went to another cgroup: its event queues there, or passes at once.

        The wait so far counts where it was spent. An owed event just changes its place.
        """
        self.pump(now_ns)
        if self._waiting.get(waiter) is budget:
            return
        if self._leave(waiter, now_ns) is None:
            if waiter in self.owed:
                self.owed[waiter] = budget
            return
        if all(node.ready_ns() <= now_ns for node in budget.limits):
            self.charge(budget, now_ns)
            waiter.admitted(now_ns)
            return
        for node in budget.path:
            node.nr_waiting += 1
        self._enqueue(budget, waiter, now_ns)

    def pump(self, now_ns: int) -> None:
        """Admit everyone who became admissible up to ``now_ns``, each at its own exact time."""
        while self.next_ns <= now_ns:
            self._serve(self.next_ns)

    def _enqueue(self, budget: Budget[OwnerT], waiter: Waiter, now_ns: int) -> None:
        self._waiting[waiter] = budget
        queue = budget.queue
        queue[waiter] = now_ns
        if len(queue) == 1:
            budget.file()
            self._look_ahead()

    def _leave(self, waiter: Waiter, now_ns: int) -> Budget[OwnerT] | None:
        """Take a waiter out of its queue; the heaps find out when the budget comes up."""
        budget = self._waiting.pop(waiter, None)
        if budget is None:
            return None
        waited_ns = now_ns - budget.queue.pop(waiter)
        for node in budget.path:
            node.nr_waiting -= 1
            node.throttled_ns += waited_ns
        self._look_ahead()
        return budget

    def _look_ahead(self) -> None:
        """Bring ``next_ns`` up to date with the root's first valid entry."""
        later = self.root.later
        while later and (later[0][2].filed_at != later[0][0] or not later[0][2].nr_waiting):
            key, _, child = heappop(later)
            if child.filed_at == key:
                child.filed_at = NEVER
        next_ns = later[0][0] if later else NEVER
        earlier = next_ns < self.next_ns
        self.next_ns = next_ns
        if earlier and self.on_ready is not None:
            self.on_ready()

    def _serve(self, now_ns: int) -> None:
        """Admit everyone who is admissible at ``now_ns``, in order; then tell them.

        They are told when the tree is in order again: what they do may lead back here.
        """
        admitted: list[Waiter] = []
        root = self.root
        while root.eligible or (root.later and root.later[0][0] <= now_ns):
            budget = self._choose(now_ns)
            if budget is None:
                break
            admitted.append(self._admit_first(budget, now_ns))
        self._look_ahead()
        for waiter in admitted:
            waiter.admitted(now_ns)

    def _choose(self, now_ns: int) -> Budget[OwnerT] | None:
        """The budget whose queue's head is next at ``now_ns``, going down from the root."""
        node = self.root
        while True:
            if node.later:
                node.collect(now_ns)
            if not node.eligible and node.queue:
                return node
            child = node.first()
            if child is node:
                return node
            if child is not None:
                node = child
            elif node.parent is None:
                return None
            else:
                node.refile(now_ns)
                node = node.parent

    def _admit_first(self, budget: Budget[OwnerT], now_ns: int) -> Waiter:
        """Charge the head of the queue that was chosen, and put the budgets above in order."""
        waiter, since_ns = budget.queue.popitem(last=False)
        del self._waiting[waiter]
        waited_ns = now_ns - since_ns
        self._served = budget.queue_served = served = self._served + 1
        for node in budget.path:
            if node.quota:
                node.pay(now_ns)
            node.served = served
            node.nr_events += 1
            node.nr_waiting -= 1
            node.throttled_ns += waited_ns
            if node.parent is not None:
                node.refile(now_ns)
        return waiter
