"""Fixtures of the two worlds, and the count of rows on which they agree.

Set KVMSIM_RECORD_GOLDEN to a directory to keep what Linux answers (`tools/record_kernel`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conformance import server, syscalls
from conformance.differences import DIFFERENCES
from conformance.kids import Kid
from conformance.observer import GOLDEN, REFERENCE, Golden, Observer
from conformance.world import CAPACITY, CGFS, LINUX, World, cgroup2_root, fresh

RECORD = os.environ.get("KVMSIM_RECORD_GOLDEN")
ROWS = range(1, 164)
PER_WORLD = "expectation per world"
_golden = Golden(Path(RECORD) if RECORD else GOLDEN / REFERENCE)
_feeds = []


def rows_of(name):
    match = re.match(r"test_rows?((?:_\d{3})+)_", name)
    return [int(number) for number in match[1].split("_")[1:]] if match else []


def differences_of(name):
    found = {}
    for key in (name.partition("[")[0], *rows_of(name)):
        found |= DIFFERENCES.get(key, {})
    return found


def need_root():
    if os.geteuid() != 0:
        pytest.skip("the tests play several users, which only root can")


@pytest.fixture(scope="session")
def linux_world():
    need_root()
    root = cgroup2_root()
    if isinstance(root, str):
        pytest.skip(root)
    return World("linux", root, **LINUX)


@pytest.fixture(scope="session")
def cgfs_world():
    need_root()
    if reason := server.missing():
        pytest.skip(reason)
    with server.mounted(f"sev={CAPACITY}") as (root, feed):
        _feeds.append(feed)
        yield World("cgfs", root, **CGFS)
        _feeds.remove(feed)


@pytest.fixture(scope="session")
def linux_v1():
    """A v1 hierarchy without controllers, gone when its last cgroup and its mount are."""
    need_root()
    with server.directory() as directory:
        try:
            options = f"none,name=kvmsimtest{os.getpid()}"
            syscalls.mount("none", directory, "cgroup", 0, options)
        except OSError as error:
            pytest.skip(f"no v1 hierarchy can be mounted: {error}")
        yield directory
        syscalls.umount(directory)


@pytest.fixture(scope="session")
def cgfs_v1():
    need_root()
    if reason := server.missing():
        pytest.skip(reason)
    with server.mounted("v1,encryption_ids") as (root, feed):
        _feeds.append(feed)
        yield root
        _feeds.remove(feed)


@pytest.fixture(params=["linux", "cgfs"])
def world(request):
    """The hierarchy under test; nobody else runs these tests in it meanwhile."""
    world = request.getfixturevalue(f"{request.param}_world")
    with world.locked():
        yield world


@pytest.fixture
def d(world, kids):
    """A fresh cgroup, D of the specification; gone afterwards with all processes in it."""
    del kids
    with fresh(world.root) as cgrp:
        yield cgrp


@pytest.fixture
def kids():
    """Makes child processes that end with the test."""
    made = []

    def kid():
        made.append(Kid())
        return made[-1]

    yield kid
    for child in made:
        child.end()


@pytest.fixture
def with_controller(world):
    """The controller is enabled at the root, so that D has its files."""
    with world.root_controller(on=True):
        yield


@pytest.fixture
def without_controller(world):
    """The controller is not enabled at the root."""
    try:
        with world.root_controller(on=False):
            yield
    except OSError as error:
        pytest.skip(f"{world.controller} is in use at the root: {error}")


@pytest.fixture
def observe(request):
    """Compares an answer with the specification and with the golden record."""
    kind = "linux" if "[linux" in request.node.name else "cgfs"
    module, test = request.module.__name__.rpartition(".")[2], golden_name(request.node)
    observer = Observer(kind, _golden.get(module, test), differences_of(test))
    request.node.stash[_OBSERVER] = observer
    yield observer
    if RECORD and kind == "linux" and observer.values:
        _golden.put(module, test, observer.values)


_OBSERVER = pytest.StashKey[Observer]()


def golden_name(item):
    """The test's name without its world; other parameters stay."""
    rest = re.sub(r"^(linux|cgfs)-?", "", item.name.partition("[")[2].removesuffix("]"))
    return item.originalname + (f"[{rest}]" if rest else "")


def pytest_collection_modifyitems(items):
    for item in items:
        if "[cgfs" in item.name and "*" in (found := differences_of(item.name)):
            item.add_marker(pytest.mark.xfail(reason=found["*"], strict=True))


def pytest_runtest_setup():
    for feed in _feeds:
        feed(True)


def pytest_runtest_logfinish():
    for feed in _feeds:
        feed(False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test whose differing labels differ, and all others agree, counts as an expected failure."""
    result = yield
    if observer := pyfuncitem.stash.get(_OBSERVER, None):
        if "[cgfs" in pyfuncitem.name:
            assert not observer.unseen_differences(), "DIFFERENCES has labels no test observes"
        if observer.own_expectations:
            pyfuncitem.user_properties.append((PER_WORLD, True))
        if observer.differing:
            pytest.xfail(by_reason(observer.differing))
    return result


def by_reason(differing):
    labels = {}
    for label, reason in differing.items():
        labels.setdefault(reason, []).append(label)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in labels.items())


def pytest_sessionfinish():
    if RECORD:
        _golden.save()


def pytest_terminal_summary(terminalreporter):
    outcomes = {}
    for outcome in ("passed", "xfailed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for row in rows_of(report.nodeid.rpartition("::")[2]):
                if "[cgfs" in report.nodeid:
                    outcomes.setdefault(row, {}).setdefault(outcome, []).append(report)
    if outcomes:
        terminalreporter.section("two worlds")
        for line in summary(outcomes):
            terminalreporter.write_line(line)


def summary(outcomes):
    """Lines that say which rows agree; `outcomes` is row -> outcome -> reports."""
    rows = {
        "agree": [row for row, seen in outcomes.items() if set(seen) == {"passed"}],
        "differ": [row for row, seen in outcomes.items() if "xfailed" in seen],
        "fail": [row for row, seen in outcomes.items() if {"failed", "error"} & set(seen)],
        "did not run": set(ROWS)
        - {row for row, seen in outcomes.items() if set(seen) - {"skipped"}},
    }
    yield "conformance: " + ", ".join(f"{len(them)} rows {what}" for what, them in rows.items())
    analog = [
        row for row in rows["agree"] if any(r.user_properties for r in outcomes[row]["passed"])
    ]
    if analog:
        yield f"  stated for each world, as hugetlb is not misc: {listed(analog)}"
    for row in sorted(rows["differ"]):
        yield f"  row {row}: {outcomes[row]['xfailed'][0].wasxfail}"
    if rows["fail"]:
        yield f"  rows that fail: {listed(rows['fail'])}"


def listed(rows):
    return ", ".join(map(str, sorted(rows)))
