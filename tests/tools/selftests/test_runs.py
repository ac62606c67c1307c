import sys
from textwrap import dedent

import pytest
from selftests.expected import Expect
from selftests.runs import reason, run, verdict

FAILED = dedent("""\
    Random seed: 0x6b8b4567
    ==== Test Assertion Failure ====
      x86_64/set_sregs_test.c:84: !rc
      pid=4021 tid=4021 errno=22 - Invalid argument
         1	0x0000000000402b5e: check at set_sregs_test.c:84
         2	 (inlined by) main at set_sregs_test.c:97
         3	0x00007f0c3a2456c9: ?? ??:0
      KVM_SET_SREGS failed
""")


@pytest.mark.parametrize(
    ("status", "result"),
    [(0, Expect.PASS), (4, Expect.SKIP), (1, Expect.FAIL), (254, Expect.FAIL), (-6, Expect.FAIL)],
)
def test_exit_status_tells_the_verdict(status, result):
    assert verdict(status) is result


def test_pass_needs_no_reason():
    assert reason(0, "1..0 # SKIP - nothing") == ""


def test_skip_names_the_requirement():
    output = "Random seed: 1\n1..0 # SKIP - Requirement not met: kvm_cpu_has(X86_FEATURE_SEV)\n"
    assert reason(4, output) == "kvm_cpu_has(X86_FEATURE_SEV)"


def test_skip_of_the_library_is_told_in_its_words():
    assert reason(4, "1..0 # SKIP - /dev/sev not available, skipping test\n") == (
        "/dev/sev not available"
    )


def test_skip_that_does_not_say_so_is_told_by_the_last_line():
    assert reason(4, "Random seed: 1\nHUGETLB is not enabled\n") == "HUGETLB is not enabled"


def test_skip_without_a_word_is_told_as_such():
    assert reason(4, "") == "gives no reason"


def test_failed_assertion_is_told_by_place_condition_and_message():
    assert reason(254, FAILED) == "set_sregs_test.c:84: !rc: KVM_SET_SREGS failed"


def test_failed_assertion_that_is_cut_short_is_told_by_its_place():
    assert reason(254, "==== Test Assertion Failure ====\n  a.c:1: x\n") == "a.c:1: x"


def test_failure_without_assertion_is_told_by_the_last_line():
    assert reason(1, "one\ntwo\n\n") == "two"


@pytest.mark.parametrize("status", [-6, 134])
def test_death_by_signal_names_the_signal(status):
    assert reason(status, "") == "signal 6: printed nothing"


def test_program_that_ends_in_time_gives_its_output(tmp_path):
    outcome = run(["sh", "-c", "echo said; exit 4"], 20, str(tmp_path))
    assert (outcome.result, outcome.output) == (Expect.SKIP, "said\n")


def test_program_that_does_not_end_fails_and_its_children_are_ended(tmp_path):
    # A child in a process group of its own, deaf to SIGTERM, as a selftest may leave one.
    program = dedent("""\
        import os, signal, time
        child = os.fork()
        os.setpgid(0, 0) if child == 0 else print(child, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if child == 0 else signal.SIG_DFL)
        time.sleep(60)
    """)
    outcome = run([sys.executable, "-c", program], 1, str(tmp_path))
    assert (outcome.result, outcome.why) == (Expect.FAIL, "no end within 1 s")
    assert not is_running(int(outcome.output))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
