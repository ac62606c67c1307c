"""Figures of our world alone: memory at rest, the large run, the long run of a limit."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import worlds

from kvmsim.sim.scale import run_scale
from kvmsim.sim.testbed import Testbed

CGROUPS_PER_DIRECTORY = 1000
BYTES_PER_CGROUP = 4096
EVENTS_PER_SECOND = 60_000
PEAK_GIGABYTES = 1.5
RATE_ERROR = 0.005
PERIODS = 100
LIMITS = ((100, 1_000_000), (7, 1_000_000), (3, 1_000), (999, 77_777))  # QUOTA, PERIOD in µs


@dataclass(frozen=True)
class Figure:
    """One line below the table.

    Attributes:
        title: What was done.
        value: What came out, with its unit.
        goal: What is promised, with its unit.
        met: Whether the promise is kept.
    """

    title: str
    value: str
    goal: str
    met: bool


def idle_memory(scratch: Path, quick: bool) -> Sequence[Figure]:
    """Makes empty cgroups and returns what the server grew by for each."""
    nr_cgroups = 5_000 if quick else 100_000
    with worlds.ours(scratch) as world:
        assert world.nest is not None
        assert world.server is not None
        before = resident_bytes(world.server)
        for first in range(0, nr_cgroups, CGROUPS_PER_DIRECTORY):
            directory = world.nest / f"from{first}"
            directory.mkdir()
            worlds.enable_all(directory)
            for number in range(min(CGROUPS_PER_DIRECTORY, nr_cgroups - first) - 1):
                (directory / str(number)).mkdir()
        each = (resident_bytes(world.server) - before) / nr_cgroups
    return (
        Figure(
            f"memory of the server per idle cgroup, at {nr_cgroups:,} of them",
            f"{each / 1024:.2f} KiB",
            f"at most {BYTES_PER_CGROUP / 1024:.0f} KiB",
            each <= BYTES_PER_CGROUP,
        ),
    )


def resident_bytes(pid: int) -> int:
    """Returns how much memory a process has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise worlds.MissingWorldError(f"process {pid} is gone")


def scale(_scratch: Path, quick: bool) -> Sequence[Figure]:
    """Runs many bus locking VMs in virtual time, in a process of its own for its peak memory."""
    nr_vms, nr_cgroups, seconds = (1_000, 10, 10) if quick else (10_000, 100, 60)
    with ProcessPoolExecutor(1) as pool:
        result = pool.submit(run_scale, nr_vms, nr_cgroups, seconds).result()
    run = (
        f"{nr_vms:,} VMs with {result.rate:g} bus locks/s each in {nr_cgroups} limited cgroups, "
        f"{seconds} virtual seconds"
    )
    gigabytes = result.peak_rss_bytes / 1e9
    return (
        Figure(
            f"{run}: events per wall second",
            f"{result.events_per_s:,.0f}",
            f"at least {EVENTS_PER_SECOND:,}",
            result.events_per_s >= EVENTS_PER_SECOND,
        ),
        Figure(
            f"{run}: peak memory",
            f"{gigabytes:.2f} GB",
            f"under {PEAK_GIGABYTES} GB",
            gigabytes < PEAK_GIGABYTES,
        ),
    )


def long_run(_scratch: Path, _quick: bool) -> Sequence[Figure]:
    """Holds VMs that always want more under several limits for 100 periods of virtual time."""
    runs = [_count_events(quota, period_us) for quota, period_us in LIMITS]
    worst = max(
        abs(run[-1] - run[0] - PERIODS * quota) / (PERIODS * quota)
        for run, (quota, _period_us) in zip(runs, LIMITS, strict=True)
    )
    # By index: the counts are one period apart, and a limit admits QUOTA more in one.
    excess = max(
        run[end] - run[start] - quota * (end - start + 1)
        for run, (quota, _period_us) in zip(runs, LIMITS, strict=True)
        for start in range(len(run))
        for end in range(start, len(run))
    )
    limits = ", ".join(f"{quota}/{period_us / 1000:g} ms" for quota, period_us in LIMITS)
    return (
        Figure(
            f"rate under a limit over {PERIODS} periods ({limits}): furthest from QUOTA/PERIOD",
            f"{worst:.3%}",
            f"at most {RATE_ERROR:.1%}",
            worst <= RATE_ERROR,
        ),
        Figure(
            "the same: events above QUOTA + time * QUOTA / PERIOD, in the worst interval",
            f"{max(excess, 0)}",
            "none",
            excess <= 0,
        ),
    )


def _count_events(quota: int, period_us: int) -> list[int]:
    """Returns how many events were admitted by the end of every period, the first one left out."""
    bed = Testbed()
    group = bed.group("limited", f"{quota} {period_us}")
    for number in range(4):
        bed.vm(f"vm{number}", f"buslock rate={quota * 1e6 / period_us:g}", group)
    counts = []
    for _period in range(PERIODS + 2):
        bed.run(period_us / 1e6)
        counts.append(bed.state(group).budget.nr_events)
    return counts[1:]


FIGURES: dict[str, Callable[[Path, bool], Sequence[Figure]]] = {
    "memory": idle_memory,
    "scale": scale,
    "rate": long_run,
}
