"""The ``kvmsim`` command: one file per subcommand."""

import sys
from pathlib import Path

from cgfs.cli.frame import LazyGroup, run_command
from cgfs.cli.helper import is_helper_call

kvmsim = LazyGroup(
    "kvmsim",
    help="An emulated confidential-computing host: cgroup files, SEV ASIDs, bus locks.",
    subcommands={
        "down": "kvmsim.cli.down:down_command",
        "info": "kvmsim.cli.info:info_command",
        "lbr": "kvmsim.cli.lbr:lbr_group",
        "presets": "kvmsim.cli.presets:presets_command",
        "run": "kvmsim.cli.run:run_command",
        "up": "kvmsim.cli.up:up_command",
        "vm": "kvmsim.cli.vm:vm_group",
    },
    hidden_subcommands={"mount-helper": "kvmsim.cli.up:helper_command"},
)


def main() -> None:
    """Runs ``kvmsim``, also as the helper that mount(8) calls; never returns."""
    arguments = sys.argv[1:]
    if is_helper_call(Path(sys.argv[0]).name, arguments, kvmsim.subcommands):
        arguments = ["mount-helper", *arguments]
    sys.exit(run_command(kvmsim, "kvmsim", arguments))
