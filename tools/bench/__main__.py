"""Our cgroup files beside the machine's own, lxcfs, and the best FUSE can do, in one run.

Client and servers share one CPU; the worlds take turns; a figure is the median over the turns.
What this machine cannot show is a dash, with its reason below the table.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import clients
import engines
import figures
import report
import rows
import spinning
import worlds

ALL_WORLDS: dict[str, Callable[[Path], AbstractContextManager[worlds.World]]] = {
    "kernel": worlds.kernel,
    "lxcfs": worlds.lxcfs,
    "C libfuse": worlds.c_libfuse,
    "cgfs": worlds.ours,
}
ALL_FIGURES = {**figures.FIGURES, **clients.FIGURES, **spinning.FIGURES, **engines.FIGURES}


def main() -> int:
    """Runs the benchmark and returns the exit status: 0 all goals met, 1 one was missed."""
    options = _parser().parse_args()
    cpu = min(os.sched_getaffinity(0)) if options.cpu is None else options.cpu
    os.sched_setaffinity(0, {cpu})
    with contextlib.suppress(PermissionError):
        os.nice(-15)  # what else the machine does should not count
    # Leave the `with` statements below by the ordinary way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = report.Results()
    with tempfile.TemporaryDirectory(prefix="bench.") as directory:
        scratch = Path(directory)
        wanted = options.only or [row.key for row in rows.ROWS] + list(ALL_FIGURES)
        try:
            _measure_rows(wanted, scratch, results, quick=options.quick)
        except worlds.MissingWorldError as error:
            results.missing.append(str(error))
        for key in wanted:
            if key in ALL_FIGURES:
                _measure_figure(key, scratch, results, quick=options.quick)
    print(report.as_markdown(results) if options.markdown else report.as_text(results))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(results), indent=2) + "\n")
    return 0 if report.met(results) else 1


def _parser() -> argparse.ArgumentParser:
    keys = [row.key for row in rows.ROWS] + list(ALL_FIGURES)
    parser = argparse.ArgumentParser("tools/bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=keys, help="one row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="short turns, small trees: a look")
    parser.add_argument("--cpu", type=int, help="the CPU that client and servers share")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--markdown", action="store_true", help="print for docs/performance.md")
    return parser


def _measure_rows(
    wanted: list[str], scratch: Path, results: report.Results, *, quick: bool
) -> None:
    """Brings all worlds up and measures the wanted rows of the table."""
    chosen = [row for row in rows.ROWS if row.key in wanted]
    if not chosen:
        return
    setting = rows.Setting(
        client=worlds.compiled("client", scratch),
        rounds=3 if quick else 9,
        turn_ms=60 if quick else 250,
    )
    with contextlib.ExitStack() as stack:
        present = list(_bring_up(stack, scratch, results))
        for row in chosen:
            cells = rows.measure(row, present, setting)
            results.rows.append((row, cells))
            results.missing += [
                f"{row.title}: {name}: {reason}" for name, reason in cells.why_not.items()
            ]


def _bring_up(
    stack: contextlib.ExitStack, scratch: Path, results: report.Results
) -> Iterator[worlds.World]:
    for name, world in ALL_WORLDS.items():
        try:
            yield stack.enter_context(world(scratch))
        except worlds.MissingWorldError as error:
            results.missing.append(f"{name}: {error}")


def _measure_figure(key: str, scratch: Path, results: report.Results, *, quick: bool) -> None:
    own = scratch / key
    own.mkdir()
    try:
        results.figures += ALL_FIGURES[key](own, quick)
    except (worlds.MissingWorldError, OSError) as error:
        results.missing.append(f"{key}: {error}")


if __name__ == "__main__":
    sys.exit(main())
