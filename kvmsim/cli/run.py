"""``kvmsim run -- CMD``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from cgfs.cli.groups import group_directory
from cgfs.control.errors import CommandError, from_oserror
from kvmsim.cli.hosts import find_host, host_option
from kvmsim.errors import ConfigError

if TYPE_CHECKING:
    from kvmsim.supervise.script import Script

CGROUP = "sys/fs/cgroup"
SCRIPT = "script:"
CODE, HALT = "x86", "halt"


@click.command(
    "run",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "allow_interspersed_args": False,
    },
)
@host_option
@click.option("--cgroup", metavar="G", help="Start in this cgroup of the host, such as /tenant.")
@click.option(
    "--guest",
    default=CODE,
    metavar="WHAT",
    help="What guests do: x86 (the code in their memory, the default), halt, or script:FILE, "
    "which also says what calls fail.",
)
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one JSON object per call.",
)
@click.option(
    "--passthrough", is_flag=True, help="Use the machine's own /dev/kvm; for --trace alone."
)
@click.option(
    "--answer-cap",
    "answers",
    multiple=True,
    metavar="CAP=VALUE",
    help="With --passthrough: answer KVM_CHECK_EXTENSION of this capability here.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="CMD...")
def run_command(
    host: Path | None,
    cgroup: str | None,
    guest: str,
    trace_file: Path | None,
    passthrough: bool,
    answers: tuple[str, ...],
    command: tuple[str, ...],
) -> int:
    """Run a program whose /dev/kvm and /dev/sev are the emulated host's.

    The exit status is the program's; 128 and a signal's number if one ended it.
    """
    capabilities = dict(_answer(text) for text in answers)
    if passthrough and (cgroup or guest != CODE):
        raise click.UsageError("--passthrough has no host: it goes without --cgroup and --guest")
    if capabilities and not passthrough:
        raise click.UsageError("--answer-cap goes with --passthrough")
    trace = _open_trace(trace_file)
    try:
        if passthrough:
            return _pass_through(command, capabilities, trace)
        return _emulate(command, host, cgroup, guest, trace)
    finally:
        if trace is not None:
            trace.close()


def _emulate(
    command: tuple[str, ...],
    host: Path | None,
    cgroup: str | None,
    guest: str,
    trace: IO[bytes] | None,
) -> int:
    from kvmsim.interpose import CommandNotRun  # noqa: PLC0415 - loads trio
    from kvmsim.supervise.client import ClientOptions, run_client  # noqa: PLC0415

    script = _script(guest) if guest not in {CODE, HALT} else None
    runtime, entry = find_host(host)
    tree = Path(entry.directory) / CGROUP
    options = ClientOptions(
        argv=command,
        socket=runtime.socket(Path(entry.directory)),
        procs=group_directory(tree, cgroup) / "cgroup.procs" if cgroup is not None else None,
        cgroup_dir=tree if cgroup is not None else None,
        script=script,
        executes=guest == CODE,
        trace=trace,
    )
    try:
        return run_client(options)
    except CommandNotRun as error:
        raise _not_run(error) from error


def _pass_through(
    command: tuple[str, ...], capabilities: dict[int, int], trace: IO[bytes] | None
) -> int:
    from kvmsim.interpose import CommandNotRun, Unavailable  # noqa: PLC0415 - loads trio
    from kvmsim.supervise.passthrough import pass_through  # noqa: PLC0415

    try:
        return pass_through(command, capabilities, trace)
    except Unavailable as reason:
        raise CommandError(str(reason)) from reason
    except CommandNotRun as error:
        raise _not_run(error) from error


def _not_run(error: Exception) -> CommandError:
    number = getattr(error, "errno", 0)
    # As a shell has it: 127 not found, 126 not executable.
    return CommandError(str(error), 127 if number == 2 else 126, number)


def _script(guest: str) -> Script:
    from kvmsim.supervise import script  # noqa: PLC0415 - loads the ABI tables

    if not guest.startswith(SCRIPT):
        raise click.UsageError(f'--guest {guest}: not {CODE}, {HALT} or "{SCRIPT}" and a file')
    path = Path(guest.removeprefix(SCRIPT))
    try:
        text = path.read_text()
    except OSError as error:
        raise from_oserror(error, f"cannot read {path}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not a text file", os.EX_CONFIG) from error
    try:
        return script.parse(text, str(path))
    except ConfigError as mistake:
        raise CommandError(str(mistake), os.EX_CONFIG) from mistake


def _answer(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})=([0-9]{1,9})", text)
    if found is None:
        raise click.UsageError(f"--answer-cap {text}: not a number, '=' and a number")
    return int(found[1]), int(found[2])


def _open_trace(path: Path | None) -> IO[bytes] | None:
    if path is None:
        return None
    try:
        return path.open("wb", buffering=0)  # whoever watches sees every call
    except OSError as error:
        raise from_oserror(error, f"cannot write {path}") from error
