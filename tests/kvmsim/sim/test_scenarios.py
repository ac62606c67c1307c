from __future__ import annotations

import pytest

from kvmsim.sim.scenarios import noisy_neighbour


def test_noisy_neighbour_costs_a_quarter_and_the_limit_gives_it_back():
    result = noisy_neighbour(rate=100_000, limit="100 1000000")

    assert result.alone == 1.0
    # A lock every 10 us of guest time stalls everybody 3.5 us: 10 of 13.5.
    assert abs(result.beside_noisy - 10 / 13.5) < 0.005
    assert abs(result.noisy_locks_per_s - 1e9 / 13_500) < 500
    # 100 locks a second of 3.5 us each.
    assert result.limited_locks_per_s == 100
    assert abs(result.beside_limited - (1 - 100 * 3.5e-6)) < 1e-6


def test_more_noisy_vcpus_hurt_more_and_the_limit_holds_for_all_together():
    result = noisy_neighbour(rate=50_000, nr_vcpus=4, limit="1000 1000000", seconds=0.5)

    assert result.beside_noisy < 0.65
    assert result.limited_locks_per_s == 1000


def test_limit_cannot_help_where_bus_locks_are_not_detected():
    result = noisy_neighbour(preset="plain-amd", seconds=0.2)

    assert result.beside_limited == pytest.approx(result.beside_noisy, rel=0.01)


def test_result_reads_as_three_lines():
    lines = str(noisy_neighbour(seconds=0.1)).splitlines()

    assert [line.split()[0] for line in lines] == ["alone", "beside", "with"]
