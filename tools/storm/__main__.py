"""Runs a storm of bus locks in QEMU under one limit after another and draws its rate."""

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import guests
from rich.console import Console, Group
from rich.live import Live

from storm import charts, world
from storm.phases import PHASES, Phase
from storm.samples import Sample, events, mean, rates

EVERY_SECONDS = 0.2
HEIGHT = 12
#: How far a mean may be above a limit: what a limiter lets through at once at the beginning.
BURST = 1.5


class Watch:
    """The samples so far, and the picture they make.

    Args:
        cgroup: whose bus locks are counted.
        seconds: of each phase.
        console: where the picture goes.
    """

    def __init__(self, cgroup: Path, seconds: float, console: Console) -> None:
        self.samples: list[Sample] = []
        self._statistics = cgroup / "bus_lock.stat"
        self._seconds = seconds
        self._console = console
        self._start = time.monotonic()
        self._paused_since = self._start

    def pause(self) -> None:
        """What happens from here on is not part of the picture."""
        self._paused_since = time.monotonic()

    def go_on(self) -> None:
        """Time counts again."""
        self._start += time.monotonic() - self._paused_since

    def look(self, phase: int) -> None:
        """Take a sample."""
        count = events(self._statistics.read_text())
        self.samples.append(Sample(time.monotonic() - self._start, count, phase))

    def picture(self) -> Group:
        """The chart and the table."""
        width = min(self._console.width, 100)
        total = self._seconds * len(PHASES)
        chart = charts.terminal(list(rates(self.samples)), width, HEIGHT, total)
        return Group(chart, charts.summary(PHASES, self.samples))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 when a limit did not hold, 69 when something is missing."""
    options = _parser().parse_args(arguments)
    # Leave the `with` statements below by the ordinary way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    if (reason := world.why_not()) is not None:
        print(f"demo: {reason}", file=sys.stderr)
        return 69
    try:
        with tempfile.TemporaryDirectory(prefix="kvmsim-storm.") as scratch:
            samples = _play(Path(scratch), options.seconds, console)
    except (world.FailedError, guests.BuildError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 69
    except KeyboardInterrupt:
        return 130
    try:
        charts.picture(options.png, PHASES, list(rates(samples)))
    except OSError as error:
        print(f"demo: cannot write {options.png}: {error.strerror}", file=sys.stderr)
        return 73  # EX_CANTCREAT
    print(f"demo: the picture is in {options.png}")
    return _verdict(samples)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tools/demo --guest x86", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase; 4 by default")
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        default=Path("bus-locks.png"),
        help="where the picture goes; bus-locks.png by default",
    )
    return parser


def _play(scratch: Path, seconds: float, console: Console) -> list[Sample]:
    with world.host(scratch) as cgroup:
        watch = Watch(cgroup, seconds, console)
        with _shown(watch, console) as show, contextlib.ExitStack() as running:
            ratelimit = None
            for number, phase in enumerate(PHASES):
                if phase.ratelimit != ratelimit:
                    watch.pause()
                    running.close()
                    (cgroup / "bus_lock.max").write_text(phase.limit)
                    running.enter_context(world.storm(scratch, cgroup, phase.ratelimit))
                    ratelimit = phase.ratelimit
                    watch.go_on()
                _watch_phase(watch, cgroup, number, phase, seconds, show)
        return watch.samples


def _watch_phase(
    watch: Watch, cgroup: Path, number: int, phase: Phase, seconds: float, show: Live | None
) -> None:
    (cgroup / "bus_lock.max").write_text(phase.limit)
    end = time.monotonic() + seconds
    watch.look(number)
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(EVERY_SECONDS, left))
        watch.look(number)
        if show is not None:
            show.update(watch.picture(), refresh=True)


@contextlib.contextmanager
def _shown(watch: Watch, console: Console) -> Iterator[Live | None]:
    """On a terminal the picture grows; elsewhere it is printed in the end."""
    if console.is_terminal:
        with Live(watch.picture(), console=console, auto_refresh=False) as live:
            yield live
    else:
        yield None
        console.print(watch.picture())


def _verdict(samples: Sequence[Sample]) -> int:
    for number, phase in enumerate(PHASES):
        rate = mean(samples, number)
        if rate == 0 or (phase.at_most is not None and rate > phase.at_most * BURST):
            print(f"demo: {phase.title}: {rate:,.0f} bus locks per second", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
