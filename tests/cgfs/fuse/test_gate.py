from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cgfs.fuse.gate import Gate

QUIET = 100
GRACE = 5
A, B = 11, 12
LIMIT, LISTING = "misc.max", "cgroup.controllers"


class Clock:
    def __init__(self):
        self.now = 1000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def gate(clock):
    return Gate(clock, quiet_ns=QUIET, grace_ns=GRACE)


def watch(ticket):
    heard = []
    ticket.on_clear = lambda: heard.append("clear")
    return heard


def test_a_quiet_file_is_cached(gate):
    assert gate.open_reader(A, LIMIT)


def test_a_file_open_for_writing_is_direct(gate):
    gate.open_writer(A, LIMIT)
    assert not gate.open_reader(A, LIMIT)


def test_a_writer_concerns_no_other_file(gate):
    gate.open_writer(A, LIMIT)
    assert gate.open_reader(B, LIMIT)


def test_after_the_last_writer_the_file_stays_direct_for_the_quiet_time(gate, clock):
    gate.open_writer(A, LIMIT)
    gate.close_writer(A)
    clock.now += QUIET - 1
    before = gate.open_reader(A, LIMIT)
    clock.now += 1
    assert (before, gate.open_reader(A, LIMIT)) == (False, True)


def test_with_a_second_writer_the_quiet_time_has_not_begun(gate, clock):
    gate.open_writer(A, LIMIT)
    gate.open_writer(A, LIMIT)
    gate.close_writer(A)
    clock.now += 10 * QUIET
    assert not gate.open_reader(A, LIMIT)


def test_a_writer_without_cached_readers_waits_for_nobody(gate):
    assert gate.open_writer(A, LIMIT) is None


def test_a_writer_waits_for_every_cached_reader(gate, clock):
    gate.open_reader(A, LIMIT)
    gate.open_reader(A, LIMIT)
    ticket = gate.open_writer(A, LIMIT)
    heard = watch(ticket)
    gate.close_reader(A, LIMIT)
    before = list(heard)
    gate.close_reader(A, LIMIT)
    assert (before, heard, ticket.clear) == ([], ["clear"], True)
    assert ticket.deadline_ns == clock.now + GRACE


def test_readers_of_another_file_are_not_waited_for(gate):
    gate.open_reader(B, LIMIT)
    assert gate.open_writer(A, LIMIT) is None


def test_two_writers_wait_for_the_same_reader(gate):
    gate.open_reader(A, LIMIT)
    heard = watch(gate.open_writer(A, LIMIT))
    heard_too = watch(gate.open_writer(A, LIMIT))
    gate.close_reader(A, LIMIT)
    assert (heard, heard_too) == (["clear"], ["clear"])


def test_after_the_grace_a_reader_is_held_and_not_waited_for_again(gate):
    gate.open_reader(A, LIMIT)
    gate.expire(gate.open_writer(A, LIMIT))
    assert (gate.is_held(A), gate.open_writer(A, LIMIT)) == (True, None)


def test_a_held_file_is_direct_until_it_is_closed(gate, clock):
    gate.open_reader(A, LIMIT)
    gate.expire(gate.open_writer(A, LIMIT))
    gate.close_writer(A)
    clock.now += QUIET
    before = gate.open_reader(A, LIMIT)
    gate.close_reader(A, LIMIT)
    assert (before, gate.is_held(A), gate.open_reader(A, LIMIT)) == (False, False, True)


def test_the_end_of_one_writers_grace_frees_the_other(gate):
    gate.open_reader(A, LIMIT)
    first, second = gate.open_writer(A, LIMIT), gate.open_writer(A, LIMIT)
    heard = watch(second)
    gate.expire(first)
    assert (heard, second.clear) == (["clear"], True)


def test_a_change_of_a_row_waits_for_readers_of_all_its_files(gate):
    gate.open_reader(A, LISTING)
    gate.open_reader(B, LISTING)
    gate.open_reader(A + 10, LIMIT)
    ticket = gate.begin_change([LISTING])
    heard = watch(ticket)
    gate.close_reader(A, LISTING)
    before = list(heard)
    gate.close_reader(B, LISTING)
    assert (before, heard) == ([], ["clear"])


def test_a_row_under_change_is_direct_and_stays_so_for_the_quiet_time(gate, clock):
    gate.begin_change([LISTING])
    during = gate.open_reader(A, LISTING)
    gate.end_change([LISTING])
    after = gate.open_reader(A, LISTING)
    clock.now += QUIET
    assert (during, after, gate.open_reader(A, LISTING)) == (False, False, True)


def test_two_changes_of_a_row_end_with_the_second(gate, clock):
    gate.begin_change([LISTING])
    gate.begin_change([LISTING])
    gate.end_change([LISTING])
    clock.now += QUIET
    assert not gate.open_reader(A, LISTING)


def test_a_touched_file_is_direct_for_the_quiet_time(gate, clock):
    gate.touch(A)
    before = gate.open_reader(A, LIMIT)
    clock.now += QUIET
    assert (before, gate.open_reader(A, LIMIT)) == (False, True)


def test_a_reader_nobody_knows_may_close(gate):
    gate.close_reader(A, LIMIT)
    assert not gate.has_readers_at_all


def test_many_changed_files_leave_nothing_behind(gate, clock):
    for ino in range(10_000):
        gate.touch(ino)
        clock.now += 1
    assert len(gate._hot_until) <= 4096


class GateMachine(RuleBasedStateMachine):
    """No text changes while a reader that is not held reads it from the page cache."""

    inodes = st.integers(1, 3)

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.gate = Gate(self.clock, quiet_ns=QUIET, grace_ns=GRACE)
        self.readers = []
        self.parked = []
        self.writers = []
        self.changing = []

    def row(self, ino):
        return LIMIT if ino < 3 else LISTING

    @rule(ino=inodes)
    def open_reader(self, ino):
        if self.gate.open_reader(ino, self.row(ino)):
            assert ino not in self.writers
            assert self.row(ino) not in self.changing
            self.readers.append(ino)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_reader(self, data):
        ino = data.draw(st.sampled_from(self.readers))
        self.readers.remove(ino)
        self.gate.close_reader(ino, self.row(ino))

    @rule(ino=inodes)
    def open_writer(self, ino):
        ticket = self.gate.open_writer(ino, self.row(ino))
        if ticket is None:
            self.writers.append(ino)
        else:
            self.parked.append((ticket, ino))

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def unpark(self, data):
        ticket, ino = data.draw(st.sampled_from(self.parked))
        if not ticket.clear:
            self.gate.expire(ticket)
        self.parked.remove((ticket, ino))
        self.writers.append(ino)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def close_writer(self, data):
        ino = data.draw(st.sampled_from(self.writers))
        self.writers.remove(ino)
        self.gate.close_writer(ino)

    @rule()
    def change_listing(self):
        ticket = self.gate.begin_change([LISTING])
        if ticket is not None:
            self.gate.expire(ticket)
        self.changing.append(LISTING)

    @precondition(lambda self: self.changing)
    @rule()
    def end_change(self):
        self.gate.end_change([self.changing.pop()])

    @rule(ns=st.integers(1, 2 * QUIET))
    def wait(self, ns):
        self.clock.now += ns

    @invariant()
    def writers_meet_no_cached_reader_but_held_ones(self):
        for ino in self.readers:
            free = ino in self.writers or self.row(ino) in self.changing
            assert not free or self.gate.is_held(ino)

    def teardown(self):
        for ino in self.readers:
            self.gate.close_reader(ino, self.row(ino))
        assert not self.gate.has_readers_at_all
        assert not self.gate._held
        assert not self.gate._tickets


GateMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGateMachine = GateMachine.TestCase
