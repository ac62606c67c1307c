"""Runs Linux's KVM selftests under `kvmsim run` and compares with the list of what is expected.

The first call fetches Debian's package of the kernel source, as an ordinary user too, and builds
the tests in the user's cache directory. Exit status: 0 all as expected, 1 something else than
expected, 64 there is no such test or the list is wrong, 69 they cannot be built or run here.
"""

import argparse
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from selftests import source, worlds
from selftests.expected import Entry, Expect, ListError, load, wanted
from selftests.report import Report
from selftests.runs import run

LIST = Path(__file__).with_name("selftests") / "expected.toml"


def main() -> int:
    """Runs what is asked for; returns the exit status."""
    options = _parser().parse_args()
    # Leave the `with` statements below by the ordinary way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        directory = source.programs(source.cache_directory())
        if options.build:
            print(directory)
            return 0
        return _run_all(options, directory, load(LIST))
    except source.UnavailableError as reason:
        print(f"run_selftests: {reason}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    except ListError as error:
        print(f"run_selftests: {error}", file=sys.stderr)
        return os.EX_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tools/run_selftests", description=(__doc__ or "").partition("\n")[0]
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="those marked quick in the list")
    which.add_argument("--only", metavar="NAME", action="append", help="one; may be repeated")
    which.add_argument("--build", action="store_true", help="only build; print where they are")
    parser.add_argument(
        "--real", action="store_true", help="on the machine's own /dev/kvm; compares with nothing"
    )
    parser.add_argument("--preset", help="machine for all of them (default: as the list says)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what every test prints here")
    return parser


def _run_all(options: argparse.Namespace, directory: Path, listed: dict[str, Entry]) -> int:
    programs = source.found(directory)
    report = Report(compare=not options.real)
    names = wanted(sorted(programs), listed, quick=options.quick, only=options.only)
    with tempfile.TemporaryDirectory(prefix="selftests.") as scratch, ExitStack() as stack:
        started: dict[str, worlds.World] = {}
        for name in names:
            entry = listed.get(name, Entry(Expect.PASS, "not in the list"))
            preset = "" if options.real else options.preset or entry.preset
            if preset not in started:
                made = worlds.emulated(Path(scratch), preset) if preset else worlds.real()
                started[preset] = stack.enter_context(made)
            world = started[preset]
            outcome = run([*world.command, str(programs[name])], entry.timeout_s, scratch)
            report.add(name, entry, outcome, left=world.left_behind())
            if options.logs is not None:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{name}.log").write_text(outcome.output)
    report.end()
    return 0 if report.as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
