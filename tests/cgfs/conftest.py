"""A model host, fake processes, and the verbs of a shell on it."""

from __future__ import annotations

import errno
from contextlib import contextmanager

import pytest

from cgfs.controllers.encryption_ids import EncryptionIds
from cgfs.controllers.misc import Misc
from cgfs.core.caller import KERNEL, Caller
from cgfs.core.parse import until_nul
from cgfs.core.roots import Roots
from cgfs.core.tasks import NoProcesses, RealTask
from cgfs.errors import CgroupError


class FakeProcesses(NoProcesses):
    """Real processes as a table: tgid to thread ids."""

    def __init__(self):
        self.table: dict[int, list[int]] = {}
        self.zombies: set[int] = set()
        self.kthreads: set[int] = set()
        self.frozen: set[int] = set()
        self.killed: list[int] = []
        self.watched: set[int] = set()
        self.invisible: set[int] = set()
        self.uids: dict[int, int] = {}
        self.on_sync = lambda: None

    def start(self, tgid, *threads):
        self.table[tgid] = [tgid, *threads]
        return tgid

    def sync(self):
        self.on_sync()

    def find(self, tid):
        for tgid, tids in self.table.items():
            if tid in tids or tid == tgid:
                uid = self.uids.get(tgid, 0)
                zombie = tgid in self.zombies
                return RealTask(tid, tgid, tgid in self.kthreads, zombie, "S", uid, uid)
        return None

    def tgids(self):
        return sorted(set(self.table) - self.zombies)

    def threads(self, tgid):
        return [] if tgid in self.zombies else sorted(self.table.get(tgid, []))

    def to_caller(self, caller_tid, pid):
        return 0 if pid in self.invisible else pid

    def kill(self, tgid):
        self.killed.append(tgid)

    def freeze(self, tgid):
        self.frozen.add(tgid)

    def thaw(self, tgid):
        self.frozen.discard(tgid)

    def is_frozen(self, tgid):
        return tgid in self.frozen

    def watch(self, tgid):
        self.watched.add(tgid)

    def unwatch(self, tgid):
        self.watched.discard(tgid)


class FakeOwner:
    """An emulated process that takes note of what happens to it."""

    def __init__(self):
        self.heard: list[object] = []

    def killed(self, now_ns):
        self.heard.append("killed")

    def frozen(self, frozen, now_ns):
        self.heard.append(("frozen", frozen))

    def moved(self, now_ns):
        self.heard.append("moved")


class Recorder:
    """A model listener that takes note, files by name."""

    def __init__(self):
        self.heard: list[tuple[str, str, str]] = []

    def _note(self, verb, node, slot):
        cgrp = getattr(node, "cgrp", node)
        self.heard.append((verb, cgrp.path, node.rows[slot - 1].name))

    def modified(self, node, slot):
        self._note("modified", node, slot)

    def changed(self, node, slot):
        self._note("changed", node, slot)

    def appeared(self, cgrp, node):
        name = "" if node is cgrp else node.controller.name
        self.heard.append(("appeared", cgrp.path, name))

    def vanished(self, cgrp, node):
        name = "" if node is cgrp else node.controller.name
        self.heard.append(("vanished", cgrp.path, name))

    def of(self, verb):
        return [(path, name) for v, path, name in self.heard if v == verb]


class Shell:
    """mkdir, rmdir, cat and echo on the model, by path."""

    def __init__(self, roots, hierarchy=None):
        self.roots = roots
        self.hierarchy = hierarchy or roots.v2

    def mkdir(self, path, caller=KERNEL, **options):
        parent, _, name = path.rpartition("/")
        return self.hierarchy.mkdir(self.hierarchy.find(parent or "/"), name, caller, **options)

    def rmdir(self, path):
        self.hierarchy.rmdir(self.hierarchy.find(path))

    def file(self, path):
        directory, _, name = path.rpartition("/")
        found = self.hierarchy.file(self.hierarchy.find(directory or "/"), name)
        assert found is not None, f"no file {path}"
        return found

    def exists(self, path):
        directory, _, name = path.rpartition("/")
        return self.hierarchy.file(self.hierarchy.find(directory or "/"), name) is not None

    def cat(self, path, caller=KERNEL):
        node, slot = self.file(path)
        return node.rows[slot - 1].show(node, caller)

    def echo(self, text, path, caller=KERNEL, now_ns=0):
        node, slot = self.file(path)
        data = text if isinstance(text, bytes) else text.encode("latin-1")
        node.rows[slot - 1].write(node, until_nul(data), caller, now_ns)


@pytest.fixture
def processes():
    return FakeProcesses()


@pytest.fixture
def roots(processes):
    roots = Roots([EncryptionIds, Misc], processes)
    roots.controller("encryption_ids").set_capacity("sev", 4)
    roots.controller("misc").set_capacity("sev", 4)
    return roots


@pytest.fixture
def recorder(roots):
    roots.listener = Recorder()
    return roots.listener


@pytest.fixture
def shell(roots):
    return Shell(roots)


@pytest.fixture
def owner():
    return FakeOwner()


@pytest.fixture
def user():
    return Caller(65534, 65534, 5000)


@pytest.fixture
def make_shell():
    return Shell


@pytest.fixture
def fails_with():
    @contextmanager
    def check(name):
        with pytest.raises(CgroupError) as caught:
            yield caught
        assert caught.value.errno == getattr(errno, name), caught.value

    return check
