"""``cgfs mount DIR``, and the helper behind ``mount -t fuse.cgfs NAME DIR``."""

import os
import shutil
import sys
from pathlib import Path

import click

from cgfs.cli.helper import parse_helper_call, split_options
from cgfs.cli.mount_options import parse_options
from cgfs.control.errors import CommandError, from_oserror
from cgfs.control.launch import Launch, launch

HOST_OPTION = "preset="


@click.command("mount")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPTIONS",
    help="By commas: v1, controllers, capacities as sev=10, name=, clone_children,"
    " release_agent=, allow_other, nonempty.",
)
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error.")
def mount_command(directory: Path, options: tuple[str, ...], foreground: bool) -> None:
    """Mount a cgroup tree with fixed capacities on DIR.

    Without options it is a v2 tree with every controller.
    """
    words = [word for text in options for word in split_options(text)]
    mount(directory, words, foreground=foreground)


@click.command("mount-helper", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def helper_command(arguments: tuple[str, ...]) -> None:
    """Take the arguments of a mount(8) helper: SOURCE DIR [-o OPTIONS].

    With an option ``preset=`` it is a whole host that is wanted, which ``kvmsim`` starts.
    """
    call = parse_helper_call(arguments)
    if any(option.startswith(HOST_OPTION) for option in call.options):
        become_kvmsim(arguments)
    elif call.fake:
        parse_options(call.options)
    else:
        mount(Path(call.directory), call.options, source=call.source)


def mount(
    directory: Path, words: list[str], *, source: str = "cgfs", foreground: bool = False
) -> None:
    """Mounts a tree; see ``mount_command``.

    Args:
        directory: as the user wrote it.
        words: single options.
        source: what /proc/mounts shows as the device.
        foreground: stay in this process.

    Raises:
        CommandError: it cannot be mounted; nothing is left behind.
    """
    options = parse_options(words)

    def serve(launched: Launch) -> None:
        # Only the process that serves loads trio and pyfuse3.
        from cgfs.cli.serve import serve_tree  # noqa: PLC0415

        serve_tree(options, source, launched)

    launch("cgfs", directory, serve, foreground=foreground, nonempty=options.nonempty)


def become_kvmsim(arguments: tuple[str, ...]) -> None:
    """Hands a helper's call over to ``kvmsim``, which is installed beside us or in PATH.

    Raises:
        CommandError: it is not there.
    """
    beside = Path(sys.argv[0]).resolve().with_name("kvmsim")
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which("kvmsim")
    if program is None:
        raise CommandError("mount option preset= needs the program kvmsim, which is not installed")
    try:
        os.execv(program, ["kvmsim", "mount-helper", "--", *arguments])
    except OSError as error:
        raise from_oserror(error, program) from error
