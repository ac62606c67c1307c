from __future__ import annotations

from kvmsim.sim.streams import Stream, derive_seed, vcpu_stream


def draw(stream: Stream, count: int = 5) -> list[float]:
    return [stream.random() for _ in range(count)]


def test_same_seed_and_path_give_the_same_numbers():
    assert draw(vcpu_stream(7, "a", 0)) == draw(vcpu_stream(7, "a", 0))


def test_streams_of_other_vcpus_vms_and_seeds_differ():
    streams = [(7, "a", 0), (7, "a", 1), (7, "b", 0), (8, "a", 0)]

    assert len({tuple(draw(vcpu_stream(*which))) for which in streams}) == 4


def test_seed_is_the_same_in_every_process():
    assert derive_seed(7, "vcpu", "a", 0) == 7417686277320940377


def test_path_parts_do_not_run_together():
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")


def test_numbers_are_below_one_and_not_constant():
    numbers = draw(Stream(1), 1000)

    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 1000
