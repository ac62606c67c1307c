"""The budget tree against a slow model that is kvm.md C.4 word by word, and C.4's properties."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cgfs.core.budget import NEVER, Budget, BudgetTree

MS = 1_000_000
S = 1_000_000_000


@dataclass(eq=False)
class SlowCgroup:
    """State per cgroup as in C.4: quota (0: none), period, credit in ns * quota, last."""

    order: int
    parent: SlowCgroup | None
    quota: int = 0
    period: int = S
    credit: int = 0
    last: int = 0
    served: int = 0
    queue_served: int = 0
    children: list[SlowCgroup] = field(default_factory=list)
    queue: list[str] = field(default_factory=list)
    admitted: int = 0

    def accrue(self, now: int) -> None:
        grown = self.credit + (now - self.last) * self.quota
        self.credit, self.last = min(self.quota * self.period, grown), now

    def chain(self) -> list[SlowCgroup]:
        return [self, *(self.parent.chain() if self.parent else [])]


class SlowTree:
    def __init__(self) -> None:
        self.root = SlowCgroup(0, None)
        self.all = [self.root]
        self.now = 0
        self.turn = 0
        self.log: list[tuple[int, str]] = []

    def add(self, parent: SlowCgroup) -> SlowCgroup:
        child = SlowCgroup(len(self.all), parent)
        parent.children.append(child)
        self.all.append(child)
        return child

    def can_pay(self, cgrp: SlowCgroup, now: int) -> bool:
        for node in cgrp.chain():
            if node.quota:
                node.accrue(now)
                if node.credit < node.period:
                    return False
        return True

    def ready(self, cgrp: SlowCgroup) -> int:
        times = [self.now]
        for node in cgrp.chain():
            if node.quota:
                node.accrue(self.now)
                missing = node.period - node.credit
                times.append(self.now + max(0, -(-missing // node.quota)))
        return max(times)

    def admit(self, cgrp: SlowCgroup, name: str) -> None:
        self.turn += 1
        cgrp.queue_served = self.turn
        for node in cgrp.chain():
            node.served = self.turn
            node.admitted += 1
            if node.quota:
                node.credit -= node.period
        self.log.append((self.now, name))

    def has_admissible(self, cgrp: SlowCgroup) -> bool:
        if cgrp.queue and self.can_pay(cgrp, self.now):
            return True
        return any(self.has_admissible(child) for child in cgrp.children)

    def admit_all(self) -> None:
        while self.has_admissible(self.root):
            node = self.root
            while True:
                turns = [
                    (child.served, child.order, child)
                    for child in node.children
                    if self.has_admissible(child)
                ]
                if node.queue and self.can_pay(node, self.now):
                    turns.append((node.queue_served, node.order, node))
                chosen = min(turns, key=lambda turn: turn[:2])[2]
                if chosen is node:
                    break
                node = chosen
            self.admit(node, node.queue.pop(0))

    def next(self) -> int:
        return min((self.ready(cgrp) for cgrp in self.all if cgrp.queue), default=NEVER)

    def advance(self, now: int) -> None:
        while (due := self.next()) <= now:
            self.now = max(due, self.now)
            self.admit_all()
        self.now = now

    def request(self, cgrp: SlowCgroup, name: str) -> bool:
        if self.can_pay(cgrp, self.now):
            self.admit(cgrp, name)
            return True
        cgrp.queue.append(name)
        return False

    def set_limit(self, cgrp: SlowCgroup, quota: int, period: int) -> None:
        if (quota, period) != (cgrp.quota, cgrp.period):
            cgrp.quota, cgrp.period = quota, period
            cgrp.credit, cgrp.last = quota * period, self.now
            self.admit_all()

    def leave(self, name: str) -> None:
        for cgrp in self.all:
            if name in cgrp.queue:
                cgrp.queue.remove(name)

    def place(self, name: str) -> SlowCgroup | None:
        return next((cgrp for cgrp in self.all if name in cgrp.queue), None)


@dataclass(eq=False)
class Named:
    name: str
    log: list[tuple[int, str]]

    def admitted(self, now_ns: int) -> None:
        self.log.append((now_ns, self.name))


class BudgetAgainstSlowModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.slow = SlowTree()
        self.fast: BudgetTree[int] = BudgetTree(0)
        self.budgets: list[Budget[int]] = [self.fast.root]
        self.log: list[tuple[int, str]] = []
        self.waiters: dict[str, Named] = {}
        self.serial = 0
        for parent in (0, 1, 1, 0, 4):
            self.add_cgroup(parent)
        self.limit(1, 2, 10 * MS)

    def limit(self, at: int, quota: int, period: int) -> None:
        self.fast.set_limit(self.budgets[at], quota, period, self.slow.now)
        self.slow.set_limit(self.slow.all[at], quota, period)

    def add_cgroup(self, parent: int) -> None:
        self.slow.add(self.slow.all[parent])
        self.budgets.append(self.fast.add(self.budgets[parent], len(self.budgets)))

    def pick(self, index: int) -> int:
        return index % len(self.budgets)

    def pick_waiting(self, index: int) -> Named | None:
        waiting = [w for w in self.waiters.values() if self.fast.is_waiting(w)]
        return waiting[index % len(waiting)] if waiting else None

    @precondition(lambda self: len(self.budgets) < 12)
    @rule(parent=st.integers(0, 50))
    def mkdir(self, parent):
        self.add_cgroup(self.pick(parent))

    @rule(places=st.lists(st.integers(0, 50), min_size=1, max_size=8))
    def request(self, places):
        for at in map(self.pick, places):
            self.serial += 1
            waiter = Named(f"w{self.serial}", self.log)
            self.waiters[waiter.name] = waiter
            if self.budgets[at].request(waiter, self.slow.now) is None:
                waiter.admitted(self.slow.now)
            self.slow.request(self.slow.all[at], waiter.name)

    @rule(
        at=st.integers(1, 50),
        quota=st.sampled_from([0, 1, 1, 2, 3, 7]),
        period=st.sampled_from([1, 10, 1000, 1000]),
    )
    def set_limit(self, at, quota, period):
        self.limit(1 + at % (len(self.budgets) - 1), quota, period * MS)

    @rule(by=st.sampled_from([1, MS // 3, MS, 143 * MS]))
    def time_passes(self, by):
        now = self.slow.now + by
        self.slow.advance(now)
        self.fast.pump(now)

    @rule()
    def time_passes_to_the_next_deadline(self):
        due = self.slow.next()
        if due < NEVER:
            self.slow.advance(due)
            self.fast.pump(due)

    @rule(index=st.integers(0, 50))
    def cancel(self, index):
        if waiter := self.pick_waiting(index):
            assert self.fast.cancel(waiter, self.slow.now)
            self.slow.leave(waiter.name)

    @rule(index=st.integers(0, 50))
    def interrupt_and_ask_again(self, index):
        if waiter := self.pick_waiting(index):
            place = self.slow.place(waiter.name)
            assert place is not None
            assert self.fast.withdraw(waiter, self.slow.now)
            assert self.budgets[place.order].request(waiter, self.slow.now) is not None
            self.slow.leave(waiter.name)
            self.slow.request(place, waiter.name)

    @rule(index=st.integers(0, 50), to=st.integers(0, 50))
    def migrate(self, index, to):
        if waiter := self.pick_waiting(index):
            to = self.pick(to)
            place = self.slow.place(waiter.name)
            self.fast.move(waiter, self.budgets[to], self.slow.now)
            if place is not self.slow.all[to]:
                self.slow.leave(waiter.name)
                self.slow.request(self.slow.all[to], waiter.name)

    @invariant()
    def same_admissions_at_the_same_times_in_the_same_order(self):
        assert self.log == self.slow.log

    @invariant()
    def same_counts_and_queues(self):
        for fast, slow in zip(self.budgets, self.slow.all, strict=True):
            assert fast.nr_events == slow.admitted
            assert [w.name for w in fast.queue] == slow.queue
            below = sum(child.nr_waiting for child in fast.children)
            assert fast.nr_waiting == below + len(fast.queue)

    @invariant()
    def deadline_is_never_too_late(self):
        assert self.fast.next_ns <= self.slow.next()


BudgetAgainstSlowModel.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None
)
TestBudgetAgainstSlowModel = BudgetAgainstSlowModel.TestCase


@dataclass(eq=False)
class Saturating:
    """A vCPU that locks again as soon as it may."""

    at: Budget[str]
    log: list[tuple[int, str]]

    def start(self, now_ns: int) -> None:
        while self.at.request(self, now_ns) is None:
            self.log.append((now_ns, self.at.owner))

    def admitted(self, now_ns: int) -> None:
        self.log.append((now_ns, self.at.owner))
        self.start(now_ns)


limits = st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 100, 1000]).map(lambda p: p * MS))


@given(limit=limits, arrivals=st.lists(st.integers(0, 400 * MS), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_interval_admits_more_than_quota_plus_its_share(limit, arrivals):
    tree: BudgetTree[str] = BudgetTree("/")
    cgrp = tree.add(tree.root, "l")
    quota, period = limit
    tree.set_limit(cgrp, quota, period, 0)
    log: list[tuple[int, str]] = []
    for at in sorted(arrivals):
        lock = Named("l", log)
        if cgrp.request(lock, at) is None:
            lock.admitted(at)
    tree.pump(10**6 * S)

    times = [at for at, _ in log]
    assert len(times) == len(arrivals)
    for i, start in enumerate(times):
        for j in range(i, len(times)):
            assert j - i + 1 <= quota + (times[j] - start) * quota // period


@given(limit=limits, vcpus=st.lists(st.integers(1, 4), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_backlogged_siblings_never_differ_by_more_than_one_admission(limit, vcpus):
    # Property (a), and (d): what the children got is what the parent gave.
    tree: BudgetTree[str] = BudgetTree("/")
    parent = tree.add(tree.root, "p")
    children = [tree.add(parent, str(i)) for i in range(len(vcpus))]
    tree.set_limit(parent, *limit, 0)
    log: list[tuple[int, str]] = []
    for _ in range(limit[0]):
        parent.request(Named("burst", []), 0)
    for child, nr_vcpus in zip(children, vcpus, strict=True):
        for _ in range(nr_vcpus):
            Saturating(child, log).start(0)

    quota, period = limit
    tree.pump(40 * period // quota)

    counts = dict.fromkeys((child.owner for child in children), 0)
    for _, name in log:
        counts[name] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(log) >= 39
    assert sum(child.nr_events for child in children) == parent.nr_events - quota


@given(own=limits, arrivals=st.lists(st.integers(0, 3000 * MS), max_size=40))
@settings(max_examples=60, deadline=None)
def test_sibling_below_its_limit_is_not_delayed_by_another_siblings_limit(own, arrivals):
    # Property (b): with no common limit the backlog of one child is invisible to the other.
    tree: BudgetTree[str] = BudgetTree("/")
    parent = tree.add(tree.root, "p")
    blocked, free = tree.add(parent, "blocked"), tree.add(parent, "free")
    tree.set_limit(blocked, *own, 0)
    tree.set_limit(free, 1000, S, 0)
    Saturating(blocked, []).start(0)

    for at in sorted(arrivals):
        assert free.request(Named("f", []), at) is None


@given(low=limits, high=limits, nr_events=st.integers(1, 60), at=st.integers(0, 2 * S))
@settings(max_examples=60, deadline=None)
def test_new_limit_releases_what_it_has_room_for_at_once(low, high, nr_events, at):
    # Property (c).
    tree: BudgetTree[str] = BudgetTree("/")
    cgrp = tree.add(tree.root, "l")
    tree.set_limit(cgrp, *low, 0)
    log: list[tuple[int, str]] = []
    for _ in range(nr_events):
        lock = Named("l", log)
        if cgrp.request(lock, 0) is None:
            lock.admitted(0)
    tree.pump(at)
    before, waiting = len(log), cgrp.nr_waiting

    tree.set_limit(cgrp, *high, at)

    released = len(log) - before
    assert released == (0 if low == high else min(waiting, high[0]))
    assert all(time == at for time, _ in log[before:])
