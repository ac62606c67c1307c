"""What every command of this distribution has in common.

Subcommands are imported when they are called, so that a command loads only what it needs. A
failure is one line on standard error and a sysexits code.
"""

import importlib
import os
import sys
from collections.abc import Mapping

import click

from cgfs.control.errors import CommandError, from_oserror

INTERRUPTED = 130


class LazyGroup(click.Group):
    """A command group that knows its subcommands as ``"module:attribute"``.

    Args:
        name: of the group.
        help: one line about it.
        subcommands: what it shows.
        hidden_subcommands: what can be called besides.
    """

    def __init__(
        self,
        name: str,
        *,
        help: str,
        subcommands: Mapping[str, str],
        hidden_subcommands: Mapping[str, str] | None = None,
    ) -> None:
        names = {"help_option_names": ["-h", "--help"]}
        # A missing command is a failure like any other: one line.
        super().__init__(name, help=help, no_args_is_help=False, context_settings=names)
        self.subcommands = {**subcommands, **(hidden_subcommands or {})}
        self._shown = sorted(subcommands)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, without importing anything."""
        return self._shown

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports one subcommand."""
        target = self.subcommands.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


def run_command(command: click.Command, program: str, arguments: list[str]) -> int:
    """Runs a command and returns its exit code; prints the one line if it fails."""
    _open_standard_streams()
    try:
        result = command.main(arguments, prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader such as head(1) has seen enough; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_IOERR
    except (CommandError, click.ClickException, click.Abort, KeyboardInterrupt, OSError) as error:
        message, code = explain(error, program)
        click.echo(f"{program}: {' '.join(message.split())}", err=True)
        return code
    return result if isinstance(result, int) else os.EX_OK


def _open_standard_streams() -> None:
    """Gives a command called with ``>&-`` something to write to.

    Python leaves None for a stream that is closed, and the next file or pipe that is opened would
    take its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The lowest number that is free, which is this one.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, "w" if number else "r"))


def explain(error: BaseException, program: str) -> tuple[str, int]:
    """The line and the exit code for what ended a command."""
    match error:
        case CommandError():
            return error.message, error.exit_code
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else program
            return f"{error.format_message()} (see '{path} --help')", os.EX_USAGE
        case click.ClickException():
            return error.format_message(), os.EX_USAGE
        case OSError():
            known = from_oserror(error, str(error.filename or "system error"))
            return known.message, known.exit_code
        case _:
            return "interrupted", INTERRUPTED


def print_json(value: object) -> None:
    """Prints a snapshot as indented JSON."""
    import msgspec  # noqa: PLC0415 - only --json needs the formatter

    from cgfs.control.protocol import encode_shown  # noqa: PLC0415 - as above

    click.echo(msgspec.json.format(encode_shown(value), indent=2).decode())
