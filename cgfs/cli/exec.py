"""``cgfs exec -g GROUP -- CMD``."""

import os
from pathlib import Path

import click

from cgfs.cli.groups import group_directory, running_tree, tree_root
from cgfs.control.errors import CommandError, from_oserror

NOT_FOUND = 127
NOT_EXECUTABLE = 126


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.option("-g", "--group", required=True, help="cgroup to run in, such as /tenant.")
@click.option(
    "--dir",
    "directory",
    envvar="CGFS_DIR",
    type=click.Path(path_type=Path),
    help="Mounted tree or host; without it the only one this user has mounted.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="CMD...")
def exec_command(group: str, directory: Path | None, command: tuple[str, ...]) -> None:
    """Move into a cgroup, then become CMD."""
    root = tree_root(directory) if directory else running_tree()
    procs = group_directory(root, group) / "cgroup.procs"
    try:
        procs.write_text("0")  # the writer itself, whatever its pid namespace
    except OSError as error:
        raise from_oserror(error, f"cannot move into cgroup {group}") from error
    try:
        os.execvp(command[0], command)
    except OSError as error:
        code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        raise CommandError(f"{command[0]}: {error.strerror}", code) from error
