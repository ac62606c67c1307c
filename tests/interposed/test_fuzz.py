"""Random calls. ``KVMSIM_FUZZ=100000 pytest tests/interposed/test_fuzz.py`` makes that many."""

import logging
import os

import pytest

CALLS = int(os.environ.get("KVMSIM_FUZZ", "3000"))


@pytest.mark.parametrize("preset", ["naples15", "milan509-es99", "genoa1006-snp", "spr-buslock"])
def test_random_calls_leave_the_supervisor_alive_and_nothing_charged(
    make_host, compiled, capfd, caplog, preset
):
    host = make_host(preset)
    seed = os.environ.get("KVMSIM_FUZZ_SEED", "1")
    with caplog.at_level(logging.ERROR):
        status = host.run(compiled("fuzz"), seed, CALLS)
    assert (capfd.readouterr().out, status) == ("", 0)
    assert [record.getMessage() for record in caplog.records] == []
    host.assert_nothing_left()
