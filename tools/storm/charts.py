"""The rate over time: in the terminal, and as a picture. Both are logarithmic."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from storm.phases import Phase
from storm.samples import Rate, Sample, mean

BLOCKS = " ▁▂▃▄▅▆▇█"
COLOURS = ("red", "yellow", "cyan", "green", "magenta")
#: The lowest rate that is drawn; below it there is nothing.
LOWEST = 10.0
MARGIN = 10


def terminal(rates: Sequence[Rate], width: int, height: int, seconds: float) -> Text:
    """Returns a chart of so many columns and rows.

    Args:
        rates: what to draw; a column shows the rate at the time it begins.
        width: columns, with the scale.
        height: rows of the chart; one more names the time.
        seconds: time at the right edge.
    """
    columns = max(1, width - MARGIN)
    decades = max(1, math.ceil(math.log10(max([100.0, *(r.per_second for r in rates)]) / LOWEST)))
    shown = [_at(rates, column * seconds / columns) for column in range(columns)]
    eighths = [_eighths(rate, height, decades) for rate in shown]
    chart = Text(no_wrap=True)
    for row in reversed(range(height)):
        chart.append(_label(row, height, decades))
        for rate, filled in zip(shown, eighths, strict=True):
            block = BLOCKS[min(8, max(0, filled - 8 * row))]
            chart.append(block, COLOURS[rate.phase % len(COLOURS)] if rate else "")
        chart.append("\n")
    last = f"{seconds:.0f} s"
    chart.append(f"{'0 s':>{MARGIN + 2}}{last:>{max(len(last) + 1, columns - 2)}}\n")
    return chart


def _at(rates: Sequence[Rate], second: float) -> Rate | None:
    return next((rate for rate in rates if rate.begin <= second < rate.end), None)


def _eighths(rate: Rate | None, height: int, decades: int) -> int:
    if rate is None or rate.per_second <= LOWEST:
        return 0
    return max(1, round(math.log10(rate.per_second / LOWEST) / decades * height * 8))


def _label(row: int, height: int, decades: int) -> str:
    """The scale: a power of ten where the row's lower edge passes one."""
    for decade in range(decades):
        if row == round(decade * height / decades):
            return f"{int(LOWEST * 10**decade):>{MARGIN - 3},} ┤ "
    return " " * (MARGIN - 2) + "│ "


def summary(phases: Sequence[Phase], samples: Sequence[Sample]) -> Table:
    """Returns the phases with the rate of each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("limit")
    table.add_column("at most/s", justify="right")
    table.add_column("bus locks/s", justify="right")
    for number, phase in enumerate(phases):
        limit = "" if phase.at_most is None else f"{phase.at_most:,}"
        colour = COLOURS[number % len(COLOURS)]
        table.add_row(Text(phase.title, colour), limit, f"{mean(samples, number):,.0f}")
    return table


def picture(file: Path, phases: Sequence[Phase], rates: Sequence[Rate]) -> None:
    """Writes the chart as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - takes half a second, and may not be there

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 - after the choice of what draws

    figure, axes = pyplot.subplots(figsize=(10, 5), dpi=120, layout="constrained")
    for number, phase in enumerate(phases):
        own = [rate for rate in rates if rate.phase == number]
        if not own:
            continue
        edges = [own[0].begin, *(rate.end for rate in own)]
        colour = f"C{number}"
        heights = [rate.per_second for rate in own]
        axes.stairs(heights, edges, baseline=None, color=colour, label=phase.title)
        axes.axvspan(edges[0], edges[-1], color=colour, alpha=0.08, linewidth=0)
        if phase.at_most is not None:
            axes.hlines(phase.at_most, edges[0], edges[-1], color=colour, linestyles="dashed")
    axes.set_yscale("symlog", linthresh=LOWEST)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("bus locks per second")
    axes.set_title("A split-lock storm in QEMU on an emulated host (dashed: the limit)")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file)
    pyplot.close(figure)
