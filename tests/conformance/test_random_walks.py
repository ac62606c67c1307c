"""The same random operations in both worlds, compared after every step.

Needs both a cgroup2 to write to and /dev/fuse. A failure shows the walk up to the step that
differs; the seed is in the test's name.
"""

import os
import random
import select
import time
from pathlib import Path

import pytest
from conformance.calls import read
from conformance.walks import KIDS, WALKS, Walker, ended, follow
from conformance.world import fresh

# Events within 10 ms are one, which comes at the end of them.
MERGED_S = 0.012
NAMES = "abc"
DEPTH = 3
TEXTS = (
    "cgroup.type", "cgroup.events", "cgroup.freeze", "cgroup.controllers",
    "cgroup.subtree_control", "cgroup.max.depth", "cgroup.max.descendants",
)  # fmt: skip


class V2Walker(Walker):
    """A v2 hierarchy; `watches` says whether events are part of what is seen."""

    def __init__(self, world, d, watches):
        self.world, self.watches = world, watches
        self.events = {}
        super().__init__(d)

    def end(self):
        super().end()
        for fd in self.events.values():
            os.close(fd)

    def do_write(self, where, name, text):
        return super().do_write(where, name, text.replace("CONTROLLER", self.world.controller))

    def prepare(self):
        if self.watches:
            time.sleep(MERGED_S)
            self.rearm()

    def rearm(self):
        """Reads every cgroup.events, so that a later event can be told."""
        for where in list(self.events):
            if not where.exists():
                os.close(self.events.pop(where))
        for path, _, _ in os.walk(self.d):
            where = Path(path)
            if where not in self.events:
                self.events[where] = os.open(where / "cgroup.events", os.O_RDONLY)
            os.pread(self.events[where], 100, 0)

    def has_event(self, where):
        """Whether cgroup.events of a cgroup that was there before the step has changed."""
        poll = select.poll()
        if where in self.events:
            poll.register(self.events[where], select.POLLPRI)
        return bool(poll.poll(0))

    def look(self, where):
        """What one cgroup shows, with labels for numbers and one name for the controller."""
        controller = self.world.controller.encode()
        seen = {name: read(where / name) for name in TEXTS}
        for name in ("cgroup.controllers", "cgroup.subtree_control"):
            seen[name] = b"CONTROLLER" if controller in seen[name].split() else b""
        seen["files"] = any(f.startswith(f"{self.world.controller}.") for f in os.listdir(where))
        seen["nlink"] = os.stat(where).st_nlink
        seen["event"] = self.has_event(where)
        stat = dict(line.split() for line in read(where / "cgroup.stat").splitlines())
        seen["descendants"] = stat[b"nr_descendants"], stat[b"nr_subsys_" + controller]
        seen["procs"] = self.labelled(where / "cgroup.procs")
        if seen["cgroup.type"] == b"domain threaded\n":
            # Linux lists them by css_set, that is by where below each of them is.
            seen["procs"].sort()
        threads = self.labelled(where / "cgroup.threads")
        seen["threads"] = sorted(threads) if isinstance(threads, list) else threads
        return seen


class Walk:
    """Chooses operations; what it knows comes from the first world's snapshots."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        # Ours stop whole processes, so that a frozen cgroup with some of the threads is not frozen:
        # a walk splits processes, or it freezes.
        self.splits = seed % 2 == 1
        self.alive = set(range(KIDS))
        self.forks = 0

    def next(self, snapshot):
        """An operation that has a fair chance to do something."""
        chance = self.chance
        where = chance.choice(sorted(snapshot))
        live = sorted(self.running(snapshot))
        index = chance.choice(live) if live else None
        # Who enters a frozen cgroup does not come back to tell.
        frozen = b"frozen 1" in snapshot[where]["cgroup.events"]
        return chance.choices(
            [
                lambda: self.mkdir(where),
                lambda: self.rmdir(where),
                lambda: self.setting(where),
                lambda: self.move(where),
                lambda: ("enter", index, where) if live and not frozen else self.mkdir(where),
                lambda: self.fork(index) if live else self.rmdir(where),
                self.death,
            ],
            weights=[6, 3, 8, 8, 2, 1, 1],
        )[0]()

    def mkdir(self, where):
        name = self.chance.choice(NAMES)
        deep = where.count("/") >= DEPTH - 1
        return "mkdir", name if where == "." or deep else f"{where}/{name}"

    def rmdir(self, where):
        return ("rmdir", where) if where != "." else ("write", ".", "cgroup.freeze", "0")

    def setting(self, where):
        name, text = self.chance.choice(
            [
                ("cgroup.type", "threaded"),
                ("cgroup.type", "threaded"),
                ("cgroup.freeze", "1"),
                ("cgroup.freeze", "0"),
                ("cgroup.freeze", "0"),
                ("cgroup.subtree_control", "+CONTROLLER"),
                ("cgroup.subtree_control", "+CONTROLLER"),
                ("cgroup.subtree_control", "-CONTROLLER"),
                ("cgroup.max.depth", self.chance.choice(["0", "1", "2", "max"])),
                ("cgroup.max.depth", "max"),
                ("cgroup.max.descendants", self.chance.choice(["0", "1", "3", "max"])),
                ("cgroup.max.descendants", "max"),
            ]
        )
        if name == "cgroup.freeze" and self.splits:
            name, text = "cgroup.type", "threaded"
        return "write", where, name, text

    def move(self, where):
        index = self.chance.choice(sorted(self.alive)) if self.alive else None
        if index is None:
            return "write", where, "cgroup.freeze", "0"
        thread = self.chance.choice(["", "", "t"])
        name = self.chance.choice(["cgroup.procs", "cgroup.threads"])
        if not self.splits:
            name = "cgroup.procs"
        return "move", index, thread, where, name

    def fork(self, index):
        self.forks += 1
        return "fork", index, f"k{index}f{self.forks}"

    def death(self):
        index = self.chance.randrange(KIDS)
        if index in self.alive:
            self.alive.remove(index)
            return "kill", index
        self.alive.add(index)
        return "restart", index

    def running(self, snapshot):
        """Processes of which no thread is in a frozen cgroup, so that they can answer."""
        frozen = {
            label[:2]
            for seen in snapshot.values()
            for label in map(str, seen["threads"])
            if b"frozen 1" in seen["cgroup.events"]
        }
        return {index for index in self.alive if f"k{index}" not in frozen}


@pytest.mark.parametrize("seed", range(WALKS))
def test_a_random_walk_leads_to_the_same_places(linux_world, cgfs_world, seed):
    walk = Walk(seed)
    with (
        linux_world.locked(),
        linux_world.root_controller(on=True),
        cgfs_world.root_controller(on=True),
        fresh(linux_world.root) as theirs,
        fresh(cgfs_world.root) as ours,
        ended([]) as walkers,
    ):
        # A process that comes or goes makes Linux thaw a frozen cgroup for a moment, with events.
        walkers.append(V2Walker(linux_world, theirs, watches=walk.splits))
        walkers.append(V2Walker(cgfs_world, ours, watches=walk.splits))
        follow(walk, walkers)
