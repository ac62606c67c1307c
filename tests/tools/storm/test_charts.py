import pytest
from storm import charts
from storm.phases import PHASES
from storm.samples import Rate, Sample

FALLING = [Rate(0.0, 1.0, 10_000.0, 0), Rate(1.0, 2.0, 100.0, 1), Rate(2.0, 3.0, 0.0, 1)]


def column(chart, second, width=30, seconds=3.0):
    """What stands above a second, from the top down."""
    at = charts.MARGIN + int(second * (width - charts.MARGIN) / seconds)
    return "".join(line[at] for line in chart.plain.splitlines()[:-1])


def test_terminal_chart_is_logarithmic():
    chart = charts.terminal(FALLING, 30, 6, 3.0)
    assert column(chart, 0.5) == "██████"  # three decades above the lowest rate
    assert column(chart, 1.5) == "    ██"  # one of the three
    assert column(chart, 2.5) == "      "


def test_terminal_chart_fits_its_width():
    chart = charts.terminal(FALLING, 30, 6, 3.0)
    assert {len(line) for line in chart.plain.splitlines()} == {30}


def test_terminal_chart_of_nothing_has_its_scale():
    chart = charts.terminal([], 30, 6, 3.0)
    assert "10 ┤" in chart.plain


def test_summary_has_the_mean_of_each_phase():
    samples = [Sample(0.0, 0, 1), Sample(2.0, 4_000, 1)]
    cells = list(charts.summary(PHASES, samples).columns[2].cells)
    assert cells == ["0", "2,000", "0", "0"]


def test_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (tools/setup demo)")
    charts.picture(tmp_path / "rates.png", PHASES, FALLING)
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
