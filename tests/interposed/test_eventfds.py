"""Interrupts and answers by eventfds, between a guest and the program that made it."""

import pytest

from kvmsim.interpose import Emulated

pytest.importorskip("unicorn")


def test_guest_takes_an_interrupt_per_signal_and_answers_by_another(make_host, compiled, capfd):
    host = make_host()
    host.emulated = Emulated(host.system, executes=True)
    assert host.run(compiled("eventfds")) == 0
    assert capfd.readouterr().out == "0 exits\n"
    host.assert_nothing_left()
