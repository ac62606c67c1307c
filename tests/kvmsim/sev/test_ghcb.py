import pytest

from kvmsim.sev.ghcb import Answer, ResetHold, Terminate, reply, reset_value


def ask(value, **more):
    return reply(value, c_bit=51, version=2, cpuid=lambda leaf: (leaf, 2, 3, 4), **more)


def test_reset_value_tells_versions_and_c_bit():
    assert reset_value(51, 2) == 0x0002_0001_3300_0001
    assert reset_value(47, 1) == 0x0001_0001_2F00_0001


def test_information_is_the_reset_value():
    assert ask(0x002) == Answer(0x0002_0001_3300_0001)


@pytest.mark.parametrize(("register", "value"), [(0, 0x8000001F), (1, 2), (2, 3), (3, 4)])
def test_cpuid_answers_with_one_register(register, value):
    asked = 0x8000001F << 32 | register << 30 | 0x004
    assert ask(asked) == Answer(value << 32 | register << 30 | 0x005)


def test_features():
    assert ask(0x080) == Answer(0x081)
    assert ask(0x080, features=5) == Answer(0x5081)


def test_reset_hold_waits():
    assert ask(0x006) == ResetHold()


def test_termination_carries_what_the_guest_wrote():
    assert ask(0x0041_0100) == Terminate(0x0041_0100)


@pytest.mark.parametrize("request_number", [0x010, 0x012, 0x014])
def test_requests_for_snp_end_other_guests(request_number):
    assert ask(request_number) == Terminate(request_number)
    assert ask(request_number, snp=True) == Answer(request_number)


@pytest.mark.parametrize("value", [0, 0x1000, 0xFFF, 0x7_0FFE])
def test_unknown_requests_are_left_as_they_are(value):
    assert ask(value) == Answer(value)
