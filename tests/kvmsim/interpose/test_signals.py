import pytest

from kvmsim.interpose.signals import pending

ALARM = 1 << 13
USR1 = 1 << 9


def status(thread=0, process=0, blocked=0):
    return (
        f"Name:\tx\nSigQ:\t0/1\nSigPnd:\t{thread:016x}\nShdPnd:\t{process:016x}\n"
        f"SigBlk:\t{blocked:016x}\nSigIgn:\t{0:016x}\n"
    ).encode()


@pytest.mark.parametrize(
    ("thread", "process", "blocked", "mask", "expected"),
    [
        (0, 0, 0, None, False),
        (ALARM, 0, 0, None, True),
        (0, ALARM, 0, None, True),
        (ALARM, 0, ALARM, None, False),
        (ALARM, USR1, ALARM, None, True),
        (ALARM, 0, ALARM, 0, True),
        (ALARM, 0, 0, ALARM, False),
    ],
)
def test_signal_counts_when_no_mask_holds_it_back(thread, process, blocked, mask, expected):
    assert pending(status(thread, process, blocked), mask) is expected


def test_status_without_signals_has_none():
    assert not pending(b"Name:\tx\n")
