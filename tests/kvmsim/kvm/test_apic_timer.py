import pytest

from kvmsim.kvm.apic_timer import DEADLINE, ONE_SHOT, PERIODIC, ApicTimer, divide_of


@pytest.fixture
def timer():
    made = ApicTimer()
    made.divide = 1
    return made


@pytest.mark.parametrize(
    ("tdcr", "divide"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_divide_configuration(tdcr, divide):
    assert divide_of(tdcr) == divide


def test_one_shot_counts_down_and_stops(timer):
    timer.start(1000, None, 50)
    assert (timer.due_ns, timer.current(300)) == (1050, 750)
    timer.expire(1050)
    assert (timer.due_ns, timer.current(1060)) == (None, 0)


def test_periodic_keeps_to_multiples_however_late_it_is_looked_at(timer):
    timer.set_mode(PERIODIC)
    timer.start(1_000_000, None, 7)
    timer.expire(1_000_007 + 123_456)
    assert timer.due_ns == 2_000_007
    timer.expire(9_500_000)
    assert timer.due_ns == 10_000_007


def test_periods_too_short_for_the_kernel_are_lengthened(timer):
    timer.set_mode(PERIODIC)
    timer.start(1000, None, 0)
    assert timer.due_ns == 200_000


def test_count_of_zero_does_not_start(timer):
    timer.start(0, None, 0)
    assert timer.due_ns is None


def test_deadline_is_when_the_counter_gets_there(timer):
    timer.set_mode(DEADLINE)
    timer.start_deadline(3_003_000, 3_000, 3_000_000, 500)
    assert timer.due_ns == 500 + 1_000_000
    timer.expire(timer.due_ns)
    assert (timer.deadline, timer.due_ns) == (0, None)


def test_deadline_in_the_past_is_due_at_once_and_zero_never(timer):
    timer.set_mode(DEADLINE)
    timer.start_deadline(5, 1000, 3_000_000, 500)
    assert timer.due_ns == 500
    timer.start_deadline(0, 1000, 3_000_000, 500)
    assert timer.due_ns is None


def test_going_to_deadline_mode_and_back_forgets_the_count(timer):
    timer.start(1000, None, 0)
    assert timer.set_mode(DEADLINE)
    assert timer.due_ns is None
    assert timer.set_mode(ONE_SHOT)
    assert not timer.set_mode(PERIODIC)


def test_another_divisor_stretches_what_is_left(timer):
    timer.start(1000, None, 0)
    timer.set_divide(4, 1000, 200)
    assert timer.due_ns == 200 + 800 * 4
    assert timer.current(200) == 800


@pytest.mark.parametrize(("current", "due_ns"), [(400, 400), (5000, 1000), (0, 0)])
def test_restored_one_shot_goes_on_from_its_current_count(timer, current, due_ns):
    timer.start(1000, current, 0)
    assert timer.due_ns == due_ns
