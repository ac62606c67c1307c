from __future__ import annotations

import pytest

from kvmsim.vmm.timeline import Scheduled, Timeline


class Item(Scheduled):
    """Keeps when it was stepped; may do something then."""

    def __init__(self, name: str, log: list[tuple[int, str]], then=None) -> None:
        super().__init__()
        self.name, self.log, self.then = name, log, then

    def step(self, now_ns: int) -> None:
        self.log.append((now_ns, self.name))
        if self.then is not None:
            self.then(self, now_ns)


@pytest.fixture
def log() -> list[tuple[int, str]]:
    return []


@pytest.fixture
def timeline() -> Timeline:
    return Timeline(bus_lock_stall_ns=3, now_ns=0)


def test_events_happen_at_their_own_time_in_one_late_call(timeline, log):
    timeline.run_for(Item("a", log), 30)
    timeline.sleep_until(Item("b", log), 10)

    assert timeline.advance(100)

    assert log == [(10, "b"), (30, "a")]
    assert timeline.now_ns == 100


def test_event_beyond_the_limit_waits(timeline, log):
    timeline.run_for(Item("a", log), 30)

    timeline.advance(29)

    assert log == []
    assert timeline.next_due_ns() == 30


def test_first_scheduled_goes_first_at_one_instant_whatever_the_heap(timeline, log):
    for name in "abcd":
        item = Item(name, log)
        if name in "bd":
            timeline.run_for(item, 10)
        else:
            timeline.sleep_until(item, 10)

    timeline.advance(10)

    assert [name for _, name in log] == ["a", "b", "c", "d"]


def test_bus_lock_delays_every_guest_and_no_sleeper(timeline, log):
    timeline.run_for(Item("locker", log, lambda _, now: timeline.bus_lock(None, now)), 10)
    timeline.run_for(Item("guest", log), 20)
    timeline.sleep_until(Item("sleeper", log), 20)

    timeline.advance(100)

    assert log == [(10, "locker"), (20, "sleeper"), (23, "guest")]
    assert (timeline.stalled_ns, timeline.nr_bus_locks) == (3, 1)


def test_bus_locks_at_one_instant_are_taken_one_after_the_other(timeline, log):
    for name in "ab":
        timeline.run_for(Item(name, log, lambda _, now: timeline.bus_lock(None, now)), 10)
    timeline.run_for(Item("guest", log), 10)

    timeline.advance(100)

    assert log == [(10, "a"), (13, "b"), (16, "guest")]


def test_guest_entered_during_a_stall_starts_when_it_is_over(timeline, log):
    timeline.run_for(Item("locker", log, lambda _, now: timeline.bus_lock(None, now)), 10)
    late = Item("late", log)
    timeline.sleep_until(Item("waker", log, lambda *_: timeline.run_for(late, 5)), 11)

    timeline.advance(100)

    assert log[-1] == (18, "late")


def test_progress_stands_still_during_a_stall(timeline, log):
    timeline.run_for(Item("locker", log, lambda _, now: timeline.bus_lock(None, now)), 10)

    seen = []
    for now in (9, 10, 12, 13, 14):
        timeline.advance(now)
        seen.append(timeline.progress_ns())

    assert seen == [9, 10, 10, 10, 11]


def test_dropped_item_does_not_happen_and_moves_no_time(timeline, log):
    item = Item("a", log)
    timeline.run_for(item, 10)
    timeline.drop(item)

    assert timeline.next_due_ns() is None
    timeline.advance(20)
    assert log == []


def test_dropped_items_do_not_pile_up(timeline, log):
    kept = Item("kept", log)
    timeline.run_for(kept, 50)
    for _ in range(10_000):
        item = Item("gone", log)
        timeline.run_for(item, 10)
        timeline.drop(item)

    assert len(timeline._running) < 2_000
    timeline.advance(100)
    assert log == [(50, "kept")]


def test_item_has_one_place_the_last_it_took(timeline, log):
    item = Item("a", log)
    timeline.run_for(item, 10)
    timeline.sleep_until(item, 30)

    timeline.advance(100)

    assert log == [(30, "a")]


def test_step_limit_stops_early_and_the_rest_follows(timeline, log):
    for due in (1, 2, 3):
        timeline.sleep_until(Item(str(due), log), due)

    assert not timeline.advance(10, max_steps=2)
    assert (timeline.now_ns, len(log)) == (2, 2)
    assert timeline.advance(10, max_steps=2)
    assert len(log) == 3


def test_time_does_not_go_back(timeline):
    timeline.advance(10)
    timeline.advance(5)

    assert timeline.now_ns == 10


def test_earlier_deadline_set_from_outside_is_announced(timeline, log):
    calls = []
    timeline.on_earlier = lambda: calls.append(timeline.next_due_ns())

    timeline.sleep_until(Item("a", log), 50)
    timeline.sleep_until(Item("b", log), 60)
    timeline.run_for(Item("c", log), 20)

    assert calls == [50, 20]


class Limiter:
    """Admits one waiter at each of some times."""

    def __init__(self, times, log) -> None:
        self.times, self.log = list(times), log
        self.on_ready = None

    def pump(self, now_ns: int) -> None:
        while self.times and self.times[0] <= now_ns:
            self.log.append((self.times.pop(0), "limiter"))

    def next_ready_ns(self) -> int | None:
        return self.times[0] if self.times else None


def test_limiter_goes_before_what_else_is_due(log):
    timeline = Timeline(Limiter([10, 25], log), now_ns=0)
    timeline.sleep_until(Item("a", log), 10)
    timeline.run_for(Item("b", log), 20)

    assert timeline.next_due_ns() == 10
    timeline.advance(100)

    assert log == [(10, "limiter"), (10, "a"), (20, "b"), (25, "limiter")]


def test_limiter_deadline_that_came_earlier_is_seen(log):
    limiter = Limiter([], log)
    timeline = Timeline(limiter, now_ns=0)
    calls = []
    timeline.on_earlier = lambda: calls.append(1)

    limiter.times = [40]
    limiter.on_ready()
    timeline.advance(100)

    assert (log, calls) == ([(40, "limiter")], [1])
