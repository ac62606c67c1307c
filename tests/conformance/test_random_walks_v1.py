"""The same random operations on two v1 hierarchies, compared after every step."""

import os
import random

import pytest
from conformance.calls import read
from conformance.walks import KIDS, WALKS, Walker, ended, follow
from conformance.world import fresh

NAMES = "abc"
DEPTH = 3
FLAGS = ("notify_on_release", "cgroup.clone_children")


class V1Walker(Walker):
    """A v1 hierarchy."""

    def look(self, where):
        return {
            "procs": self.labelled_set(where / "cgroup.procs"),
            "tasks": self.labelled_set(where / "tasks"),
            "nlink": os.stat(where).st_nlink,
        } | {name: read(where / name) for name in FLAGS}

    def labelled_set(self, path):
        """Labels in an order of their own: the file's is that of the numbers, which differ."""
        found = self.labelled(path)
        return found if isinstance(found, str) else sorted(found)


class Walk:
    """Chooses operations that have a fair chance to do something."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.alive = set(range(KIDS))
        self.forks = 0

    def next(self, snapshot):
        chance = self.chance
        where = chance.choice(sorted(snapshot))
        return chance.choices(
            [
                lambda: ("mkdir", self.below(where)),
                lambda: ("rmdir", where) if where != "." else ("mkdir", "a"),
                lambda: ("rename", where, self.new_name(where, snapshot)),
                lambda: ("write", where, chance.choice(FLAGS), chance.choice(["0", "1", " 1"])),
                lambda: self.move(where),
                lambda: self.fork_or_enter(where),
                self.death,
            ],
            weights=[6, 3, 3, 2, 10, 3, 1],
        )[0]()

    def below(self, where):
        name = self.chance.choice(NAMES)
        return name if where == "." or where.count("/") >= DEPTH - 1 else f"{where}/{name}"

    def new_name(self, where, snapshot):
        if where == "." or self.chance.random() < 0.3:
            return self.below(self.chance.choice(sorted(snapshot)))
        parent, slash, _ = where.rpartition("/")
        return parent + slash + self.chance.choice([*NAMES, "tasks"])

    def move(self, where):
        index = self.chance.randrange(KIDS)
        if index not in self.alive:
            return "mkdir", self.below(where)
        thread = self.chance.choice(["", "t"])
        return "move", index, thread, where, self.chance.choice(["cgroup.procs", "tasks"])

    def fork_or_enter(self, where):
        if not self.alive:
            return "mkdir", self.below(where)
        index = self.chance.choice(sorted(self.alive))
        if self.chance.random() < 0.7:
            return "enter", index, where
        self.forks += 1
        return "fork", index, f"k{index}f{self.forks}"

    def death(self):
        index = self.chance.randrange(KIDS)
        if index in self.alive:
            self.alive.remove(index)
            return "kill", index
        self.alive.add(index)
        return "restart", index


@pytest.mark.parametrize("seed", range(WALKS))
def test_a_random_walk_leads_to_the_same_places(linux_v1, cgfs_v1, seed):
    with fresh(linux_v1) as theirs, fresh(cgfs_v1) as ours, ended([]) as walkers:
        walkers.append(V1Walker(theirs))
        walkers.append(V1Walker(ours))
        follow(Walk(seed), walkers)
