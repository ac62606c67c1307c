"""Several processes read, write, make and remove; every value read is checked.

Each thing that changes has two numbers in memory shared by all processes: how many of its changes
have been started and how many have been acknowledged. A value read must be one that was current
at some moment between the count of acknowledged changes before the read and the count of started
ones after it. CGFS_STORM_SECONDS lengthens the storm.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import time
import traceback

import pytest

SECONDS = float(os.environ.get("CGFS_STORM_SECONDS", "4"))
NR_LIMITS = 4
NR_DIRECTORIES = 3
WRITERS = 2
READERS = 3
TRUNC = os.O_WRONLY | os.O_TRUNC
OPENINGS = (TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR, os.O_WRONLY)
COUNTER = NR_LIMITS
CONTROL = COUNTER + 1
DIRECTORIES = CONTROL + 1
NR_THINGS = DIRECTORIES + NR_DIRECTORIES


class Ledger:
    """Started and acknowledged changes of every thing."""

    def __init__(self):
        self._numbers = memoryview(mmap.mmap(-1, 16 * NR_THINGS)).cast("q")

    def start(self, thing, number):
        self._numbers[2 * thing] = number

    def acknowledge(self, thing, number):
        self._numbers[2 * thing + 1] = number

    def started(self, thing):
        return self._numbers[2 * thing]

    def acknowledged(self, thing):
        return self._numbers[2 * thing + 1]


def text_of(number):
    """A value whose length differs from that of its neighbours and tells its number."""
    return b"%d" % (10 ** (8 + number % 7) + number)


def number_of(text):
    value = int(text)
    return value - 10 ** (len(str(value)) - 1)


class Actor:
    def __init__(self, root, ledger, seed):
        self.root = root
        self.ledger = ledger
        self.random = random.Random(seed)
        self.done = 0

    def change(self, thing, number, act):
        self.ledger.start(thing, number)
        act()
        self.ledger.acknowledge(thing, number)

    def rest(self):
        return 0

    def run(self, until):
        while time.monotonic() < until:
            self.step()
            self.done += 1
            time.sleep(self.rest())
        return self.done


class Writer(Actor):
    """Owns some of the things, so that nobody else changes them."""

    openings = OPENINGS

    def __init__(self, root, ledger, seed):
        super().__init__(root, ledger, seed)
        self.things = [thing for thing in range(NR_THINGS) if thing % WRITERS == seed % WRITERS]
        self.things = [thing for thing in self.things if thing != COUNTER]

    def step(self):
        thing = self.random.choice(self.things)
        number = self.ledger.acknowledged(thing) + 1
        if thing < NR_LIMITS:
            self.change(thing, number, lambda: self.set_limit(thing, number))
        elif thing == CONTROL:
            self.change(thing, number, lambda: self.toggle(number))
        else:
            self.change(thing, number, lambda: self.make_or_remove(thing, number))

    def rest(self):
        # Long enough now and then for readers to find a file quiet and have it cached.
        return self.random.choice((0, 0, 0, 0.0005, 0.003))

    def set_limit(self, thing, number):
        fd = os.open(f"{self.root}/limit{thing}/misc.max", self.random.choice(self.openings))
        try:
            os.write(fd, b"sev " + self.text(number))
        finally:
            os.close(fd)

    def text(self, number):
        return text_of(number)

    def toggle(self, number):
        fd = os.open(f"{self.root}/parent/cgroup.subtree_control", TRUNC)
        try:
            os.write(fd, b"+misc" if number % 2 else b"-misc")
        finally:
            os.close(fd)

    def make_or_remove(self, thing, number):
        path = f"{self.root}/directory{thing}"
        if number % 2:
            os.mkdir(path)
        else:
            os.rmdir(path)


class Reader(Actor):
    def step(self):
        thing = self.random.randrange(NR_THINGS)
        before = self.ledger.acknowledged(thing)
        if thing < NR_LIMITS:
            text = self.read(f"limit{thing}/misc.max")
            numbers = [number_of(text.removeprefix(b"sev ").removesuffix(b"\n"))]
            assert text == b"sev %s\n" % text_of(numbers[0])
        elif thing == COUNTER:
            text = self.read("limit0/misc.current")
            numbers = [int(text.removeprefix(b"sev "))]
            assert text == b"sev %d\n" % numbers[0]
        elif thing == CONTROL:
            numbers = self.numbers_of(before, self.misc_is_on())
        else:
            there = os.path.exists(f"{self.root}/directory{thing}/cgroup.procs")
            numbers = self.numbers_of(before, there)
        after = self.ledger.started(thing)
        assert any(before <= number <= after for number in numbers), (
            f"thing {thing}: read {numbers}, acknowledged before {before}, started after {after}"
        )

    def numbers_of(self, before, odd):
        return [number for number in (before, before + 1) if number % 2 == odd]

    def misc_is_on(self):
        if self.random.random() < 0.5:
            return os.path.exists(f"{self.root}/parent/child/misc.max")
        text = self.read("parent/child/cgroup.controllers")
        assert text in {b"misc\n", b""}
        return text == b"misc\n"

    def read(self, path):
        fd = os.open(f"{self.root}/{path}", os.O_RDONLY)
        try:
            if self.random.random() < 0.8:
                return os.read(fd, 4096)
            pieces = []
            while piece := os.read(fd, self.random.randint(1, 8)):
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            os.close(fd)


class HoldingReader(Actor):
    """Reads through descriptors it keeps open, so that every change overtakes it."""

    def run(self, until):
        fds = [os.open(f"{self.root}/limit{thing}/misc.max", os.O_RDONLY) for thing in range(2)]
        while time.monotonic() < until:
            thing = self.random.randrange(2)
            before = self.ledger.acknowledged(thing)
            text = os.pread(fds[thing], 4096, 0)
            after = self.ledger.started(thing)
            number = int(text.removeprefix(b"sev 1"))
            assert before <= number <= after, (before, text, after)
            self.done += 1
        return self.done


class SameLengthWriter(Writer):
    """Leaves lengths alone, in its openings as well: those readers see torn (docs/differences)."""

    openings = (os.O_WRONLY,)

    def step(self):
        thing = self.random.randrange(2)
        number = self.ledger.acknowledged(thing) + 1
        self.change(thing, number, lambda: self.set_limit(thing, number))

    def text(self, number):
        return b"1%09d" % number


class Process:
    """An actor in a child process."""

    def __init__(self, actor, until):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            try:
                outcome = {"done": actor.run(until)}
            except BaseException:
                outcome = {"error": traceback.format_exc()}
            with os.fdopen(writer, "w") as out:
                json.dump(outcome, out)
            os._exit(0)
        os.close(writer)
        self._result = reader

    def outcome(self):
        with os.fdopen(self._result) as pipe:
            text = pipe.read()
        os.waitpid(self.pid, 0)
        self.pid = 0
        return json.loads(text)

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._result)


@pytest.fixture
def processes():
    started = []
    yield started
    for process in started:
        process.kill()


def charge(server, ledger, rng, until):
    """Raises the counter, as an emulated VM would, until the storm is over."""
    total = 0
    while time.monotonic() < until:
        amount = rng.choice((1, 7, 90, 1000))
        total += amount
        ledger.start(COUNTER, total)
        assert server.ask("charge", cgroup="/limit0", resource="sev", amount=amount) is None
        ledger.acknowledge(COUNTER, total)
        time.sleep(0.001)


@pytest.mark.timeout(60 + 2 * SECONDS)
@pytest.mark.parametrize("options", [("hasty",), ("hasty", "plain")], ids=["direct", "trio"])
def test_no_reader_sees_a_stale_or_torn_value(start_cgfs, processes, options):
    server = start_cgfs(*options)
    server.hear()
    root, ledger = server.root, Ledger()
    (root / "cgroup.subtree_control").write_text("+misc")
    server.ask("capacity", resource="sev", amount=10**12)
    for thing in range(NR_LIMITS):
        (root / f"limit{thing}").mkdir()
        (root / f"limit{thing}" / "misc.max").write_bytes(b"sev " + text_of(0))
    (root / "parent").mkdir()
    (root / "parent" / "child").mkdir()
    until = time.monotonic() + SECONDS
    actors = [Writer(root, ledger, seed) for seed in range(WRITERS)]
    actors += [Reader(root, ledger, 100 + seed) for seed in range(READERS)]
    processes += [Process(actor, until) for actor in actors]
    charge(server, ledger, random.Random(7), until)
    outcomes = [process.outcome() for process in processes]

    assert [outcome["error"] for outcome in outcomes if "error" in outcome] == []
    assert all(outcome["done"] > 10 for outcome in outcomes)


@pytest.mark.timeout(60 + 2 * SECONDS)
def test_descriptors_held_across_changes_are_never_stale(start_cgfs, processes):
    server = start_cgfs()
    server.hear()
    root, ledger = server.root, Ledger()
    (root / "cgroup.subtree_control").write_text("+misc")
    for thing in range(2):
        (root / f"limit{thing}").mkdir()
        (root / f"limit{thing}" / "misc.max").write_bytes(b"sev 1000000000")
    time.sleep(0.3)
    until = time.monotonic() + SECONDS / 2
    actors = [HoldingReader(root, ledger, seed) for seed in range(READERS)]
    actors.append(SameLengthWriter(root, ledger, 0))
    processes += [Process(actor, until) for actor in actors]
    outcomes = [process.outcome() for process in processes]
    assert [outcome["error"] for outcome in outcomes if "error" in outcome] == []
    assert ledger.acknowledged(0) > 3
