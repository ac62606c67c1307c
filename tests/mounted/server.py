"""A mount of the model in a process of its own, whose charges and capacities a test decides.

Usage: server.py DIRECTORY [OPTION...]

Options: ``plain`` waits for every request through trio; ``hasty`` lets files be cached 1 ms after
a change and never gives up waiting for a reader; ``noisy`` keeps a timer running and
reports how late it was; ``nobody`` serves as an ordinary user (the interpreter may be where only
root can start it).

Reads one JSON object a line from standard input and answers each with one on standard output:

* ``{"do": "charge", "cgroup": "/a", "resource": "sev", "amount": 1}`` (also "uncharge")
* ``{"do": "capacity", "resource": "sev", "amount": 7}``: through `Mount.change`
* ``{"do": "capacity, bare", ...}``: behind the adapter's back
* ``{"do": "mkdir", "path": "/a"}``, ``{"do": "rmdir", "path": "/a"}``: behind the adapter's back
* ``{"do": "nodes"}``: how many nodes the model keeps
* ``{"do": "lateness"}``: largest lateness of the timer in seconds since the last question

Ends at the end of its input, at SIGTERM, and when somebody else unmounts.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import signal
import sys
import time

import trio

from cgfs.controllers import CONTROLLERS
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from cgfs.errors import CgroupError, MountError
from cgfs.fuse.gate import Gate
from cgfs.fuse.mount import mounted
from cgfs.views.tree import Tree

TICK_S = 0.001
HASTY_NS = 1_000_000
PATIENT_NS = 10_000_000_000
NOBODY = 65534


class Server:
    def __init__(self):
        self.roots = Roots([CONTROLLERS["encryption_ids"], CONTROLLERS["misc"]])
        self.tree = Tree(self.roots, self.roots.v2.root)
        self.mount = None
        self.late_s = 0.0
        for name in ("encryption_ids", "misc"):
            self.roots.controller(name).set_capacity("sev", 1000)

    async def run(self, directory, options):
        gate = None
        if "hasty" in options:
            gate = Gate(time.monotonic_ns, quiet_ns=HASTY_NS, grace_ns=PATIENT_NS)
        async with (
            mounted(self.tree, directory, direct="plain" not in options, gate=gate) as self.mount,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(self.end_at_signal, nursery.cancel_scope)
            if "noisy" in options:
                nursery.start_soon(self.tick)
            say({"ready": True})
            await self.answer()
            nursery.cancel_scope.cancel()

    async def end_at_signal(self, scope, task_status):
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                scope.cancel()

    async def tick(self):
        while True:
            due = trio.current_time() + TICK_S
            await trio.sleep_until(due)
            self.late_s = max(self.late_s, trio.current_time() - due)

    async def answer(self):
        read = functools.partial(
            trio.to_thread.run_sync, sys.stdin.readline, abandon_on_cancel=True
        )
        while line := await read():
            try:
                say({"value": await self.do(**json.loads(line))})
            except CgroupError as error:
                say({"error": errno.errorcode[error.errno]})

    async def do(self, do, **what):
        find = self.roots.v2.find
        match do:
            case "charge":
                css = find(what["cgroup"]).css["misc"]
                css.try_charge(what["resource"], what["amount"])
            case "uncharge":
                css = find(what["cgroup"]).css["misc"]
                css.uncharge(what["resource"], what["amount"])
            case "capacity":
                await self.mount.change(["misc.capacity"], lambda: self.set_capacity(**what))
            case "capacity, bare":
                self.set_capacity(**what)
            case "mkdir":
                parent, _, name = what["path"].rpartition("/")
                self.roots.v2.mkdir(find(parent or "/"), name, KERNEL, now_ns=time.time_ns())
            case "rmdir":
                self.roots.v2.rmdir(find(what["path"]), time.time_ns())
            case "nodes":
                return len(self.roots.nodes)
            case "lateness":
                late_s, self.late_s = self.late_s, 0.0
                return late_s
        return None

    def set_capacity(self, resource, amount):
        self.roots.controller("misc").set_capacity(resource, amount)


def say(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(directory, *options):
    logging.basicConfig(level=logging.WARNING)
    if "nobody" in options:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        trio.run(Server().run, directory, options)
    except* MountError as group:
        say({"error": str(group.exceptions[0])})
        sys.exit(71)


if __name__ == "__main__":
    main(*sys.argv[1:])
