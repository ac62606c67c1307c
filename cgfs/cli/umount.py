"""``cgfs umount DIR``."""

from pathlib import Path

import click

from cgfs.control.place import Cleared, clear


@click.command("umount")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
def umount_command(directory: Path) -> None:
    """Unmount a cgroup tree and end the process that serves it.

    Also clears what a process that died has left behind. A mount that is in use disappears from
    DIR at once, and for its users when they leave it.
    """
    tell_users("cgfs", clear(directory, "cgfs"))


def tell_users(program: str, cleared: Cleared) -> None:
    """Notes on standard error who still has something of a cleared mount open."""
    if cleared.users:
        names = ", ".join(f"{user.name} (pid {user.pid})" for user in cleared.users[:3])
        more = f" and {len(cleared.users) - 3} more" if len(cleared.users) > 3 else ""
        click.echo(f"{program}: {cleared.directory} was still in use by {names}{more}", err=True)
