from errno import EBUSY, ENOTTY

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmsim.errors import KvmError
from kvmsim.sev.asid import AsidPool


def take(pool, count, *, es):
    return [pool.take(es=es) for _ in range(count)]


def errno_of(pool, *, es):
    with pytest.raises(KvmError) as error:
        pool.take(es=es)
    return error.value.errno


def test_t_d_1_freed_asid_comes_back_only_after_the_class_is_used_up_and_flushed():
    pool = AsidPool(6, 6)
    a, _b = take(pool, 2, es=True)
    pool.free(a)
    assert take(pool, 3, es=True) == [3, 4, 5]
    assert pool.flushes == 0
    assert pool.take(es=True) == 1
    assert pool.flushes == 1


def test_t_d_2_sev_class_wraps_by_flush_after_a_destroy():
    pool = AsidPool(3, 4)
    a, _b = take(pool, 2, es=False)
    assert (a, _b) == (3, 4)
    assert errno_of(pool, es=False) == EBUSY
    assert pool.flushes == 0
    pool.free(a)
    assert pool.take(es=False) == 3
    assert pool.flushes == 1


def test_t_d_3_empty_class_is_enotty():
    pool = AsidPool(5, 4)
    with pytest.raises(KvmError) as error:
        pool.check_range(es=False)
    assert error.value.errno == ENOTTY
    pool.check_range(es=True)
    assert take(pool, 4, es=True) == [1, 2, 3, 4]


def test_t_d_4_failed_flush_is_ebusy_and_changes_nothing():
    pool = AsidPool(1, 1, flush_fails=True)
    pool.free(pool.take(es=False))
    assert errno_of(pool, es=False) == EBUSY
    pool.flush_fails = False
    assert pool.take(es=False) == 1


def test_t_d_5_one_flush_returns_both_classes_lowest_first():
    pool = AsidPool(3, 4)
    for asid in take(pool, 2, es=True) + take(pool, 1, es=False):
        pool.free(asid)
    assert take(pool, 2, es=True) == [1, 2]
    assert pool.flushes == 1
    assert take(pool, 2, es=False) == [3, 4]
    assert pool.flushes == 1


def test_nothing_to_reclaim_in_the_class_means_no_flush():
    pool = AsidPool(2, 3)
    pool.free(pool.take(es=True))
    take(pool, 2, es=False)
    assert errno_of(pool, es=False) == EBUSY
    assert pool.flushes == 0


def test_asid_zero_is_never_handed_out_by_a_machine_without_sev():
    pool = AsidPool(0, 0)
    assert errno_of(pool, es=False) == EBUSY
    assert errno_of(pool, es=True) == EBUSY


@pytest.mark.parametrize("asid", [2, 0])
def test_freeing_what_nobody_holds_is_a_loud_bug(asid):
    pool = AsidPool(1, 2)
    pool.take(es=False)
    with pytest.raises(ValueError, match="not held"):
        pool.free(asid)


def test_freeing_twice_is_a_loud_bug():
    pool = AsidPool(1, 2)
    asid = pool.take(es=False)
    pool.free(asid)
    with pytest.raises(ValueError, match="not held"):
        pool.free(asid)


def test_statistics_count_holders_by_class():
    pool = AsidPool(3, 6)
    take(pool, 2, es=False)
    pool.free(pool.take(es=True))
    got = pool.statistics()
    assert (got.sev, got.sev_es, got.reclaimable, got.flushes) == (2, 0, 1, 0)


class PoolAgainstList(RuleBasedStateMachine):
    """The pool against an allocator written with a list of states, one per ASID."""

    @initialize(top=st.integers(1, 9), data=st.data())
    def boot(self, top, data):
        self.low = data.draw(st.integers(1, top + 1))
        self.pool = AsidPool(self.low, top)
        self.states = ["host"] + ["free"] * top
        self.holders = []

    def members(self, es):
        return range(1, self.low) if es else range(self.low, len(self.states))

    def expected(self, es):
        members = self.members(es)
        if "free" not in [self.states[a] for a in members]:
            if "dirty" not in [self.states[a] for a in members]:
                return None
            self.states = ["free" if state == "dirty" else state for state in self.states]
        return next(a for a in members if self.states[a] == "free")

    @rule(es=st.booleans())
    def take_one(self, es):
        expected = self.expected(es)
        try:
            got = self.pool.take(es=es)
        except KvmError as error:
            assert error.errno == EBUSY
            got = None
        assert got == expected
        if got is not None:
            self.states[got] = "held"
            self.holders.append(got)

    @precondition(lambda self: getattr(self, "holders", None))
    @rule(data=st.data())
    def free_one(self, data):
        asid = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(asid)
        self.states[asid] = "dirty"

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "pool"):
            return
        got = self.pool.statistics()
        assert got.sev_es == sum(self.states[a] == "held" for a in self.members(es=True))
        assert got.sev == sum(self.states[a] == "held" for a in self.members(es=False))
        assert got.reclaimable == self.states.count("dirty")


TestPoolAgainstList = PoolAgainstList.TestCase
TestPoolAgainstList.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
