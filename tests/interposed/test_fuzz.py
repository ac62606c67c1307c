"""Random calls. ``KVMSIM_FUZZ=100000 pytest tests/interposed/test_fuzz.py`` makes that many."""

import logging
import os

CALLS = int(os.environ.get("KVMSIM_FUZZ", "3000"))


def test_random_calls_leave_the_supervisor_alive_and_nothing_charged(
    halted, compiled, capfd, caplog
):
    seed = os.environ.get("KVMSIM_FUZZ_SEED", "1")
    with caplog.at_level(logging.ERROR):
        status = halted.run(compiled("fuzz"), seed, CALLS)
    assert (capfd.readouterr().out, status) == ("", 0)
    assert [record.getMessage() for record in caplog.records] == []
