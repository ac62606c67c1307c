"""The paced token bucket of kvm.md C.4: vectors, waiting, fairness, and what moves a waiter."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cgfs.core.budget import NEVER, Budget, BudgetTree

S = 1_000_000_000
MS = 1_000_000


@dataclass(eq=False)
class Lock:
    """One bus lock that keeps the times at which it was admitted."""

    log: list[tuple[int, str]]
    name: str = "w"
    times: list[int] = field(default_factory=list)

    def admitted(self, now_ns: int) -> None:
        self.times.append(now_ns)
        self.log.append((now_ns, self.name))


class Bench:
    def __init__(self) -> None:
        self.tree: BudgetTree[str] = BudgetTree("/")
        self.log: list[tuple[int, str]] = []

    def add(self, name: str, parent: Budget[str] | None = None) -> Budget[str]:
        return self.tree.add(parent or self.tree.root, name)

    def ask(self, budget: Budget[str], name: str, now_ns: int) -> Lock:
        lock = Lock(self.log, name)
        if budget.request(lock, now_ns) is None:
            lock.admitted(now_ns)
        return lock


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("quota", "nr_events", "expected"),
    [
        (10, 15, [0] * 10 + [100 * MS, 200 * MS, 300 * MS, 400 * MS, 500 * MS]),
        (3, 8, [0, 0, 0, 333333334, 666666667, 1000000000, 1333333334, 1666666667]),
        (7, 12, [0] * 7 + [142857143, 285714286, 428571429, 571428572, 714285715]),
    ],
)
def test_burst_from_idle_is_followed_by_paced_admissions(bench, quota, nr_events, expected):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, quota, S, 5 * S)

    for i in range(nr_events):
        bench.ask(cgrp, str(i), 5 * S)
    bench.tree.pump(10 * S)

    assert bench.log == [(5 * S + at, str(i)) for i, at in enumerate(expected)]


def test_pump_in_one_late_call_admits_at_the_same_times_as_punctual_calls(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 7, S, 0)
    for i in range(30):
        bench.ask(cgrp, str(i), 0)

    nexts = []
    while bench.tree.next_ns < NEVER:
        nexts.append(bench.tree.next_ns)
        bench.tree.pump(bench.tree.next_ns)

    assert nexts == [at for at, _ in bench.log[7:]]


def test_unlimited_cgroup_never_waits_and_counts_at_every_ancestor(bench):
    a = bench.add("a")
    b = bench.add("b", a)

    locks = [bench.ask(b, "x", 1) for _ in range(1000)]

    assert all(lock.times == [1] for lock in locks)
    assert (b.nr_events, a.nr_events, bench.tree.root.nr_events) == (1000, 1000, 1000)
    assert not b.limited


def test_idle_credit_stops_growing_at_one_quota(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 2, S, 0)

    taken = [bench.ask(cgrp, "x", 100 * S).times for _ in range(3)]

    assert taken == [[100 * S], [100 * S], []]


def test_refusal_names_the_nearest_budget_that_could_not_pay(bench):
    top = bench.add("top")
    leaf = bench.add("leaf", top)
    bench.tree.set_limit(top, 1, S, 0)
    bench.tree.set_limit(leaf, 5, S, 0)
    first, second, third = (Lock([]) for _ in range(3))

    assert leaf.request(first, 0) is None
    assert leaf.request(second, 0) is top
    bench.tree.set_limit(leaf, 1, S, 0)
    bench.tree.set_limit(top, 9, S, 0)  # lets second in, which empties leaf
    assert leaf.request(third, 0) is leaf


def test_refused_event_takes_nothing_from_any_ancestor(bench):
    top = bench.add("top")
    leaf = bench.add("leaf", top)
    bench.tree.set_limit(top, 5, S, 0)
    bench.tree.set_limit(leaf, 1, S, 0)

    bench.ask(leaf, "x", 0)
    bench.ask(leaf, "y", 0)

    assert top.credit(0) == 4 * S


def test_noisy_sibling_gets_no_more_turns_than_quiet_one(bench):
    # C.4 Fairness: parent at 4/s, A with three vCPUs that always lock, B with one.
    parent = bench.add("p")
    a, b = bench.add("A", parent), bench.add("B", parent)
    bench.tree.set_limit(parent, 4, S, 0)

    class Vcpu:
        def __init__(self, name: str, at: Budget[str]) -> None:
            self.name, self.at = name, at

        def admitted(self, now_ns: int) -> None:
            bench.log.append((now_ns, self.name))
            self.lock(now_ns)

        def lock(self, now_ns: int) -> None:
            while self.at.request(self, now_ns) is None:
                bench.log.append((now_ns, self.name))

    vcpus = [Vcpu("a1", a), Vcpu("a2", a), Vcpu("a3", a), Vcpu("b1", b)]
    for vcpu in vcpus:
        for _ in range(1):  # one free lock each: the burst
            assert vcpu.at.request(vcpu, 0) is None
    for vcpu in vcpus:
        vcpu.lock(0)
    bench.tree.pump(4 * S)

    assert bench.log == [
        (250 * MS * (i + 1), name)
        for i, name in enumerate(["a1", "b1", "a2", "b1", "a3", "b1"] * 3)
        if i < 16
    ]


def test_tie_between_siblings_goes_to_the_one_created_first(bench):
    parent = bench.add("p")
    first, second = bench.add("first", parent), bench.add("second", parent)
    bench.tree.set_limit(parent, 1, S, 0)
    bench.ask(parent, "burst", 0)

    bench.ask(second, "second", 0)
    bench.ask(first, "first", 0)
    bench.tree.pump(2 * S)

    assert bench.log == [(0, "burst"), (S, "first"), (2 * S, "second")]


def test_turn_counts_admissions_that_came_after_a_cancelled_wait(bench):
    parent = bench.add("p")
    a, b = bench.add("a", parent), bench.add("b", parent)
    bench.tree.set_limit(parent, 2, S, 0)
    for name in ("burst", "burst"):
        bench.ask(parent, name, 0)
    gone = bench.ask(a, "gone", 0)
    other = bench.ask(b, "other", 0)
    bench.tree.pump(S // 2)
    bench.tree.cancel(other, S // 2)
    assert gone.times == [S // 2]
    cancelled = bench.ask(a, "cancelled", S // 2)
    bench.ask(b, "b waits first", S // 2)
    bench.tree.pump(S)
    bench.tree.cancel(cancelled, S)
    bench.ask(b, "b passes", 3 * S)
    bench.ask(a, "a passes", 3 * S)

    bench.ask(a, "a", 3 * S)
    bench.ask(b, "b", 3 * S)
    bench.tree.pump(4 * S)

    assert [name for _, name in bench.log[-2:]] == ["b", "a"]


def test_own_queue_of_an_inner_cgroup_takes_turns_with_its_children(bench):
    parent = bench.add("p")
    child = bench.add("c", parent)
    bench.tree.set_limit(parent, 1, S, 0)
    bench.ask(parent, "burst", 0)
    for _ in range(2):
        bench.ask(parent, "own", 0)
        bench.ask(child, "child", 0)

    bench.tree.pump(4 * S)

    assert [name for _, name in bench.log] == ["burst", "child", "own", "child", "own"]


def test_child_at_its_own_limit_does_not_hold_up_a_sibling(bench):
    parent = bench.add("p")
    slow, fast = bench.add("slow", parent), bench.add("fast", parent)
    bench.tree.set_limit(parent, 10, S, 0)
    bench.tree.set_limit(slow, 1, S, 0)
    for _ in range(3):
        bench.ask(slow, "slow", 0)
    for _ in range(10):
        bench.ask(fast, "fast", 0)

    bench.tree.pump(S)

    assert bench.log == [(0, "slow")] + [(0, "fast")] * 9 + [(100 * MS, "fast"), (S, "slow")]


def test_newcomer_that_is_admissible_passes_while_its_sibling_waits(bench):
    parent = bench.add("p")
    slow, fast = bench.add("slow", parent), bench.add("fast", parent)
    bench.tree.set_limit(parent, 10, S, 0)
    bench.tree.set_limit(slow, 1, S, 0)
    bench.ask(slow, "slow", 0)
    bench.ask(slow, "slow", 0)

    assert bench.ask(fast, "fast", 5).times == [5]


def test_waiter_that_is_due_goes_before_a_newcomer(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    bench.ask(cgrp, "burst", 0)
    waiting = bench.ask(cgrp, "waiting", 1)

    newcomer = bench.ask(cgrp, "newcomer", S)

    assert (waiting.times, newcomer.times) == ([S], [])


def test_raising_a_limit_releases_waiters_at_once(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    locks = [bench.ask(cgrp, "x", 0) for _ in range(4)]

    bench.tree.set_limit(cgrp, 2, S, 7)

    assert [lock.times for lock in locks] == [[0], [7], [7], []]
    assert bench.tree.next_ns == 7 + S // 2


def test_lifting_a_limit_releases_every_waiter_below(bench):
    top = bench.add("top")
    leaves = [bench.add(str(i), top) for i in range(3)]
    bench.tree.set_limit(top, 1, S, 0)
    locks = [bench.ask(leaf, "x", 0) for leaf in leaves for _ in range(2)]

    bench.tree.set_limit(top, 0, S, 9)

    assert [lock.times for lock in locks] == [[0]] + [[9]] * 5
    assert bench.tree.next_ns == NEVER


def test_limit_on_ancestor_binds_members_that_joined_before(bench):
    top = bench.add("top")
    leaf = bench.add("leaf", bench.add("mid", top))

    bench.tree.set_limit(top, 1, S, 0)

    assert [bench.ask(leaf, "x", 0).times for _ in range(2)] == [[0], []]
    assert leaf.limited


def test_writing_the_limit_in_force_buys_no_burst(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 3, S, 0)
    for _ in range(3):
        bench.ask(cgrp, "x", 0)

    bench.tree.set_limit(cgrp, 3, S, 1)

    assert bench.ask(cgrp, "x", 1).times == []


def test_root_refuses_a_limit(bench):
    with pytest.raises(ValueError, match="root"):
        bench.tree.set_limit(bench.tree.root, 1, S, 0)


def test_cancelled_waiter_leaves_its_turn_to_the_next(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    _, gone, stays = (bench.ask(cgrp, str(i), 0) for i in range(3))

    assert bench.tree.cancel(gone, 300 * MS)
    bench.tree.pump(S)

    assert (gone.times, stays.times) == ([], [S])
    assert (cgrp.nr_cancelled, bench.tree.root.nr_cancelled) == (1, 1)
    assert (cgrp.nr_events, cgrp.nr_throttled) == (2, 2)
    assert cgrp.throttled_ns == 300 * MS + S


def test_cancel_of_last_waiter_leaves_nothing_to_wake_for(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    lock = [bench.ask(cgrp, "x", 0) for _ in range(2)][1]

    bench.tree.cancel(lock, 1)

    assert bench.tree.next_ns == NEVER
    assert not bench.tree.cancel(lock, 2)


def test_waiter_after_all_cancelled_is_still_served(bench):
    top = bench.add("top")
    leaf = bench.add("leaf", top)
    bench.tree.set_limit(top, 1, S, 0)
    bench.ask(leaf, "burst", 0)
    gone = bench.ask(leaf, "gone", 0)
    bench.tree.cancel(gone, 1)

    bench.ask(leaf, "next", 2)
    bench.tree.pump(S)

    assert bench.log[-1] == (S, "next")


def test_withdrawn_event_stays_owed_and_queues_at_the_tail(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    bench.ask(cgrp, "burst", 0)
    interrupted = bench.ask(cgrp, "interrupted", 0)
    other = bench.ask(cgrp, "other", 0)

    assert bench.tree.withdraw(interrupted, 10)
    assert cgrp.request(interrupted, 20) is cgrp
    bench.tree.pump(2 * S)

    assert (other.times, interrupted.times) == ([S], [2 * S])
    assert (cgrp.nr_throttled, cgrp.nr_cancelled) == (2, 0)


def test_withdrawn_waiter_is_not_admitted_while_it_is_away(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    bench.ask(cgrp, "burst", 0)
    lock = bench.ask(cgrp, "x", 0)

    bench.tree.withdraw(lock, 10)
    bench.tree.pump(5 * S)

    assert lock.times == []
    assert cgrp.request(lock, 5 * S) is None
    assert not bench.tree.owed


def test_cancel_of_owed_event_counts_it(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    lock = [bench.ask(cgrp, "x", 0) for _ in range(2)][1]
    bench.tree.withdraw(lock, 10)

    assert bench.tree.cancel(lock, 20)

    assert (cgrp.nr_cancelled, cgrp.nr_events, bench.tree.owed) == (1, 1, {})


def test_withdraw_after_admission_says_so(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    lock = [bench.ask(cgrp, "x", 0) for _ in range(2)][1]

    assert not bench.tree.withdraw(lock, S)

    assert lock.times == [S]


def test_move_to_unlimited_cgroup_admits_at_once(bench):
    here, there = bench.add("here"), bench.add("there")
    bench.tree.set_limit(here, 1, S, 0)
    lock = [bench.ask(here, "x", 0) for _ in range(2)][1]

    bench.tree.move(lock, there, 40)

    assert lock.times == [40]
    assert (here.nr_events, there.nr_events, here.throttled_ns) == (1, 1, 40)


def test_move_to_full_cgroup_queues_at_its_tail(bench):
    here, there = bench.add("here"), bench.add("there")
    for cgrp in (here, there):
        bench.tree.set_limit(cgrp, 1, S, 0)
    mover = [bench.ask(here, "x", 0) for _ in range(2)][1]
    local = [bench.ask(there, "x", 0) for _ in range(2)][1]

    bench.tree.move(mover, there, 40)
    bench.tree.pump(2 * S)

    assert (local.times, mover.times) == ([S], [2 * S])
    assert (here.nr_throttled, there.nr_throttled, bench.tree.root.nr_throttled) == (1, 1, 2)


def test_move_within_the_same_cgroup_keeps_the_place(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    _, first, second = (bench.ask(cgrp, str(i), 0) for i in range(3))

    bench.tree.move(first, cgrp, 5)
    bench.tree.pump(2 * S)

    assert (first.times, second.times) == ([S], [2 * S])


def test_removed_cgroup_hands_its_waiters_to_its_parent(bench):
    parent = bench.add("p")
    child = bench.add("c", parent)
    bench.tree.set_limit(parent, 1, S, 0)
    bench.ask(parent, "burst", 0)
    locks = [bench.ask(child, "x", 0) for _ in range(2)]
    owing = bench.ask(child, "owing", 0)
    bench.tree.withdraw(owing, 0)

    bench.tree.remove(child, 10)
    bench.tree.pump(2 * S)

    assert [lock.times for lock in locks] == [[S], [2 * S]]
    assert bench.tree.owed == {owing: parent}


def test_removing_an_inner_budget_is_refused(bench):
    parent = bench.add("p")
    bench.add("c", parent)

    with pytest.raises(ValueError, match="leaf"):
        bench.tree.remove(parent, 0)


def test_second_event_of_a_waiter_that_waits_is_a_bug(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    lock = [bench.ask(cgrp, "x", 0) for _ in range(2)][1]

    with pytest.raises(ValueError, match="one event"):
        cgrp.request(lock, 1)


def test_earlier_deadline_is_announced_and_later_one_is_not(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 1, S, 0)
    calls = []
    bench.tree.on_ready = lambda: calls.append(bench.tree.next_ns)

    for _ in range(3):
        bench.ask(cgrp, "x", 0)
    bench.tree.set_limit(cgrp, 4, 2 * S, 0)

    assert calls == [S]


def test_waiter_may_ask_again_from_inside_its_admission(bench):
    cgrp = bench.add("l")
    bench.tree.set_limit(cgrp, 2, S, 0)
    times = []

    class Again:
        def admitted(self, now_ns: int) -> None:
            times.append(now_ns)
            if len(times) < 5:
                assert cgrp.request(self, now_ns) is cgrp

    for _ in range(2):
        bench.ask(cgrp, "burst", 0)
    cgrp.request(Again(), 0)
    bench.tree.pump(10 * S)

    assert times == [S // 2, S, 3 * S // 2, 2 * S, 5 * S // 2]
