"""VMs of clients on their host: debugfs directories and snapshots."""

import pytest

from cgfs.control.server import Peer
from cgfs.errors import CgroupError
from kvmsim.builder.host import Host
from kvmsim.control.client_messages import ClientVcpu, ClientVm, VmReport
from kvmsim.host.presets import parse

DEBUGFS = "sys/kernel/debug/kvm"


def vcpu(number=0, pid=0, **exits):
    return ClientVcpu(number, pid, "user", exits, bus_locks=2, throttled_ns=3)


def vm(key=1, fd=5, vcpus=(), pid=100):
    return ClientVm(key, pid, fd, "sev", "active", 4, bus_lock_exits=False, vcpus=list(vcpus))


@pytest.fixture
async def host():
    return Host(parse('vendor = "amd"\n[sev]\nmax-asid = 5\nmin-sev-asid = 4', "t"), "t")


@pytest.fixture
async def session(host):
    return host.attach_client("vmm", Peer(1, 0, 0), lambda *_: None)


async def test_reported_vm_has_a_directory_with_its_counts(host, session):
    session.report(VmReport([vm(vcpus=[vcpu(0, IO=2, HLT=1), vcpu(1, 101, IO=4)])]))
    directory = f"{DEBUGFS}/100-5"
    assert host.files.read(f"{directory}/exits") == "7\n"
    assert host.files.read(f"{directory}/io_exits") == "6\n"
    assert host.files.read(f"{DEBUGFS}/io_exits") == "6\n"
    assert host.files.read(f"{directory}/vcpu0/pid") == "0\n"
    assert host.files.read(f"{directory}/vcpu1/pid") == "101\n"
    assert host.files.read(f"{directory}/vcpu1/tsc-scaling-ratio-frac-bits") == "32\n"


async def test_later_report_changes_the_counts_and_adds_vcpus(host, session):
    session.report(VmReport([vm()]))
    session.report(VmReport([vm(vcpus=[vcpu(3, MMIO=1)])]))
    assert host.files.read(f"{DEBUGFS}/100-5/mmio_exits") == "1\n"
    assert "vcpu3" in host.files.listdir(f"{DEBUGFS}/100-5")


async def test_destroyed_vm_has_no_directory(host, session):
    before = host.files.listdir(DEBUGFS)
    session.report(VmReport([vm(vcpus=[vcpu()])]))
    session.report(VmReport([], [1]))
    assert host.files.listdir(DEBUGFS) == before
    assert host.vm_statistics() == []


async def test_vms_of_a_supervisor_that_is_gone_are_gone(host, session):
    session.report(VmReport([vm(), vm(key=2, fd=6)]))
    assert host.statistics().vms == 2
    session.close()
    session.close()
    assert host.statistics().vms == 0
    with pytest.raises(CgroupError):
        host.files.listdir(f"{DEBUGFS}/100-5")


async def test_second_vm_under_a_number_that_is_taken_has_no_directory_of_its_own(host, session):
    session.report(VmReport([vm(vcpus=[vcpu(IO=1)])]))
    session.report(VmReport([vm(key=2, vcpus=[vcpu(IO=9)])]))
    assert host.files.read(f"{DEBUGFS}/100-5/io_exits") == "1\n"
    session.report(VmReport([], [2]))
    assert host.files.read(f"{DEBUGFS}/100-5/io_exits") == "1\n"


async def test_snapshot_says_whose_it_is(host, session):
    session.report(VmReport([vm(vcpus=[vcpu(IO=1, X86_BUS_LOCK=2)])]))
    [snapshot] = host.vm_statistics()
    assert (snapshot.name, snapshot.guest, snapshot.pid) == ("100-5", "client vmm", 100)
    assert (snapshot.asid, snapshot.state, snapshot.cgroup) == (4, "running", "/")
    assert (snapshot.bus_locks, snapshot.bus_lock_exits) == (2, 2)
    assert snapshot.vcpus[0].runs == 3
