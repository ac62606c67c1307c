"""How fast a host full of bus locking VMs is simulated, and in how much memory."""

from __future__ import annotations

import gc
import resource
from dataclasses import dataclass
from time import perf_counter, process_time

from kvmsim.sim.testbed import Testbed


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """One measured run.

    Attributes:
        nr_vms: VMs of one vCPU.
        nr_cgroups: limited cgroups they are spread over.
        seconds: virtual time.
        rate: bus locks a vCPU takes per second of guest time.
        quota: bus locks per second that each cgroup may take.
        nr_bus_locks: bus locks taken; these are the events.
        nr_admitted: those that passed the limits.
        nr_throttled: those that had to wait.
        nr_steps: steps of the timeline: a bus lock that waits takes two.
        setup_s: wall time to build host and VMs.
        wall_s: wall time of the run.
        cpu_s: CPU time of the run: what the wall time is on a core of its own.
        peak_rss_bytes: the most memory the process ever had.
    """

    nr_vms: int
    nr_cgroups: int
    seconds: float
    rate: float
    quota: int
    nr_bus_locks: int
    nr_admitted: int
    nr_throttled: int
    nr_steps: int
    setup_s: float
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int

    @property
    def events_per_s(self) -> float:
        """Bus locks simulated per second of wall time."""
        return self.nr_bus_locks / self.wall_s

    @property
    def speedup(self) -> float:
        """Virtual seconds per second of wall time."""
        return self.seconds / self.wall_s


def run_scale(
    nr_vms: int = 10_000,
    nr_cgroups: int = 100,
    seconds: float = 60,
    rate: float = 10,
    quota: int = 500,
) -> ScaleResult:
    """Run VMs that do nothing but take bus locks, in cgroups that limit them.

    Args:
        nr_vms: how many, each with one vCPU.
        nr_cgroups: limited cgroups below the root, filled evenly.
        seconds: virtual time.
        rate: bus locks a second of each vCPU, in exponential gaps.
        quota: bus locks a second of each cgroup.
    """
    started = perf_counter()
    bed = Testbed()
    groups = [bed.group(f"g{i}", f"{quota} 1000000") for i in range(nr_cgroups)]
    vmms = [bed.vm(f"vm{i}", f"buslock rate={rate}", groups[i % nr_cgroups]) for i in range(nr_vms)]
    # What lives as long as the run need not be looked through by the cycle collector.
    gc.collect()
    gc.freeze()
    try:
        ready, cpu_before_s = perf_counter(), process_time()
        bed.run(seconds)
        ended, cpu_after_s = perf_counter(), process_time()
    finally:
        gc.unfreeze()
    budgets = [bed.state(group).budget for group in groups]
    return ScaleResult(
        nr_vms=nr_vms,
        nr_cgroups=nr_cgroups,
        seconds=seconds,
        rate=rate,
        quota=quota,
        nr_bus_locks=sum(vmm.threads[0].vcpu.bus_locks for vmm in vmms),
        nr_admitted=sum(budget.nr_events for budget in budgets),
        nr_throttled=sum(budget.nr_throttled for budget in budgets),
        nr_steps=bed.timeline.nr_steps,
        setup_s=ready - started,
        wall_s=ended - ready,
        cpu_s=cpu_after_s - cpu_before_s,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
