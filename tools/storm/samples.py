"""Counts read from ``bus_lock.stat``, and the rates they make."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One look at the count.

    Attributes:
        seconds: when, from the start.
        events: ``nr_events`` so far.
        phase: number of the phase it was in.
    """

    seconds: float
    events: int
    phase: int


@dataclass(frozen=True)
class Rate:
    """What was between two looks.

    Attributes:
        begin: in seconds from the start.
        end: likewise.
        per_second: bus locks per second.
        phase: number of the phase.
    """

    begin: float
    end: float
    per_second: float
    phase: int


def events(statistics: str) -> int:
    """Returns ``nr_events`` of the text of a ``bus_lock.stat``."""
    return next(
        int(value)
        for key, value in (line.split() for line in statistics.splitlines())
        if key == "nr_events"
    )


def rates(samples: Sequence[Sample]) -> Iterator[Rate]:
    """Yields a rate for each two looks that followed each other in the same phase."""
    for before, after in itertools.pairwise(samples):
        if before.phase == after.phase and after.seconds > before.seconds:
            passed = after.seconds - before.seconds
            rate = (after.events - before.events) / passed
            yield Rate(before.seconds, after.seconds, rate, before.phase)


def mean(samples: Sequence[Sample], phase: int) -> float:
    """Returns the bus locks per second of a whole phase; 0 where there are fewer than two looks."""
    own = [sample for sample in samples if sample.phase == phase]
    if len(own) < 2 or own[-1].seconds <= own[0].seconds:
        return 0.0
    return (own[-1].events - own[0].events) / (own[-1].seconds - own[0].seconds)
