"""``kvmsim down DIR``."""

from pathlib import Path

import click

from cgfs.cli.umount import tell_users
from cgfs.control.place import clear
from kvmsim.cli.hosts import KIND


@click.command("down")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
def down_command(directory: Path) -> None:
    """Stop the host on DIR with all its VMs, and unmount it.

    Also clears what a host that died has left behind. A mount that is in use disappears from DIR at
    once; whoever uses it is named, and finds it gone.
    """
    tell_users(KIND, clear(directory, KIND))
