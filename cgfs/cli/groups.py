"""Finding a cgroup directory from what a user wrote."""

import os
from pathlib import Path

from cgfs.control.errors import CommandError
from cgfs.control.runtime_dir import RuntimeDir

HOST_CGROUP = "sys/fs/cgroup"


def tree_root(directory: Path) -> Path:
    """The top of a cgroup tree: a cgroup directory itself, or the one inside an emulated host.

    Raises:
        CommandError: there is no cgroup tree (EX_UNAVAILABLE).
    """
    for place in (directory, directory / HOST_CGROUP):
        if (place / "cgroup.procs").exists():
            return place
    if not directory.exists():
        raise CommandError(f"{directory}: no such directory")
    raise CommandError(f"{directory}: not a cgroup tree")


def running_tree() -> Path:
    """The top of the only tree that this user has mounted.

    Raises:
        CommandError: there is none, or more than one.
    """
    entries = {
        entry.directory
        for runtime in RuntimeDir.readable()
        for entry in runtime.entries()
        if entry.alive and entry.uid == os.geteuid()
    }
    if not entries:
        raise CommandError("no cgroup tree is mounted; say which with --dir")
    if len(entries) > 1:
        names = ", ".join(sorted(entries))
        raise CommandError(f"several trees are mounted; say which with --dir: {names}", os.EX_USAGE)
    return tree_root(Path(entries.pop()))


def group_directory(root: Path, group: str) -> Path:
    """The directory of a cgroup, given as ``/tenant/a`` below a root.

    Raises:
        CommandError: it does not exist.
    """
    directory = root.joinpath(*[part for part in group.split("/") if part not in {"", "."}])
    if not (directory / "cgroup.procs").exists():
        raise CommandError(f"no cgroup {group} below {root}")
    return directory
