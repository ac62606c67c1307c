from __future__ import annotations

from kvmsim.sim.scale import run_scale


def test_run_counts_what_happened():
    result = run_scale(nr_vms=40, nr_cgroups=4, seconds=10, rate=10, quota=50)

    # 10 VMs per cgroup want 100 bus locks a second and may take 50, after a burst of 50.
    assert 0 <= 4 * (50 + 10 * 50) - result.nr_admitted <= 4 * 10
    assert result.nr_admitted <= result.nr_bus_locks <= result.nr_admitted + 40
    assert 0 < result.nr_throttled <= result.nr_bus_locks
    # A start per VM, a step per bus lock, another per admission that had to wait.
    waiting = result.nr_bus_locks - result.nr_admitted
    assert result.nr_steps == 40 + result.nr_bus_locks + result.nr_throttled - waiting


def test_run_without_shortage_throttles_nobody():
    result = run_scale(nr_vms=10, nr_cgroups=2, seconds=5, rate=10, quota=1000)

    assert result.nr_throttled == 0
    assert result.nr_admitted == result.nr_bus_locks
    assert abs(result.nr_bus_locks - 500) < 100


def test_run_is_repeatable():
    first, second = (run_scale(nr_vms=20, nr_cgroups=2, seconds=2, quota=40) for _ in range(2))

    assert (first.nr_bus_locks, first.nr_throttled) == (second.nr_bus_locks, second.nr_throttled)
    assert first.events_per_s == first.nr_bus_locks / first.wall_s
    assert first.speedup == 2 / first.wall_s
