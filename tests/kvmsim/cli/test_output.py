import pytest

from kvmsim.cli.info import duration
from kvmsim.cli.vm import start_command, table
from kvmsim.engine.synthetic import parse_guest


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0.000 s"),
        (1_250_999_999, "1.250 s"),
        (59_999_999_999, "59.999 s"),
        (245 * 10**9, "4 min 05 s"),
        (7_380 * 10**9, "2 h 03 min"),
    ],
)
def test_duration_has_two_units_at_most(ns, text):
    assert duration(ns) == text


def test_columns_are_as_wide_as_their_widest_cell():
    assert table([("A", "LONG"), ("wide", "b")]) == ["A     LONG", "wide  b"]


@pytest.mark.parametrize(
    "guest", ["idle", "busy", "buslock rate=5000", "mixed buslock=100 io=50 mmio=20 hlt=10"]
)
def test_help_of_start_shows_every_kind_of_guest(guest):
    assert f"  {guest} " in f"{start_command.help}".replace("\n", " \n")
    assert parse_guest(guest).text == guest
