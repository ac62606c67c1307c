"""``kvmsim lbr take|release``."""

from pathlib import Path

import click

from kvmsim.cli.hosts import connect, host_option
from kvmsim.control.messages import LbrState


@click.group("lbr")
def lbr_group() -> None:
    """Let a program of the host take the last-branch records away from guests.

    As ``perf record -b -a`` does on a real host: a guest that uses its records reads 0 from then
    on.
    """


@lbr_group.command("take")
@host_option
def take_command(host: Path | None) -> None:
    """Take the records of all CPUs, until ``kvmsim lbr release``."""
    _set(host, taken=True)


@lbr_group.command("release")
@host_option
def release_command(host: Path | None) -> None:
    """Give them back; a guest gets them when it has been without for a while."""
    _set(host, taken=False)


def _set(host: Path | None, *, taken: bool) -> None:
    with connect(host) as client:
        client.call("host.lbr", LbrState(taken), LbrState)
