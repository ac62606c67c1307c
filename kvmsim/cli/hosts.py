"""Which host a command is about, and the connection to it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from cgfs.control.client import Client
from cgfs.control.errors import CommandError, from_oserror
from cgfs.control.mountpoints import mount_at, resolve
from cgfs.control.place import check_owner
from cgfs.control.runtime_dir import Entry, RuntimeDir, find_entry

KIND = "kvmsim"

F = TypeVar("F", bound=Callable[..., object])


def host_option(command: F) -> F:
    """The option every command about a running host has."""
    return click.option(
        "--host",
        envvar="KVMSIM_HOST",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Mounted host; without it KVMSIM_HOST, else the only one this user runs.",
    )(command)


def connect(host: Path | None) -> Client:
    """A connection to a host; see :func:`find_host`."""
    runtime, entry = find_host(host)
    return Client(runtime.socket(Path(entry.directory)))


def find_host(host: Path | None) -> tuple[RuntimeDir, Entry]:
    """A running host, and where its socket is.

    Args:
        host: its directory as the user wrote it; None for the only one this user runs.

    Raises:
        CommandError: there is no such host, it has died, or it is somebody else's.
    """
    runtime, entry = _named(host) if host else _only()
    directory = Path(entry.directory)
    if not entry.alive:
        raise CommandError(
            f"{directory}: the host has died, see {runtime.log(directory)};"
            f" clear it with: kvmsim down {directory}"
        )
    return runtime, entry


def _named(host: Path) -> tuple[RuntimeDir, Entry]:
    try:
        directory = resolve(host)
    except OSError as error:
        raise from_oserror(error, str(host)) from error
    mount = mount_at(directory)
    if mount is not None and mount.fstype == f"fuse.{KIND}":
        check_owner(mount)
    found = find_entry(directory)
    if found is None or found[1].kind != KIND:
        raise CommandError(f"{directory}: no host runs here")
    return found


def _only() -> tuple[RuntimeDir, Entry]:
    found = {
        entry.directory: (runtime, entry)
        for runtime in RuntimeDir.readable()
        for entry in runtime.entries()
        if entry.kind == KIND and entry.uid == os.geteuid()
    }
    alive = {name: pair for name, pair in found.items() if pair[1].alive}
    if len(alive) > 1:
        names = ", ".join(sorted(alive))
        raise CommandError(f"several hosts run; choose with --host: {names}", os.EX_USAGE)
    # One that has died is worth telling, when there is no other.
    for pair in (alive or found).values():
        return pair
    raise CommandError("no host runs; start one with: kvmsim up DIR")
