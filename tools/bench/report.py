"""The results as a table for people, as Markdown for the docs, and as JSON for programs."""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from figures import Figure
from rows import OURS, Cells, Goal, Row

COLUMNS = (OURS, "kernel", "C libfuse", "lxcfs")
NONE = "-"


@dataclass
class Results:
    """Everything that one run found.

    Attributes:
        rows: The rows that were measured, in the order of the table.
        figures: The lines below the table.
        missing: What is not there, and why.
    """

    rows: list[tuple[Row, Cells]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def machine() -> str:
    """Returns the machine in words: processor, number of CPUs, kernel, Python."""
    model = "unknown processor"
    hypervisor = ""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = sum(line.startswith("processor") for line in cpuinfo)
    for line in cpuinfo:
        name, _colon, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        if name.strip() == "flags" and "hypervisor" in value.split():
            hypervisor = " of a virtual machine"
    release = ".".join(platform.release().split("-", maxsplit=1)[0].split(".")[:2])
    return f"{model}, {cpus} CPUs{hypervisor}, Linux {release}, Python {platform.python_version()}"


def ratio(cells: Cells, goal: Goal) -> float | None:
    """Returns how many times the other world ours took; None where one of them is missing."""
    if OURS not in cells.ns or goal.of not in cells.ns:
        return None
    return cells.ns[OURS] / cells.ns[goal.of]


def met(results: Results) -> bool:
    """Returns whether no goal is missed; what could not be measured does not count."""
    ratios = ((ratio(cells, goal), goal) for row, cells in results.rows for goal in row.goals)
    return all(seen is None or seen <= goal.ratio for seen, goal in ratios) and all(
        figure.met for figure in results.figures
    )


def _goal_text(goal: Goal) -> str:
    return f"{goal.ratio:g}x {goal.of}"


def _seen_text(cells: Cells, goal: Goal) -> str:
    seen = ratio(cells, goal)
    if seen is None:
        return NONE
    return f"{seen:.2f}x" + ("" if seen <= goal.ratio else " (missed)")


def table(results: Results) -> list[list[str]]:
    """Returns the table's cells, its heading first; times in microseconds."""
    lines = [["work (µs)", *COLUMNS, "at most", "seen"]]
    for row, cells in results.rows:
        times = [f"{cells.ns[name] / 1000:.1f}" if name in cells.ns else NONE for name in COLUMNS]
        goals = ", ".join(_goal_text(goal) for goal in row.goals)
        seen = ", ".join(_seen_text(cells, goal) for goal in row.goals)
        lines.append([row.title, *times, goals, seen])
    return lines


def _figure_lines(figures: Iterable[Figure]) -> list[str]:
    return [
        f"{figure.title}: {figure.value} ({figure.goal}{'' if figure.met else ': missed'})"
        for figure in figures
    ]


def as_text(results: Results) -> str:
    """Returns the results for a terminal."""
    lines = table(results)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [machine(), ""]
    if results.rows:
        text += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
    text += _figure_lines(results.figures)
    text += [f"not measured: {reason}" for reason in results.missing]
    return "\n".join(text)


def as_markdown(results: Results) -> str:
    """Returns the results for docs/performance.md."""
    heading, *body = table(results)
    text = [f"Measured on: {machine()}.", ""]
    text.append(_markdown_line(heading))
    text.append(_markdown_line(["---", *["---:"] * len(COLUMNS), "---", "---"]))
    text += [_markdown_line(line) for line in body]
    text.append("")
    text += [f"* {line}" for line in _figure_lines(results.figures)]
    text += [f"* not measured: {reason}" for reason in results.missing]
    return "\n".join(text)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_json(results: Results) -> dict[str, object]:
    """Returns the results as plain values."""
    return {
        "machine": machine(),
        "rows": [
            {
                "row": row.key,
                "title": row.title,
                "ns": cells.ns,
                "why_not": cells.why_not,
                "goals": [{**asdict(goal), "seen": ratio(cells, goal)} for goal in row.goals],
            }
            for row, cells in results.rows
        ],
        "figures": [asdict(figure) for figure in results.figures],
        "missing": results.missing,
    }
