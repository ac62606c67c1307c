from storm.samples import Rate, Sample, events, mean, rates

SAMPLES = [
    Sample(0.0, 100, 0),
    Sample(0.5, 200, 0),
    Sample(1.0, 200, 0),
    Sample(1.0, 200, 1),
    Sample(2.0, 250, 1),
]


def test_count_is_found_among_the_other_keys():
    assert events("nr_throttled 9\nnr_events 12\nthrottled_usec 3\n") == 12


def test_rates_do_not_reach_from_one_phase_into_the_next():
    assert list(rates(SAMPLES)) == [
        Rate(0.0, 0.5, 200.0, 0),
        Rate(0.5, 1.0, 0.0, 0),
        Rate(1.0, 2.0, 50.0, 1),
    ]


def test_mean_is_over_the_whole_phase():
    assert (mean(SAMPLES, 0), mean(SAMPLES, 1)) == (100.0, 50.0)


def test_mean_of_a_phase_without_two_looks_is_zero():
    assert (mean(SAMPLES[:1], 0), mean(SAMPLES, 2)) == (0.0, 0.0)
