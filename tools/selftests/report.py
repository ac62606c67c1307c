"""The table that is printed while the tests run, and the sums below it."""

from collections import Counter

from selftests.expected import Entry, Expect, deviation
from selftests.runs import Outcome

WIDTH = 40


class Report:
    """Prints a line per test.

    Args:
        compare: Whether results are compared with the list.

    Attributes:
        as_expected: Whether every result so far was.
    """

    def __init__(self, *, compare: bool) -> None:
        self.as_expected = True
        self._compare = compare
        self._results: Counter[Expect] = Counter()
        self._deviating: list[str] = []

    def add(self, name: str, entry: Entry, outcome: Outcome, *, left: str) -> None:
        """One test has ended."""
        self._results[outcome.result] += 1
        wrong = deviation(entry, outcome.result, left) if self._compare else ""
        if wrong:
            self.as_expected = False
            self._deviating.append(name)
        print(line(name, outcome, wrong), flush=True)

    def end(self) -> None:
        """Prints the sums."""
        sums = ", ".join(f"{self._results[result]} {result}" for result in Expect if
                         result is not Expect.OMIT)  # fmt: skip
        print(f"\n{sums}")
        if not self._compare:
            return
        names = ", ".join(self._deviating)
        print(f"not as expected: {names}" if names else "all as expected")


def line(name: str, outcome: Outcome, wrong: str) -> str:
    """Returns a line of the table: test, result, seconds, and what there is to say."""
    notes = "; ".join(
        note for note in (f"UNEXPECTED: {wrong}" if wrong else "", outcome.why) if note
    )
    return f"{name:{WIDTH}} {outcome.result:5}{outcome.seconds:7.2f}  {notes}".rstrip()
