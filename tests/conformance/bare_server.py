"""A mount of the model with nothing around it, whose charges the tests decide.

Usage: bare_server.py DIRECTORY

Reads lines "PID RESOURCE AMOUNT" from standard input: the process charges that much of a resource
of `misc`. Answers each with "ok" or the name of the errno. Ends at the end of its input.
"""

from __future__ import annotations

import errno
import functools
import sys
import time

import trio

from cgfs.controllers.misc import CONTROLLER
from cgfs.core.roots import Roots
from cgfs.errors import CgroupError
from cgfs.fuse.mount import mounted
from cgfs.procs import open_processes, run
from cgfs.views.tree import Tree

CAPACITY = 10


async def main(directory: str) -> None:
    """Serves until the input ends."""
    processes = open_processes(None, time.time_ns)
    try:
        roots = Roots([CONTROLLER], processes)
        processes.members = roots.tasks
        roots.controller("misc").set_capacity("sev", CAPACITY)
        async with trio.open_nursery() as nursery, mounted(Tree(roots, roots.v2.root), directory):
            await nursery.start(run, processes)
            await answer_charges(roots)
            nursery.cancel_scope.cancel()
    finally:
        processes.close()


async def answer_charges(roots: Roots) -> None:
    """Makes the charges that are asked for."""
    read_line = functools.partial(
        trio.to_thread.run_sync, sys.stdin.readline, abandon_on_cancel=True
    )
    while line := await read_line():
        pid, resource, amount = line.split()
        sys.stdout.write(charge(roots, int(pid), resource, int(amount)) + "\n")
        sys.stdout.flush()


def charge(roots: Roots, pid: int, resource: str, amount: int) -> str:
    """Charges the effective cgroup of a process."""
    try:
        roots.css_of(pid, "misc").try_charge(resource, amount)
    except CgroupError as error:
        return errno.errorcode[error.errno]
    return "ok"


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
