import os
import subprocess
import sys

import click
import pytest

from cgfs.cli.frame import LazyGroup, run_command
from cgfs.control.errors import CommandError


@click.command("sub")
@click.option("--raise", "what")
@click.option("--count", type=int)
def sub(what, count):
    errors = {
        "failure": CommandError("one\nline", os.EX_TEMPFAIL),
        "oserror": FileNotFoundError(2, "No such file or directory", "/x"),
        "abort": click.Abort(),
        "interrupt": KeyboardInterrupt(),
    }
    if what:
        raise errors[what]
    click.echo(f"done {count}")


group = LazyGroup("prog", help="A program.", subcommands={"sub": f"{__name__}:sub"})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """What a lazy group imports is this module, which has no importable name in a test run."""
    monkeypatch.setattr(LazyGroup, "get_command", lambda _self, _ctx, name: {"sub": sub}.get(name))


def outcome(capsys, *arguments):
    code = run_command(group, "prog", list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_success_is_zero(capsys):
    assert outcome(capsys, "sub", "--count", "3") == (0, "done 3\n", "")


def test_failure_is_one_line_with_its_exit_code(capsys):
    assert outcome(capsys, "sub", "--raise", "failure") == (75, "", "prog: one line\n")


def test_system_error_names_the_file(capsys):
    code, _, err = outcome(capsys, "sub", "--raise", "oserror")
    assert (code, err) == (os.EX_UNAVAILABLE, "prog: /x: No such file or directory\n")


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["sub", "--nonsense"], ["sub", "--count", "x"], ["sub", "extra"]],
)
def test_usage_error_is_64_and_one_line(capsys, arguments):
    code, out, err = outcome(capsys, *arguments)
    assert (code, out, err.count("\n")) == (os.EX_USAGE, "", 1)
    assert err.startswith("prog: ")


@pytest.mark.parametrize("how", ["abort", "interrupt"])
def test_interrupted_command_is_130(capsys, how):
    assert outcome(capsys, "sub", "--raise", how)[0] == 130


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_command_with_closed_streams_does_its_work(closed):
    script = f'exec "$0" -m cgfs --help {closed}'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_is_no_failure(capsys):
    code, out, err = outcome(capsys, "--help")
    assert (code, err) == (0, "")
    assert "Usage: prog" in out
