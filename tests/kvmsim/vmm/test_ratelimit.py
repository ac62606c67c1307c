from __future__ import annotations

import pytest

from kvmsim.vmm.ratelimit import RateLimit

S = 1_000_000_000
MS = 1_000_000


def delays(limit: RateLimit, calls: list[tuple[int, int]]) -> list[int]:
    return [limit.calculate(nr_events, now_ns) for nr_events, now_ns in calls]


@pytest.mark.parametrize(
    ("speed", "calls", "expected"),
    [
        pytest.param(0, [(1, 1), (7, 2), (100, 3)], [0, 0, 0], id="Q1"),
        pytest.param(10, [(1, 1)] * 25, [0] * 9 + [k * 10**8 for k in range(10, 26)], id="Q2"),
        pytest.param(
            3,
            [(1, 1)] * 8,
            [0, 0, 1000000000, 1333333333, 1666666666, 2000000000, 2333333333, 2666666666],
            id="Q3",
        ),
        pytest.param(1, [(1, 1)] * 4, [S, 2 * S, 3 * S, 4 * S], id="Q4"),
        pytest.param(5, [(1, S + i * 100 * MS) for i in range(5)], [0, 0, 0, 0, 600 * MS], id="Q5"),
        pytest.param(10, [(25, 1), (1, 1)], [2500000000, 2600000000], id="Q6"),
        pytest.param(2, [(1, 1), (1, 1), (1, S + 1)], [0, S, 500000000], id="Q7"),
        pytest.param(2, [(1, 1), (1, 1), (1, S + 2)], [0, S, 0], id="Q8"),
    ],
)
def test_vector(speed, calls, expected):
    assert delays(RateLimit(speed), calls) == expected


def test_call_just_after_the_end_begins_a_new_slice():
    limit = RateLimit(2)
    delays(limit, [(1, 1), (1, 1), (1, S + 2)])

    assert (limit.dispatched, limit.start_ns) == (1, S + 2)


@pytest.mark.parametrize(
    ("speed", "slice_ns", "quota"),
    [(0, S, 0), (1, S, 1), (1, S // 2, 1), (3, S // 2, 1), (10, S // 4, 2), (2**64 - 1, S, 2**64)],
)
def test_quota_is_the_share_of_a_slice_and_at_least_one(speed, slice_ns, quota):
    assert RateLimit(speed, slice_ns).quota == quota


def test_change_of_speed_keeps_the_slice():
    limit = RateLimit(10)
    delays(limit, [(1, 1)] * 5)

    limit.set_speed(5)

    assert limit.calculate(1, 1) == 1_200_000_000
