from __future__ import annotations

from cgfs.fuse.event_rate import EventRate

MS = 1_000_000


def test_the_first_event_is_told_at_once():
    assert EventRate().event(1, 0)


def test_events_within_ten_milliseconds_are_one_at_their_end():
    rate = EventRate()
    rate.event(1, 0)
    later = [rate.event(1, n * MS) for n in (1, 5, 9)]
    early = rate.due(9 * MS)
    assert (later, early, rate.due(10 * MS)) == ([False] * 3, [], [1])


def test_a_merged_event_begins_ten_milliseconds_of_its_own():
    rate = EventRate()
    rate.event(1, 0)
    rate.event(1, 1 * MS)
    rate.due(10 * MS)
    assert (rate.event(1, 11 * MS), rate.due(19 * MS), rate.due(20 * MS)) == (False, [], [1])


def test_without_further_events_nothing_is_due():
    rate = EventRate()
    rate.event(1, 0)
    assert (rate.due(10 * MS), rate.next_due_ns()) == ([], None)


def test_after_a_quiet_interval_an_event_is_told_at_once():
    rate = EventRate()
    rate.event(1, 0)
    rate.due(10 * MS)
    assert rate.event(1, 11 * MS)


def test_files_do_not_wait_for_each_other():
    rate = EventRate()
    assert [rate.event(1, 0), rate.event(2, 1 * MS)] == [True, True]


def test_next_due_is_the_end_of_the_oldest_interval():
    rate = EventRate()
    rate.event(1, 0)
    rate.event(2, 3 * MS)
    assert rate.next_due_ns() == 10 * MS
