"""Limits of C.4 seen end to end: guests, KVM, limiter and time together."""

from __future__ import annotations

import pytest

from cgfs.core.budget import BudgetTree
from kvmsim.errors import ConfigError, KvmError
from kvmsim.sim.testbed import NS_PER_S, Testbed


@pytest.fixture
def charges(monkeypatch) -> list[int]:
    """Times at which bus locks were charged to a cgroup, in the order it happened."""
    times: list[int] = []

    def noted(charge):
        def note(tree, budget, now_ns):
            times.append(now_ns)
            return charge(tree, budget, now_ns)

        return note

    # At once, and after a wait.
    for name in ("charge", "_admit_first"):
        monkeypatch.setattr(BudgetTree, name, noted(getattr(BudgetTree, name)))
    return times


@pytest.mark.parametrize(
    ("quota", "period_us", "nr_vcpus"),
    [(10, 1_000_000, 1), (10, 1_000_000, 5), (7, 100_000, 3), (1, 1_000, 4), (333, 250_000, 2)],
)
def test_long_run_rate_is_the_limit_and_never_above_the_bound(quota, period_us, nr_vcpus, charges):
    bed = Testbed(bus_lock_stall_ns=0)
    tenant = bed.group("tenant", f"{quota} {period_us}")
    bed.vm("noisy", "buslock rate=1000000", tenant, nr_vcpus=nr_vcpus)
    period_ns = period_us * 1000
    bed.run(period_ns / NS_PER_S)  # the burst
    burst = bed.state(tenant).budget.nr_events

    bed.run(100 * period_ns / NS_PER_S)

    steady = bed.state(tenant).budget.nr_events - burst
    assert abs(steady - 100 * quota) <= 0.005 * 100 * quota
    assert len(charges) == burst + steady
    assert charges == sorted(charges)
    for window in (1, 3, quota, 2 * quota, 10 * quota):
        for first, last in zip(charges, charges[window:], strict=False):
            assert window + 1 <= quota + (last - first) * quota // period_ns


def test_quiet_sibling_is_not_delayed_by_the_noisy_ones_own_limit():
    bed = Testbed(bus_lock_stall_ns=0)
    parent = bed.group("parent")
    bed.write(parent, "cgroup.subtree_control", "+bus_lock")
    noisy = bed.group("noisy", "5 1000000", parent)
    quiet = bed.group("quiet", "1000 1000000", parent)
    bed.vm("noisy", "buslock rate=10000", noisy, nr_vcpus=4)
    vm = bed.vm("quiet", "buslock rate=100", quiet)

    bed.run(10)

    assert vm.statistics().throttled_ns == 0
    # What accrues while the first five have not been taken yet is lost.
    assert 5 + 50 - 1 <= bed.state(noisy).budget.nr_events <= 5 + 50


def test_siblings_share_their_parents_limit_evenly_however_many_vcpus_each_has():
    bed = Testbed(bus_lock_stall_ns=0)
    parent = bed.group("parent", "4 1000000")
    bed.write(parent, "cgroup.subtree_control", "+bus_lock")
    a, b = bed.group("a", parent=parent), bed.group("b", parent=parent)
    bed.vm("a", "buslock rate=1000000", a, nr_vcpus=3)
    bed.vm("b", "buslock rate=1000000", b)
    bed.run(1)
    before = [bed.state(cgrp).budget.nr_events for cgrp in (a, b)]

    bed.run(100)

    after = [bed.state(cgrp).budget.nr_events for cgrp in (a, b)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [200, 200]


def test_chance_of_a_vm_does_not_depend_on_the_others():
    counts = []
    for others in (0, 3):
        bed = Testbed(bus_lock_stall_ns=0)
        for i in range(others):
            bed.vm(f"other{i}", "mixed io=100 hlt=10")
        counts.append(bed.vm("vm", "buslock rate=1000"))
        bed.run(1)

    assert counts[0].statistics().threads == counts[1].statistics().threads


def test_unknown_guest_word_is_refused():
    with pytest.raises(ConfigError, match="bogus"):
        Testbed().vm("vm", "bogus")


def test_vm_in_a_frozen_cgroup_waits_until_it_is_thawed():
    bed = Testbed()
    tenant = bed.group("tenant")
    bed.write(tenant, "cgroup.freeze", "1")
    vmm = bed.vm("a", "buslock rate=1000", tenant)
    bed.run(1)
    frozen = vmm.statistics()

    bed.write(tenant, "cgroup.freeze", "0")
    bed.run(1)

    assert (frozen.frozen, frozen.nr_bus_locks) == (True, 0)
    assert vmm.statistics().nr_bus_locks > 500


def test_killed_vm_leaves_its_cgroup():
    bed = Testbed()
    tenant = bed.group("tenant")
    bed.vm("a", "busy", tenant)

    bed.write(tenant, "cgroup.kill", "1")

    assert not tenant.populated
    assert not bed.system.vms


def test_vm_that_cannot_be_made_leaves_no_process_behind():
    bed = Testbed("milan509-es99")  # without bus lock detection
    tenant = bed.group("tenant")

    with pytest.raises(KvmError):
        bed.vm("a", "busy", tenant, bus_lock_ratelimit=5)

    assert not tenant.populated
