from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kvmsim.engine.base import BusLock, Hlt, InKernel, Io, Mmio
from kvmsim.engine.synthetic import parse_guest
from kvmsim.errors import ConfigError
from kvmsim.sim.streams import Stream

S = 1_000_000_000


class NoVcpu:
    id = 0
    rip = 0
    input = b""


def play(words: str, count: int, seed: int = 1) -> list[tuple[type, int]]:
    """(kind, guest time at which it happens) of the first stops."""
    engine = parse_guest(words).engine(Stream(seed))
    now, stops = 0, []
    for _ in range(count):
        stop = engine.next_stop(NoVcpu())
        now += stop.after_ns
        stops.append((type(stop), now))
    return stops


def test_idle_guest_halts_for_good():
    stop = parse_guest("idle").engine(Stream(1)).next_stop(NoVcpu())

    assert stop == Hlt(wake_after_ns=None)


def test_busy_guest_has_nothing_to_say_for_an_hour():
    stop = parse_guest("busy").engine(Stream(1)).next_stop(NoVcpu())

    assert stop == InKernel(3_600 * S)


def test_periodic_guest_keeps_its_rate_exactly():
    stops = play("buslock rate=3 jitter=none", 3001)
    first = stops[0][1]

    assert 0 <= first < S // 3 + 1
    assert [kind for kind, _ in stops] == [BusLock] * 3001
    assert abs(stops[3000][1] - first - 1000 * S) <= 1


def test_poisson_guest_keeps_its_rate_on_average_and_varies_its_gaps():
    stops = play("buslock rate=1000", 20_000)

    assert abs(stops[-1][1] - 20 * S) < S // 2
    gaps = [b - a for (_, a), (_, b) in itertools.pairwise(stops)]
    assert min(gaps) >= 1
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert abs(variance / mean**2 - 1) < 0.1


@pytest.mark.parametrize("jitter", ["none", "poisson"])
def test_mixed_guest_has_every_kind_at_its_rate(jitter):
    stops = play(f"mixed buslock=100 io=50 mmio=30 hlt=20 jitter={jitter}", 20_000)

    counts = Counter(kind for kind, _ in stops)
    seconds = stops[-1][1] / S
    assert abs(seconds - 100) < 2
    for kind, rate in ((BusLock, 100), (Io, 50), (Mmio, 30), (Hlt, 20)):
        assert abs(counts[kind] / seconds / rate - 1) < 0.05


def test_same_seed_gives_the_same_guest():
    words = "mixed buslock=100 io=50"

    assert play(words, 500, seed=3) == play(words, 500, seed=3)
    assert play(words, 500, seed=3) != play(words, 500, seed=4)


def test_options_reach_the_stops():
    lock = parse_guest("buslock rate=1 cpl=0").engine(Stream(1)).next_stop(NoVcpu())
    halt = parse_guest("mixed hlt=1 sleep=2.5").engine(Stream(1)).next_stop(NoVcpu())

    assert isinstance(lock, BusLock)
    assert lock.cpl == 0
    assert isinstance(halt, Hlt)
    assert halt.wake_after_ns == 2_500_000


def test_fractional_rate_is_understood():
    assert parse_guest("buslock rate=0.5").rates == (("buslock", 0.5),)


def test_words_are_kept_in_one_spelling():
    assert parse_guest("  mixed   io=5  buslock=1 ").text == "mixed io=5 buslock=1"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "no guest"),
        ("bogus", "'bogus'"),
        ("BUSLOCK rate=1", "'BUSLOCK'"),
        ("idle rate=5", "rate=5"),
        ("busy now", "now"),
        ("buslock", "rate="),
        ("buslock rate", "'rate'"),
        ("buslock rate=", "rate="),
        ("buslock rate=0", "rate=0"),
        ("buslock rate=-5", "rate=-5"),
        ("buslock rate=1e3", "rate=1e3"),
        ("buslock rate=nan", "rate=nan"),
        ("buslock rate=10000001", "rate=10000001"),
        ("buslock rate=0.0000000001", "rate=0.0000000001"),
        ("buslock rate=0." + 300 * "0" + "1", "not a rate"),
        ("buslock rate=5 rate=6", "twice"),
        ("buslock io=5", "'io=5'"),
        ("buslock rate=5 jitter=some", "jitter=some"),
        ("buslock rate=5 cpl=4", "cpl=4"),
        ("mixed", "buslock="),
        ("mixed hlt=5 sleep=0", "sleep=0"),
        ("mixed rate=5", "'rate=5'"),
    ],
)
def test_words_that_are_not_understood_are_named_in_one_line(words, named):
    with pytest.raises(ConfigError, match="guest|" + named.partition("=")[0]) as refused:
        parse_guest(words)

    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
