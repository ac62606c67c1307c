"""Scenarios with a point, for demonstrations, documentation and tests."""

from __future__ import annotations

from dataclasses import dataclass

from kvmsim.sim.testbed import NS_PER_S, Testbed


@dataclass(frozen=True, slots=True)
class NoisyNeighbour:
    """What a VM gets done beside one that keeps locking the bus.

    Work is guest time executed per second of host time: 1.0 is a CPU that never waited.

    Attributes:
        limit: what was written to the noisy VM's ``bus_lock.max``.
        alone: work of the victim on an otherwise idle machine.
        beside_noisy: the same beside the noisy VM.
        beside_limited: the same once the limit is in force.
        noisy_locks_per_s: bus locks of the noisy VM per second of host time.
        limited_locks_per_s: the same under the limit.
    """

    limit: str
    alone: float
    beside_noisy: float
    beside_limited: float
    noisy_locks_per_s: float
    limited_locks_per_s: float

    def __str__(self) -> str:
        """Three lines for people."""
        return (
            f"alone                      {self.alone:7.2%}\n"
            f"beside the noisy VM        {self.beside_noisy:7.2%}"
            f"   ({self.noisy_locks_per_s:.0f} bus locks/s)\n"
            f'with bus_lock.max "{self.limit}"  {self.beside_limited:7.2%}'
            f"   ({self.limited_locks_per_s:.0f} bus locks/s)"
        )


def noisy_neighbour(
    *,
    rate: float = 100_000,
    nr_vcpus: int = 1,
    limit: str = "100 1000000",
    seconds: float = 1.0,
    preset: str = "spr-buslock",
    seed: int = 1,
) -> NoisyNeighbour:
    """Measure a busy VM alone, beside a noisy one, and with the noisy one limited.

    Args:
        rate: bus locks per second of guest time of each noisy vCPU.
        nr_vcpus: vCPUs of the noisy VM.
        limit: for the noisy VM's cgroup.
        seconds: length of each of the three measurements.
        preset: the machine; without bus lock detection the limit cannot help.
        seed: chance of the guests.
    """
    bed = Testbed(preset, seed=seed)
    victim = bed.vm("victim", "busy", bed.group("victim"))

    def work_per_s() -> float:
        before_ns = victim.statistics().work_ns
        bed.run(seconds)
        return (victim.statistics().work_ns - before_ns) / (seconds * NS_PER_S)

    alone = work_per_s()
    tenant = bed.group("noisy")
    noisy = bed.vm("noisy", f"buslock rate={rate}", tenant, nr_vcpus=nr_vcpus)
    beside_noisy = work_per_s()
    locks = noisy.statistics().nr_bus_locks
    bed.write(tenant, "bus_lock.max", limit)
    bed.run(1)  # a new limit starts with the credit of a whole period
    before_limited = noisy.statistics().nr_bus_locks
    beside_limited = work_per_s()
    limited_locks = noisy.statistics().nr_bus_locks - before_limited
    return NoisyNeighbour(
        limit=limit,
        alone=alone,
        beside_noisy=beside_noisy,
        beside_limited=beside_limited,
        noisy_locks_per_s=locks / seconds,
        limited_locks_per_s=limited_locks / seconds,
    )
