"""The ``cgfs`` command: one file per subcommand."""

import sys
from pathlib import Path

from cgfs.cli.frame import LazyGroup, run_command
from cgfs.cli.helper import is_helper_call

cgfs = LazyGroup(
    "cgfs",
    help="An emulated cgroup tree that any Linux user can mount.",
    subcommands={
        "exec": "cgfs.cli.exec:exec_command",
        "mount": "cgfs.cli.mount:mount_command",
        "tree": "cgfs.cli.tree:tree_command",
        "umount": "cgfs.cli.umount:umount_command",
    },
    hidden_subcommands={"mount-helper": "cgfs.cli.mount:helper_command"},
)


def main() -> None:
    """Runs ``cgfs``, also as the helper that mount(8) calls; never returns."""
    arguments = sys.argv[1:]
    if is_helper_call(Path(sys.argv[0]).name, arguments, cgfs.subcommands):
        arguments = ["mount-helper", *arguments]
    sys.exit(run_command(cgfs, "cgfs", arguments))
