"""Clients whose private memory becomes a guest's while they use it."""

from dataclasses import replace

import pytest


@pytest.fixture
def host(make_host):
    made = make_host("lab-intel")
    made.emulated = replace(made.emulated, executes=True)
    yield made
    made.assert_nothing_left()


@pytest.mark.parametrize("case", ["completed", "executable", "torn", "twice", "busy"])
def test_client_notices_nothing_of_pages_that_are_replaced(host, compiled, capfd, case):
    status = host.run(compiled("remap"), case)
    assert (*capfd.readouterr(), status) == ("", "", 0)


def test_memory_is_replaced_though_the_first_thread_has_ended(host, compiled, capfd, monkeypatch):
    def copied(*_):
        raise AssertionError

    monkeypatch.setattr("kvmsim.interpose.guest_memory.Copy", copied)
    status = host.run(compiled("remap"), "leaderless")
    assert (*capfd.readouterr(), status) == ("done\n", "", 0)
