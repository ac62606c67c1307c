"""Random guests on our engine and on Bochs. ``KVMSIM_FUZZ=100000`` runs that many.

``KVMSIM_FUZZ_SEED`` chooses others. Each failure prints the guest; ``Case`` in ``machine`` is what
``fuzz.subject.Subject().run`` takes.
"""

import importlib.util
import os
import random

import pytest
from fuzz.compare import Worker, differences
from fuzz.streams import Streams

GUESTS = int(os.environ.get("KVMSIM_FUZZ", "150"))
SEED = int(os.environ.get("KVMSIM_FUZZ_SEED", "1"))
#: Guests whose outcome the second engine cannot tell, or that do what is known to differ.
LEAST_COMPARED = 0.5

pytest.importorskip("unicorn")


@pytest.fixture
def worker():
    made = []

    def start(module):
        made.append(Worker(module))
        return made[-1]

    yield start
    for process in made:
        process.close()


def needs_bochs():
    if importlib.util.find_spec("bochscpu") is None:
        pytest.skip("bochscpu-python is not installed: no second engine to compare with")


@pytest.mark.timeout(max(60, GUESTS // 10))
def test_random_guests_end_as_on_a_second_engine(worker):
    needs_bochs()
    ours, theirs = worker("fuzz.subject"), worker("fuzz.second")
    streams = Streams(random.Random(SEED))
    compared, different = 0, []
    for _ in range(GUESTS):
        case = streams.case()
        one, other = ours.run(case), theirs.run(case)
        compared += other.kind != "skip" and not other.known
        found = differences(one, other, case)
        if found:
            different.append((case, found))
    assert different == []
    assert ours.deaths == 0
    assert compared >= LEAST_COMPARED * GUESTS


@pytest.mark.parametrize("engine", ["fuzz.subject", "fuzz.second"])
def test_how_a_guest_ends_does_not_depend_on_those_before_it(worker, engine):
    needs_bochs()
    streams = Streams(random.Random(7))
    cases = [streams.case() for _ in range(100)]
    one, other = worker(engine), worker(engine)
    outcomes = [one.run(case) for case in cases]
    assert [other.run(case) for case in reversed(cases)] == outcomes[::-1]


@pytest.mark.timeout(max(60, GUESTS // 20))
def test_random_guests_neither_hang_nor_kill_the_engine(worker):
    ours = worker("fuzz.subject")
    streams = Streams(random.Random(SEED + 1))
    fatal = []
    for _ in range(GUESTS * 2):
        case = streams.case()
        if ours.run(case).kind == "died":
            fatal.append((case.mode, case.code.hex()))
    assert fatal == []
