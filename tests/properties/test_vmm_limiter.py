"""What kvm.md C.1.1 promises of QEMU's limiter for any speed and any arrivals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmsim.vmm.ratelimit import SLICE_NS, RateLimit

speeds = st.integers(1, 10_000)


@given(speed=speeds)
def test_fresh_slice_lets_all_but_the_last_of_its_quota_pass(speed):
    limit = RateLimit(speed)

    free = [limit.calculate(1, 1) for _ in range(speed)]

    assert free == [0] * (speed - 1) + [SLICE_NS]


@given(speed=st.integers(1, 200), nr_callers=st.integers(1, 300))
def test_caller_k_of_a_slice_is_pushed_to_k_shares_after_its_start(speed, nr_callers):
    limit = RateLimit(speed)

    delays = [limit.calculate(1, 7) for _ in range(nr_callers)]

    for k, delay in enumerate(delays, 1):
        assert delay == (0 if k < speed else int(k / speed * SLICE_NS))


@given(speed=st.integers(1, 50), steps=st.lists(st.integers(0, 3 * 10**8), max_size=100))
def test_one_sleeping_vcpu_never_exceeds_its_speed_in_any_second(speed, steps):
    limit = RateLimit(speed)
    now, times = 1, []
    for work in steps:
        now += work
        times.append(now)
        now += limit.calculate(1, now)

    for i, start in enumerate(times):
        within = [t for t in times[i:] if t < start + SLICE_NS]
        assert len(within) <= 2 * speed


@given(
    speed=st.integers(0, 50),
    calls=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 10**9)), max_size=60),
)
def test_delay_is_never_negative(speed, calls):
    limit = RateLimit(speed)
    now = 1
    for nr_events, step in calls:
        now += step
        assert limit.calculate(nr_events, now) >= 0
