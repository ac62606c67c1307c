"""Guests that are nothing but rates: so many bus locks, port accesses, halts per second of work.

A guest is described in words, on the command line and in scenarios:

``idle``
    halts and never wakes.
``busy``
    computes, without an exit.
``buslock rate=5000``
    computes and takes 5000 bus locks per second of guest time.
``mixed buslock=100 io=50 mmio=20 hlt=10``
    several rates at once; each is optional, one is needed.

Options of the last two: ``jitter=none`` makes each kind of stop periodic, in a phase that chance
picks; ``jitter=poisson`` (default) draws independent exponential gaps with the same mean.
``cpl=0`` to ``cpl=3`` (default) is the privilege level of the locking code. ``sleep=MS`` (default
1) is how many milliseconds a halt lasts. ``branches=RATE``, of ``busy`` too, takes so many branches
per second, of every kind, for the vCPU's last-branch records while they are on.

Rates count guest time, in which the vCPU executes: halts, stalls and throttling come on top, so a
guest that is held up takes fewer bus locks per second of host time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING, Any, Protocol

from kvmsim.engine.base import BusLock, Hlt, InKernel, Io, Mmio
from kvmsim.engine.branch_stream import BranchStream
from kvmsim.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import GuestEngine, GuestVcpu, Stop

MAX_RATE = 10_000_000
"""Stops per second; beyond that a stop would take longer than the gap before it."""

MIN_RATE = 1e-9
"""One stop in some thirty years; a gap that no number holds would end the whole host."""

IO_PORT = 0x3F8
MMIO_GPA = 0xFED0_0000

_NS_PER_S = 1_000_000_000
_HOUR_NS = 3_600 * _NS_PER_S


class Stream(Protocol):
    """A seeded source of chance."""

    def random(self) -> float:
        """The next number, 0 <= x < 1."""


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What a guest does.

    Attributes:
        text: the words it was made of.
        rates: stops per second of guest time, by kind: ``buslock``, ``io``, ``mmio``, ``hlt``.
        poisson: whether gaps are drawn, not periodic.
        cpl: privilege level of the locking code.
        sleep_ns: how long a halt of ``mixed`` lasts.
        branches: branches per second; 0: none.
    """

    text: str
    rates: tuple[tuple[str, float], ...] = ()
    poisson: bool = True
    cpl: int = 3
    sleep_ns: int = 1_000_000
    branches: float = 0

    def engine(self, stream: Stream) -> GuestEngine:
        """The engine of one vCPU of such a guest."""
        engine = self._engine(stream)
        if not self.branches:
            return engine
        return Branching(engine, BranchStream(self.branches, stream, self.cpl))

    def _engine(self, stream: Stream) -> GuestEngine:
        if not self.rates:
            return Steady(Hlt() if self.text == "idle" else InKernel(_HOUR_NS))
        sources = [(self._stop(kind), _NS_PER_S / rate) for kind, rate in self.rates]
        if not self.poisson:
            return Periodic(sources, stream)
        if len(sources) == 1:
            return Poisson(*sources[0], stream)
        return Mixed(sources, stream)

    def _stop(self, kind: str) -> Stop:
        match kind:
            case "buslock":
                return BusLock(cpl=self.cpl)
            case "io":
                return Io(port=IO_PORT, data=b"\0")
            case "mmio":
                return Mmio(gpa=MMIO_GPA)
            case _:
                return Hlt(wake_after_ns=self.sleep_ns)


class Branching:
    """Branches between the stops of another engine, while somebody records them."""

    __slots__ = ("_branches", "_engine")

    def __init__(self, engine: GuestEngine, branches: BranchStream) -> None:
        self._engine = engine
        self._branches = branches

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """See GuestEngine."""
        stop = self._engine.next_stop(vcpu)
        records = vcpu.records
        if records is not None:
            self._branches.feed(records, stop.after_ns)
        return stop


class Steady:
    """Always the same stop."""

    __slots__ = ("_stop",)

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """See GuestEngine."""
        return self._stop


class Poisson:
    """One kind of stop after exponential gaps."""

    __slots__ = ("_mean_ns", "_random", "_stop")

    def __init__(self, stop: Stop, mean_ns: float, stream: Stream) -> None:
        self._stop = stop
        self._mean_ns = mean_ns
        self._random = stream.random

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """See GuestEngine."""
        stop = self._stop
        stop.after_ns = int(-self._mean_ns * log(1.0 - self._random())) or 1
        return stop


class Mixed:
    """Several kinds of stops, each after exponential gaps of its own mean.

    The gap to the next of any kind is exponential too, and its kind is independent of it.
    """

    __slots__ = ("_mean_ns", "_random", "_shares")

    def __init__(self, sources: list[tuple[Stop, float]], stream: Stream) -> None:
        total = sum(1 / mean_ns for _, mean_ns in sources)
        self._mean_ns = 1 / total
        self._random = stream.random
        self._shares: list[tuple[float, Stop]] = []
        upto = 0.0
        for stop, mean_ns in sources:
            upto += 1 / mean_ns / total
            self._shares.append((upto, stop))

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """See GuestEngine."""
        draw = self._random()
        stop = next((stop for upto, stop in self._shares if draw < upto), self._shares[-1][1])
        stop.after_ns = int(-self._mean_ns * log(1.0 - self._random())) or 1
        return stop


class Periodic:
    """Several kinds of stops, each with its own period, in a phase chance picked.

    The n-th stop of a kind happens at ``phase + n * period`` rounded down, so that rates hold
    exactly in the long run.
    """

    __slots__ = ("_now_ns", "_sources")

    def __init__(self, sources: list[tuple[Stop, float]], stream: Stream) -> None:
        self._now_ns = 0
        self._sources = [_Source(stop, period_ns, stream.random()) for stop, period_ns in sources]

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """See GuestEngine."""
        source = min(self._sources, key=_Source.due)
        due_ns = source.due_ns
        stop = source.stop
        stop.after_ns = due_ns - self._now_ns
        self._now_ns = due_ns
        source.count += 1
        source.due_ns = int((source.phase + source.count) * source.period_ns)
        return stop


class _Source:
    __slots__ = ("count", "due_ns", "period_ns", "phase", "stop")

    def __init__(self, stop: Stop, period_ns: float, phase: float) -> None:
        self.stop = stop
        self.period_ns = period_ns
        self.phase = phase
        self.count = 0
        self.due_ns = int(phase * period_ns)

    def due(self) -> int:
        return self.due_ns


KINDS = ("buslock", "io", "mmio", "hlt")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def parse_guest(text: str) -> GuestSpec:
    """Read the words that describe a guest.

    Raises:
        ConfigError: one line that names the word which is not understood.
    """
    words = text.split()
    match words[:1]:
        case ["busy"] if len(words) == 2 and words[1].startswith("branches="):
            branches = _rate(words[1], words[1].removeprefix("branches="))
            return GuestSpec(" ".join(words), branches=branches)
        case ["idle" | "busy"]:
            if words[1:]:
                raise ConfigError(f"guest {words[0]} takes no options: {words[1]}")
            return GuestSpec(words[0])
        case ["buslock"]:
            return _with_rates(words, {"rate": "buslock"})
        case ["mixed"]:
            return _with_rates(words, {kind: kind for kind in KINDS})
        case []:
            raise ConfigError("no guest given: try idle, busy, buslock or mixed")
        case _:
            raise ConfigError(f"unknown guest {words[0]!r}: try idle, busy, buslock or mixed")


def _with_rates(words: list[str], kind_of: dict[str, str]) -> GuestSpec:
    rates: dict[str, float] = {}
    options: dict[str, Any] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals or not (name in kind_of or name in _OPTIONS):
            known = ", ".join(f"{name}=" for name in (*kind_of, *_OPTIONS))
            raise ConfigError(f"guest {words[0]}: unknown word {word!r}; it takes {known}")
        if name in rates or name in options:
            raise ConfigError(f"guest {words[0]}: {name}= is given twice")
        if name in kind_of:
            rates[name] = _rate(word, value)
        else:
            option, parse = _OPTIONS[name]
            options[option] = parse(word, value)
    if not rates:
        raise ConfigError(f"guest {words[0]}: give {'= or '.join(kind_of)}=")
    ordered = tuple((kind, rates[name]) for name, kind in kind_of.items() if name in rates)
    return replace(GuestSpec(" ".join(words), ordered), **options)


def _rate(word: str, value: str) -> float:
    if not _NUMBER.fullmatch(value) or not MIN_RATE <= float(value) <= MAX_RATE:
        raise ConfigError(f"{word}: not a rate from {MIN_RATE:.9f} to {MAX_RATE} per second")
    return float(value)


def _jitter(word: str, value: str) -> bool:
    if value not in ("none", "poisson"):
        raise ConfigError(f"{word}: not none or poisson")
    return value == "poisson"


def _cpl(word: str, value: str) -> int:
    if value not in ("0", "1", "2", "3"):
        raise ConfigError(f"{word}: not a privilege level from 0 to 3")
    return int(value)


def _sleep(word: str, value: str) -> int:
    if not _NUMBER.fullmatch(value) or not 0 < float(value) <= 1e9:
        raise ConfigError(f"{word}: not a number of milliseconds above 0")
    return max(1, int(float(value) * 1_000_000))


_OPTIONS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "branches": ("branches", _rate),
    "jitter": ("poisson", _jitter),
    "cpl": ("cpl", _cpl),
    "sleep": ("sleep_ns", _sleep),
}
