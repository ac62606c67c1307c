"""Controllers: rows F.5, with a stand-in controller on Linux, and cgroup.subtree_control (C.3)."""

import mmap
import os
import select
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from conformance import server, syscalls
from conformance.calls import attempt, flat, opened, read, write
from conformance.kids import NOBODY, become
from conformance.observer import PerWorld
from conformance.world import fresh

MISC_FILES = ["misc.current", "misc.events", "misc.events.local", "misc.max", "misc.peak"]
MAP_HUGETLB = 0x40000
MAP_HUGE_2MB = 21 << 26


@pytest.fixture
def on(world):
    return b"+" + world.controller.encode()


@pytest.fixture
def off(world):
    return b"-" + world.controller.encode()


def control(cgrp):
    return cgrp / "cgroup.subtree_control"


def enabled(cgrp):
    return read(control(cgrp))


def files_of(world, cgrp):
    return sorted(name for name in os.listdir(cgrp) if name.startswith(f"{world.controller}."))


def owner(path):
    return os.stat(path).st_uid


def test_row_089_enabling_what_the_parent_has_not_says_enoent(without_controller, d, on, observe):
    observe("enable", write(control(d), on), "ENOENT")
    observe("enabled", enabled(d), b"")


def test_row_090_disabling_what_is_not_there_succeeds(without_controller, d, off, observe):
    observe("disable", write(control(d), off) == len(off), True)


def test_row_091_files_appear_one_level_below(without_controller, world, d, observe):
    (d / "c").mkdir()
    observe("before", files_of(world, d), [])
    with world.root_controller(on=True):
        pages = len(list(Path("/sys/kernel/mm/hugepages").glob("*"))) if world.is_linux else 0
        observe("files", len(files_of(world, d)), PerWorld(linux=7 * pages, cgfs=len(MISC_FILES)))
        observe("files of a child", files_of(world, d / "c"), [])
        names = (d / "cgroup.controllers").read_text().split()
        observe("controllers", world.controller in names, True)
        observe("controllers of a child", read(d / "c" / "cgroup.controllers"), b"")
    observe("after", files_of(world, d), [])


@pytest.mark.parametrize("text", [b"", b"\n", b" "])
def test_row_092_white_space_enables_nothing(with_controller, d, observe, text):
    observe("write", write(control(d), text), len(text))
    observe("enabled", enabled(d), b"")


@pytest.mark.parametrize(
    "form",
    [
        "{}", "+bogus", "-bogus", "+{} +bogus", "+", "-", "*{}", "++{}", "+{},", "+UPPER",
        "+{}\t-{}", "+debug", "+{}\n+{}", "+{} bogus",
    ],
)  # fmt: skip
def test_row_093_a_bad_word_applies_nothing(with_controller, world, d, observe, form):
    text = form.format(world.controller, world.controller)
    text = text.replace("UPPER", world.controller.upper())
    observe("write", write(control(d), text.encode()), "EINVAL")
    observe("enabled", enabled(d), b"")


@pytest.mark.parametrize("name", ["memory", "cpu", "pids", "perf_event"])
def test_row_094_a_controller_of_another_hierarchy_says_enoent(world, d, observe, name):
    if world.is_linux and not elsewhere(name):
        pytest.skip(f"{name} is not on a v1 hierarchy here")
    observe("enable", write(control(d), f"+{name}".encode()), "ENOENT")


@pytest.mark.parametrize("name", ["memory", "perf_event"])
def test_row_095_disabling_it_succeeds(world, d, observe, name):
    if world.is_linux and not elsewhere(name):
        pytest.skip(f"{name} is not on a v1 hierarchy here")
    observe("disable", write(control(d), f"-{name}".encode()), len(name) + 1)
    observe("enabled", enabled(d), b"")


def elsewhere(name):
    rows = [line.split() for line in Path("/proc/cgroups").read_text().splitlines()]
    return name == "perf_event" or any(row[0] == name and row[1] != "0" for row in rows)


def test_row_096_the_last_word_about_a_controller_counts(with_controller, world, d, observe):
    for form, result in (("+{0}  -{0}", False), ("-{0} +{0}", True)):
        write(control(d), form.format(world.controller).encode())
        observe(form, world.controller in world.controllers(d), result)
    write(control(d), f"-{world.controller}".encode())
    text = f"+{world.controller}\0zz".encode()
    observe("NUL", write(control(d), text) == len(text), True)
    observe("on", world.controller in world.controllers(d), True)


def test_row_097_disabling_what_a_child_uses_says_ebusy(
    with_controller, d, world, on, off, observe
):
    (d / "c").mkdir()
    write(control(d), on)
    write(control(d / "c"), on)
    observe("parent", write(control(d), off), "EBUSY")
    observe("root", write(control(world.root), off), "EBUSY")


def test_row_098_no_process_beside_enabled_controllers(with_controller, d, on, kids, observe):
    write(control(d), on)
    observe("move", write(d / "cgroup.procs", b"%d" % kids().pid), "EBUSY")


def test_row_099_nothing_is_enabled_beside_processes(with_controller, d, on, off, kids, observe):
    (d / "c").mkdir()
    write(control(d), on)
    write(d / "c" / "cgroup.procs", b"%d" % kids().pid)
    observe("enable", write(control(d / "c"), on), "EBUSY")
    observe("disable", isinstance(write(control(d / "c"), off), int), True)
    observe("both", isinstance(write(control(d / "c"), on + b" " + off), int), True)


def test_row_100_processes_further_below_do_not_matter(
    with_controller, world, d, on, off, kids, observe
):
    (d / "c" / "g").mkdir(parents=True)
    write(control(d), on)
    write(d / "c" / "g" / "cgroup.procs", b"%d" % kids().pid)
    observe("enable", isinstance(write(control(d / "c"), on), int), True)
    observe("files", (d / "c" / "g" / world.limit).exists(), True)
    observe("disable", isinstance(write(control(d / "c"), off), int), True)
    observe("no files", files_of(world, d / "c" / "g"), [])


def test_row_101_a_process_may_come_when_nothing_is_enabled(
    with_controller, d, on, off, kids, observe
):
    (d / "c" / "g").mkdir(parents=True)
    write(control(d), on)
    write(control(d / "c"), on)
    write(control(d / "c"), off)
    observe("move", isinstance(write(d / "c" / "cgroup.procs", b"%d" % kids().pid), int), True)


def test_row_102_disabling_ends_open_files_and_limits(with_controller, world, d, on, off, observe):
    (d / "g").mkdir()
    write(control(d), on)
    limit = d / "g" / world.limit
    fresh = read(limit)
    write(limit, world.limit_text(2))
    with opened(limit, os.O_RDWR) as fd:
        write(control(d), off)
        observe("pread", attempt(os.pread, fd, 100, 0), "ENODEV")
        observe("write", attempt(os.write, fd, world.limit_text(1)), "ENODEV")
        write(control(d), on)
        observe("pread after enabling again", attempt(os.pread, fd, 100, 0), "ENODEV")
    observe("limit", read(limit) == fresh, True)


def test_row_103_a_directory_in_the_way_says_eexist(with_controller, world, d, on, observe):
    (d / "g" / world.limit).mkdir(parents=True)
    observe("enable", write(control(d), on), "EEXIST")
    observe("enabled", enabled(d), b"")
    observe("files", files_of(world, d / "g") == [world.limit], True)


def test_row_104_disabling_forgets_attributes(with_controller, world, d, on, off, observe):
    (d / "g").mkdir()
    write(control(d), on)
    limit = d / "g" / world.limit
    inode = os.stat(limit).st_ino
    os.chmod(limit, 0o600)
    os.chown(limit, NOBODY, NOBODY)
    os.setxattr(limit, "user.x", b"1")
    write(control(d), off)
    write(control(d), on)
    found = os.stat(limit)
    observe("mode", oct(stat.S_IMODE(found.st_mode)), "0o644")
    observe("owner", [found.st_uid, found.st_gid], [0, 0])
    observe("xattrs", os.listxattr(limit), [])
    observe("another inode", found.st_ino != inode, True)


def test_row_105_a_delegatee_owns_the_files_it_enables(
    with_controller, world, d, on, kids, observe
):
    write(control(d), on)
    c = d / "c"
    c.mkdir()
    for path in (c, c / "cgroup.procs", control(c)):
        os.chown(path, NOBODY, NOBODY)
    kid = kids()
    kid.do(become, NOBODY)
    kid.do(os.mkdir, str(c / "s"))
    observe("enable", isinstance(kid.do(write, str(control(c)), on), int), True)
    observe("child's", owner(c / "s" / world.limit), NOBODY)
    observe("its own", owner(c / world.limit), 0)
    observe("own limit", kid.do(write, str(c / world.limit), world.limit_text(1)), "EACCES")
    result = kid.do(write, str(c / "s" / world.limit), world.limit_text(1))
    observe("child's limit", isinstance(result, int), True)


def test_row_106_cgroup_stat_counts_where_it_is_active(with_controller, world, d, on, observe):
    (d / "c").mkdir()
    key = f"nr_subsys_{world.controller}"
    observe("itself", flat(d / "cgroup.stat", key), 1)
    observe("child", flat(d / "c" / "cgroup.stat", key), 0)
    write(control(d), on)
    observe("both", flat(d / "cgroup.stat", key), 2)
    observe("child on", flat(d / "c" / "cgroup.stat", key), 1)


def test_row_107_fresh_controller_files(with_controller, world, d, observe):
    texts = {
        world.current: PerWorld(b"0\n", b"sev 0\n"),
        world.events: PerWorld(b"max 0\n", b"sev.max 0\n"),
        world.events_local: PerWorld(b"max 0\n", b"sev.max 0\n"),
    }
    for what, (name, text) in zip(
        ("current", "events", "events.local"), texts.items(), strict=True
    ):
        found = read(d / name)
        observe(what, found if world.is_linux else only_sev(found), text)
        observe(f"mode of {what}", stat.S_IMODE(os.stat(d / name).st_mode), 0o444)
    observe("mode of max", stat.S_IMODE(os.stat(d / world.limit).st_mode), 0o644)
    fresh = read(d / world.limit)
    # hugetlb prints the largest multiple of its page size instead of the word.
    observe("max", fresh if world.is_linux else only_sev(fresh), PerWorld(fresh, b"sev max\n"))


def only_sev(text):
    return b"".join(
        line for line in text.splitlines(keepends=True) if line.startswith((b"sev ", b"sev."))
    )


@pytest.mark.parametrize(
    ("hugetlb", "misc"),
    [
        ((b"max", None), (b"sev max", b"sev max\n")),
        ((b" 2M ", b"2097152\n"), (b" sev 5 ", b"sev 5\n")),
        ((b"3M", b"2097152\n"), (b"sev 010", b"sev 8\n")),
        ((b"1", b"0\n"), (b"sev 0", b"sev 0\n")),
        ((b"0x200000", b"2097152\n"), (b"sev 0x10", b"sev 16\n")),
    ],
)
def test_row_108_limits_that_are_taken(with_controller, world, d, observe, hugetlb, misc):
    text, shown = hugetlb if world.is_linux else misc
    observe("write", write(d / world.limit, text) == len(text), True)
    found = read(d / world.limit)
    observe("text", shown is None or (found if world.is_linux else only_sev(found)) == shown, True)


@pytest.mark.parametrize(
    ("hugetlb", "misc"),
    [
        (b"-1", b"sev -1"), (b"abc", b"sev abc"), (b"+2M", b"sev +2M"), (b"2Mx", b"sev 2x"),
        (b"1.5G", b"sev 1.5"), (b"MAX", b"sev MAX"),
    ],
)  # fmt: skip
def test_row_109_limits_that_are_refused(with_controller, world, d, observe, hugetlb, misc):
    before = read(d / world.limit)
    observe("write", write(d / world.limit, hugetlb if world.is_linux else misc), "EINVAL")
    observe("kept", read(d / world.limit) == before, True)


def test_row_110_overflow_and_nothing(with_controller, world, d, observe):
    # hugetlb's parser is a laxer one that ours do not copy.
    limit = d / world.limit
    overflow = b"18446744073709551616"
    text = overflow if world.is_linux else b"sev " + overflow
    observe("overflow", write(limit, text), PerWorld(len(overflow), "ERANGE"))
    observe("newline", write(limit, b"\n"), PerWorld(1, "EINVAL"))


def test_row_111_counters_cannot_be_written(with_controller, world, d, observe):
    observe("current", write(d / world.current, b"0"), "EINVAL")
    observe("events", write(d / world.events, b"0"), "EINVAL")
    observe("events.local", write(d / world.events_local, b"0"), "EINVAL")


def map_huge_pages():
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB
    return attempt(syscalls.mmap, -1, 1 << 21, mmap.PROT_READ, flags)


class Refusals:
    """D/H/{i,j} with the controller on everywhere, and processes whose charges are refused."""

    def __init__(self, world, d, kids, charge):
        self.world, self.kids, self._charge = world, kids, charge
        self.d, self.h, self.i, self.j = d, d / "H", d / "H" / "i", d / "H" / "j"
        for cgrp in (self.h, self.i, self.j):
            cgrp.mkdir()
        for cgrp in (self.d, self.h):
            write(control(cgrp), b"+" + world.controller.encode())

    def limit(self, cgrp):
        # Reservations are charged at mmap, before any huge page has to exist.
        name = "hugetlb.2MB.rsvd.max" if self.world.is_linux else self.world.limit
        write(cgrp / name, self.world.limit_text(0))

    def charge(self, cgrp):
        kid = self.kids()
        write(cgrp / "cgroup.procs", b"%d" % kid.pid)
        return self._charge(kid)

    def counts(self, cgrp):
        key = "max" if self.world.is_linux else "sev.max"
        events, local = self.world.events, self.world.events_local
        return [flat(cgrp / events, key), flat(cgrp / local, key)]


@pytest.fixture
def refusals(world, kids):
    """The machine's own hierarchy, or a mount of its own whose charges can be made here."""
    if world.is_linux:
        with world.root_controller(on=True), fresh(world.root) as d:
            yield Refusals(world, d, kids, lambda kid: kid.do(map_huge_pages))
        return
    with server.charging() as (root, charge):
        other = replace(world, root=root)
        with other.root_controller(on=True), fresh(root) as d:
            yield Refusals(other, d, kids, lambda kid: charge(kid.pid, "sev", 1))


def test_row_112_a_refusal_is_counted_and_notified(refusals, observe):
    world = refusals.world
    refusals.limit(refusals.i)
    with (
        opened(refusals.h / world.events) as h_events,
        opened(refusals.h / world.events_local) as h_local,
        opened(refusals.i / world.events_local) as i_local,
    ):
        poll = select.poll()
        for fd in (h_events, h_local, i_local):
            os.pread(fd, 100, 0)
            poll.register(fd, select.POLLPRI)
        observe("charge", refusals.charge(refusals.i), PerWorld("ENOMEM", "EBUSY"))
        woken = {fd for fd, _ in poll.poll(100)}
    observe("i", refusals.counts(refusals.i), [1, 1])
    observe("H", refusals.counts(refusals.h), [1, 0])
    observe("D", refusals.counts(refusals.d), [1, 0])
    observe("woken", [fd in woken for fd in (h_events, h_local, i_local)], [True, False, True])


def test_row_113_where_a_refusal_is_counted(refusals, observe):
    refusals.limit(refusals.h)
    refusals.charge(refusals.i)
    refusals.charge(refusals.j)
    # misc counts at the cgroup whose limit it was, hugetlb at the one that asked.
    observe("i", refusals.counts(refusals.i), PerWorld([1, 1], [0, 0]))
    observe("j", refusals.counts(refusals.j), PerWorld([1, 1], [0, 0]))
    observe("H", refusals.counts(refusals.h), PerWorld([2, 0], [2, 2]))
    observe("D", refusals.counts(refusals.d), [2, 0])


def test_c3_a_new_cgroup_enables_nothing(with_controller, world, d, on, observe):
    write(control(d), on)
    (d / "c").mkdir()
    observe("enabled", enabled(d / "c"), b"")
    observe("controllers", read(d / "c" / "cgroup.controllers") == enabled(d), True)
    observe("files", world.limit in files_of(world, d / "c"), True)


def test_c3_disabling_with_processes_in_the_children_is_allowed(
    with_controller, world, d, on, off, kids, observe
):
    (d / "c").mkdir()
    write(control(d), on)
    write(d / "c" / "cgroup.procs", b"%d" % kids().pid)
    observe("disable", isinstance(write(control(d), off), int), True)
    observe("files", files_of(world, d / "c"), [])
    observe("enable", isinstance(write(control(d), on), int), True)
