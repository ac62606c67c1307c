from __future__ import annotations

from dataclasses import dataclass, field
from errno import EINVAL
from typing import TYPE_CHECKING

import pytest

from cgfs.controllers.bus_lock import BusLock, BusLockCss
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.cgroup import Cgroup

S = 1_000_000_000


@dataclass(eq=False)
class Lock:
    times: list[int] = field(default_factory=list)

    def admitted(self, now_ns: int) -> None:
        self.times.append(now_ns)


class Host:
    """A host with the bus_lock controller, and its files by short name."""

    def __init__(self) -> None:
        self.roots = Roots([BusLock])
        controller = self.roots.controller("bus_lock")
        assert isinstance(controller, BusLock)
        self.controller = controller
        self.rows = {row.name.removeprefix("bus_lock."): row for row in BusLock.files}

    def mkdir(self, path: str, now_ns: int = 0) -> BusLockCss:
        parent_path, _, name = path.rpartition("/")
        parent = self.roots.v2.find(parent_path)
        self.enable(parent, now_ns)
        return self.css(self.roots.v2.mkdir(parent, name))

    def enable(self, cgrp: Cgroup, now_ns: int = 0, word: str = "+bus_lock") -> None:
        found = self.roots.v2.file(cgrp, "cgroup.subtree_control")
        assert found is not None
        node, slot = found
        node.rows[slot - 1].write(node, word.encode(), KERNEL, now_ns)

    def css(self, cgrp: Cgroup) -> BusLockCss:
        css = cgrp.css["bus_lock"]
        assert isinstance(css, BusLockCss)
        return css

    def write(self, css: BusLockCss, text: str | bytes, now_ns: int = 0) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.rows["max"].write(css, data, KERNEL, now_ns)

    def show(self, css: BusLockCss, name: str) -> str:
        return self.rows[name].show(css, KERNEL)

    def lock(self, css: BusLockCss, now_ns: int = 0) -> Lock:
        lock = Lock()
        if css.request(lock, now_ns):
            lock.admitted(now_ns)
        return lock


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def tenant(host) -> BusLockCss:
    return host.mkdir("/tenant")


def test_root_has_no_files(host):
    assert [row.name for row in BusLock.files if row.exists_on(root=True)] == []


def test_modes_are_those_of_the_other_controllers():
    assert {row.name: row.mode for row in BusLock.files} == {
        "bus_lock.max": 0o644,
        "bus_lock.stat": 0o444,
        "bus_lock.events": 0o444,
        "bus_lock.events.local": 0o444,
    }


def test_fresh_cgroup_shows_no_limit_and_zero_counts(host, tenant):
    assert host.show(tenant, "max") == "max 1000000\n"
    assert (
        host.show(tenant, "stat")
        == "nr_events 0\nnr_throttled 0\nthrottled_usec 0\nnr_cancelled 0\n"
    )
    assert host.show(tenant, "events") == "max 0\n"
    assert host.show(tenant, "events.local") == "max 0\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("10", "10 500000\n"),
        ("10\n", "10 500000\n"),
        ("10 1000000", "10 1000000\n"),
        ("10 1000", "10 1000\n"),
        ("  10\t2000 \n", "10 2000\n"),
        (b"\xa010 2000\xa0", "10 2000\n"),
        ("010", "10 500000\n"),
        ("1", "1 500000\n"),
        ("4294967295", "4294967295 500000\n"),
        ("max", "max 500000\n"),
        ("max 20000", "max 20000\n"),
    ],
)
def test_write_of_max_stores_quota_and_period(host, tenant, text, shown):
    host.write(tenant, "7 500000")

    host.write(tenant, text)

    assert host.show(tenant, "max") == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "0",
        "-1",
        "+5",
        "4294967296",
        "99999999999999999999999",
        "0x10",
        "1.0",
        "1e3",
        "5k",
        "1_0",
        "MAX",
        "Max",
        "maximum",
        "max0",
        "abc",
        "10 999",
        "10 1000001",
        "10 0",
        "10 -1000",
        "10 +1000",
        "10 max",
        "10 abc",
        "10 1000 \x01",
        "10 1000 1",
        "max max",
        "1000 10 x",
        "\u0661\u0660",
        "10,1000",
    ],
)
def test_write_of_anything_else_is_einval_and_keeps_the_value(host, tenant, text):
    host.write(tenant, "7 500000")

    with pytest.raises(CgroupError) as refused:
        host.write(tenant, text)

    assert refused.value.errno == EINVAL
    assert host.show(tenant, "max") == "7 500000\n"


def test_limit_takes_effect_at_once_and_fills_the_credit(host, tenant):
    host.write(tenant, "2 1000000", S)

    locks = [host.lock(tenant, S) for _ in range(3)]
    host.controller.pump(2 * S)

    assert [lock.times for lock in locks] == [[S], [S], [S + S // 2]]


def test_stat_counts_here_and_below(host, tenant):
    child = host.mkdir("/tenant/child")
    host.write(tenant, "1 1000000")

    for _ in range(3):
        host.lock(child)
    host.controller.pump(S)

    expected = "nr_events 2\nnr_throttled 2\nthrottled_usec 1000000\nnr_cancelled 0\n"
    assert host.show(child, "stat") == expected
    assert host.show(tenant, "stat") == expected


def test_event_counts_at_the_cgroup_whose_limit_was_short(host, tenant):
    child = host.mkdir("/tenant/child")
    leaf = host.mkdir("/tenant/child/leaf")
    host.write(child, "1 1000000")

    for _ in range(3):
        host.lock(leaf)

    assert [host.show(css, "events") for css in (tenant, child, leaf)] == [
        "max 2\n",
        "max 2\n",
        "max 0\n",
    ]
    assert [host.show(css, "events.local") for css in (tenant, child, leaf)] == [
        "max 0\n",
        "max 2\n",
        "max 0\n",
    ]


def test_event_notifies_the_files_it_changes_and_no_other(host, tenant):
    child = host.mkdir("/tenant/child")
    host.write(child, "1 1000000")
    seen = []

    class Listening:
        def modified(self, node, slot):
            seen.append((node.cgrp.path, node.rows[slot - 1].name))

    host.roots.listener = Listening()

    host.lock(child)
    assert seen == []
    host.lock(child)

    assert seen == [
        ("/tenant/child", "bus_lock.events.local"),
        ("/tenant/child", "bus_lock.events"),
        ("/tenant", "bus_lock.events"),
    ]


def test_interrupted_wait_counts_once(host, tenant):
    host.write(tenant, "1 1000000")
    host.lock(tenant)
    lock = host.lock(tenant)

    assert host.controller.withdraw(lock, 10)
    assert not tenant.request(lock, 20)

    assert host.show(tenant, "events") == "max 1\n"
    assert "nr_throttled 1\n" in host.show(tenant, "stat")


def test_cancelled_wait_is_not_charged(host, tenant):
    host.write(tenant, "1 1000000")
    host.lock(tenant)
    lock = host.lock(tenant)

    assert host.controller.cancel(lock, tenant, 5_000)

    assert (
        host.show(tenant, "stat")
        == "nr_events 1\nnr_throttled 1\nthrottled_usec 5\nnr_cancelled 1\n"
    )
    assert host.controller.next_ready_ns() is None


def test_event_dropped_before_it_was_asked_for_is_cancelled(host, tenant):
    child = host.mkdir("/tenant/child")

    assert host.controller.cancel(Lock(), child, 0)

    for css in (child, tenant):
        assert host.show(css, "stat").startswith("nr_events 0\nnr_throttled 0\n")
        assert host.show(css, "stat").endswith("nr_cancelled 1\n")


def test_event_admitted_at_the_moment_of_the_cancel_is_not_cancelled(host, tenant):
    host.write(tenant, "1 1000000")
    host.lock(tenant)
    lock = host.lock(tenant)

    assert not host.controller.cancel(lock, tenant, S)

    assert lock.times == [S]
    assert host.show(tenant, "stat").endswith("nr_cancelled 0\n")


def test_limited_looks_at_ancestors(host, tenant):
    child = host.mkdir("/tenant/child")
    assert not child.limited()

    host.write(tenant, "5")

    assert child.limited()


def test_moved_waiter_waits_for_the_limits_of_its_new_cgroup(host, tenant):
    other = host.mkdir("/other")
    host.write(tenant, "1 1000000")
    host.lock(tenant)
    lock = host.lock(tenant)

    host.controller.move(lock, other, 30)

    assert lock.times == [30]


def test_disabling_the_controller_leaves_waiters_to_the_parents_limit(host, tenant):
    child = host.mkdir("/tenant/child")
    host.write(child, "1 1000000")
    host.lock(child)
    lock = host.lock(child)

    host.enable(host.roots.v2.find("/tenant"), 40, "-bus_lock")

    assert lock.times == [40]
    assert tenant.budget.nr_events == 2


def test_counts_of_a_removed_cgroup_stay_in_its_parent(host, tenant):
    child = host.mkdir("/tenant/child")
    host.lock(child)

    host.roots.v2.rmdir(child.cgrp, 0)

    assert host.show(tenant, "stat").startswith("nr_events 1\n")
    assert not tenant.budget.children


def test_deadline_of_the_next_admission_is_known_and_announced(host, tenant):
    calls = []
    host.controller.on_ready = lambda: calls.append(host.controller.next_ready_ns())
    host.write(tenant, "4 1000000")

    for _ in range(6):
        host.lock(tenant)

    assert calls == [S // 4]
    assert host.controller.next_ready_ns() == S // 4
