from selftests.expected import Entry, Expect
from selftests.report import Report
from selftests.runs import Outcome

PASSED = Outcome(Expect.PASS, "", 0.5, "")
FAILED = Outcome(Expect.FAIL, "a.c:1: x", 1.0, "")


def test_results_as_expected_are_summed_up(capsys):
    report = Report(compare=True)
    report.add("one", Entry(Expect.PASS), PASSED, left="")
    report.add("two", Entry(Expect.FAIL, "no guest"), FAILED, left="")
    report.end()
    assert report.as_expected
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["one", "pass", "0.50"]
    assert printed[1].split(maxsplit=3) == ["two", "fail", "1.00", "a.c:1: x"]
    assert printed[2:] == ["", "1 pass, 0 skip, 1 fail", "all as expected"]


def test_result_that_is_not_as_expected_is_named_twice(capsys):
    report = Report(compare=True)
    report.add("one", Entry(Expect.PASS), FAILED, left="")
    report.end()
    assert not report.as_expected
    printed = capsys.readouterr().out
    assert "UNEXPECTED: expected pass; a.c:1: x" in printed
    assert "not as expected: one" in printed


def test_nothing_deviates_where_nothing_is_compared(capsys):
    report = Report(compare=False)
    report.add("one", Entry(Expect.PASS), FAILED, left="")
    report.end()
    assert report.as_expected
    assert "expected" not in capsys.readouterr().out
