"""The split lock policy of a machine at work (kvm.md B.6)."""

import pytest

from kvmsim.host.kernel_log import KernelLog
from kvmsim.host.presets import parse
from kvmsim.host.split_locks import SplitLocks, Verdict

MS = 1_000_000
S = 1000 * MS
DB_ONLY = "[bus-lock]\ndetect = true\n"
AC_TOO = "[bus-lock]\ndetect = true\nsplit-lock-detect = true\n"
NEITHER = ""


def policy(hardware, option=None, *, mitigate=True):
    kernel = [] if option is None else [f'split-lock-detect = "{option}"']
    kernel.append(f"split-lock-mitigate = {str(mitigate).lower()}")
    toml = 'vendor = "intel"\n' + hardware + "[kernel]\n" + "\n".join(kernel) + "\n"
    return SplitLocks(parse(toml, "test.toml"), KernelLog())


@pytest.mark.parametrize(
    ("hardware", "option", "raises_db", "raises_ac"),
    [
        (DB_ONLY, "off", False, False),
        (DB_ONLY, "warn", True, False),
        (DB_ONLY, "fatal", True, False),
        (DB_ONLY, "ratelimit:5", True, False),
        (AC_TOO, "off", False, False),
        (AC_TOO, "warn", False, True),
        (AC_TOO, "fatal", False, True),
        (AC_TOO, "ratelimit:5", True, False),
        (AC_TOO, None, False, True),
        (NEITHER, "fatal", False, False),
        (NEITHER, None, False, False),
    ],
)
def test_what_the_processor_raises(hardware, option, raises_db, raises_ac):
    locks = policy(hardware, option)
    assert (locks.raises_db, locks.raises_ac) == (raises_db, raises_ac)


def test_warn_prints_ten_lines_in_five_seconds():
    locks = policy(DB_ONLY, "warn")
    verdicts = {locks.bus_lock("dosemu", 42, 0x1234, S + at) for at in range(12)}
    assert verdicts == {Verdict.GO_ON}
    line = "x86/split lock detection: #DB: dosemu/42 took a bus_lock trap at address: 0x1234"
    assert list(locks.log) == [line] * 10
    locks.bus_lock("dosemu", 42, 0x1234, 7 * S)
    assert len(locks.log) == 11


def test_fatal_is_sigbus():
    assert policy(DB_ONLY, "fatal").bus_lock("a", 1, 0, S) is Verdict.SIGBUS


def test_off_does_nothing():
    locks = policy(DB_ONLY, "off")
    assert locks.bus_lock("a", 1, 0, S) is Verdict.GO_ON
    assert not locks.log


def test_ratelimit_lets_so_many_of_the_whole_machine_pass_in_a_second():
    locks = policy(AC_TOO, "ratelimit:2")
    verdicts = [locks.bus_lock("a", pid, 0, S + pid) for pid in (1, 2, 3)]
    assert verdicts == [Verdict.GO_ON, Verdict.GO_ON, Verdict.SLEEP]
    assert locks.bus_lock("a", 3, 0, 2 * S + 2) is Verdict.GO_ON
    assert len(locks.log) == 3


def test_one_cpu_at_a_time_is_without_detection():
    locks = policy(AC_TOO, "warn")
    assert locks.detection_off_ns == 8 * MS
    assert locks.let_through("a", S) == 0
    assert locks.let_through("b", S + MS) == 7 * MS
    assert locks.let_through("c", S + 2 * MS) == 14 * MS
    assert locks.let_through("c", S + 8 * MS) == 8 * MS
    assert locks.let_through("b", S + 8 * MS) == 0
    assert locks.let_through("c", S + 16 * MS) == 0


def test_who_is_interrupted_leaves_the_line():
    locks = policy(AC_TOO, "warn")
    assert locks.let_through("a", S) == 0
    assert locks.let_through("b", S)
    assert locks.let_through("c", S)
    locks.leave("b")
    assert locks.let_through("c", S + 8 * MS) == 0


def test_without_mitigation_nobody_waits():
    locks = policy(AC_TOO, "warn", mitigate=False)
    assert [locks.let_through(name, S) for name in "abc"] == [0, 0, 0]


@pytest.mark.parametrize(("option", "kind"), [("fatal", "fatal"), ("ratelimit:9", "bogus")])
def test_the_end_of_a_guest_is_printed_once(option, kind):
    locks = policy(AC_TOO, option)
    locks.refuse("CPU 0/KVM", 7, 0x99)
    locks.refuse("CPU 1/KVM", 7, 0x99)
    line = f"x86/split lock detection: #AC: CPU 0/KVM/7 {kind} split_lock trap at address: 0x99"
    assert list(locks.log) == [line]
