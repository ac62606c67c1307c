from __future__ import annotations

import pytest

from kvmsim.host.split_lock import (
    KernelRatelimit,
    Mode,
    SplitLockDetect,
    parse_split_lock_detect,
)

WARN = SplitLockDetect(Mode.WARN)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (None, WARN),
        ("", WARN),
        ("off", SplitLockDetect(Mode.OFF)),
        ("warn", WARN),
        ("fatal", SplitLockDetect(Mode.FATAL)),
        ("OFF", WARN),
        ("off ", WARN),
        ("fatally", WARN),
        ("bogus", WARN),
        ("ratelimit", WARN),
        ("ratelimit:1", SplitLockDetect(Mode.RATELIMIT, 1)),
        ("ratelimit:1000", SplitLockDetect(Mode.RATELIMIT, 1000)),
        ("ratelimit:5xyz", SplitLockDetect(Mode.RATELIMIT, 5)),
        ("ratelimit: 5", SplitLockDetect(Mode.RATELIMIT, 5)),
        ("ratelimit:+5", SplitLockDetect(Mode.RATELIMIT, 5)),
        ("ratelimit:0x10", WARN),
        ("ratelimit:", SplitLockDetect(Mode.RATELIMIT, 0)),
        ("ratelimit:0", WARN),
        ("ratelimit:1001", WARN),
        ("ratelimit:-5", WARN),
        ("ratelimit:x5", WARN),
    ],
)
def test_t_b_6_option_on_a_capable_cpu(option, expected):
    # T-B-6
    assert parse_split_lock_detect(option, capable=True) == expected


@pytest.mark.parametrize("option", [None, "warn", "fatal", "ratelimit:5", "bogus"])
def test_t_b_6_option_without_the_cpu_feature_is_off(option):
    assert parse_split_lock_detect(option, capable=False) == SplitLockDetect(Mode.OFF)


@pytest.mark.parametrize("option", ["off", "warn", "fatal", "ratelimit:7"])
def test_policy_prints_as_its_option(option):
    assert str(parse_split_lock_detect(option, capable=True)) == option


def test_third_event_of_a_window_is_allowed_by_the_poll_after_its_end():
    # C.2 vector: HZ=1000, N=2, a refused event polls every 21 ticks.
    limit = KernelRatelimit(interval=1000, burst=2)
    assert limit.try_take(1000)
    assert limit.try_take(1010)

    now = 1020
    while not limit.try_take(now):
        now += 21

    assert (now, limit.missed, limit.begin, limit.printed) == (2007, 47, 2007, 1)


def test_window_ends_strictly_after_its_interval():
    limit = KernelRatelimit(interval=1000, burst=1)
    limit.try_take(1000)

    assert not limit.try_take(2000)
    assert limit.try_take(2001)


def test_unused_events_of_a_window_are_not_carried_over():
    limit = KernelRatelimit(interval=1000, burst=2)
    limit.try_take(1)

    assert [limit.try_take(now) for now in (5000, 5000, 5000)] == [True, True, False]


def test_interval_of_zero_allows_everything():
    limit = KernelRatelimit.of(parse_split_lock_detect("ratelimit:", capable=True))

    assert all(limit.try_take(5) for _ in range(100))


def test_contention_refuses_without_counting():
    limit = KernelRatelimit.of(SplitLockDetect(Mode.RATELIMIT, 5))
    limit.contended = True

    assert not limit.try_take(1)
    assert (limit.missed, limit.begin) == (0, 0)
