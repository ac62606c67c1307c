import errno
import os

import pytest
import trio

import kvmsim
from cgfs.control.errors import CommandError
from cgfs.errors import CgroupError, ChargeRefused
from kvmsim.control.messages import StartVm
from kvmsim.engine.base import BusLock, Hlt, InternalError, Shutdown
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import ConfigError, KvmError
from kvmsim.host import presets

CGROUP = "sys/fs/cgroup"


@pytest.fixture
async def host(autojump_clock):
    async with kvmsim.open_host(preset="lab-amd", seed=1) as host:
        host.files.write(f"{CGROUP}/cgroup.subtree_control", "+encryption_ids +misc +bus_lock")
        host.files.mkdir(f"{CGROUP}/tenant")
        yield host


def tenant(host, name):
    return host.files.read(f"{CGROUP}/tenant/{name}")


def set_tenant(host, name, text):
    host.files.write(f"{CGROUP}/tenant/{name}", text)


def start(host, name, cgroup="/tenant", **fields):
    return host.start_vm(StartVm(name, cgroup=cgroup, **fields))


async def test_host_root_has_the_files_programs_look_for(host):
    assert host.files.listdir() == ["EMULATED", "proc", "sys"]
    assert "Nothing here is hardware" in host.files.read("EMULATED")
    assert host.files.read("sys/module/kvm_amd/parameters/sev") == "Y\n"
    assert host.files.read("proc/cpuinfo").count("processor\t:") == 8
    assert host.files.read("proc/cgroups").splitlines()[1:] == [
        "encryption_ids\t0\t2\t1",
        "misc\t0\t2\t1",
        "bus_lock\t0\t2\t1",
    ]


async def test_intel_host_has_the_parameters_of_its_own_module(autojump_clock):
    async with kvmsim.open_host(preset="tdx31") as host:
        assert sorted(host.files.listdir("sys/module")) == ["kvm", "kvm_intel"]
        assert host.files.read(f"{CGROUP}/misc.capacity") == "tdx 31\n"


async def test_vm_takes_an_asid_and_is_charged_until_it_stops(host):
    vm = start(host, "a", type="sev")
    assert vm.asid == 6
    assert tenant(host, "misc.current") == "sev 1\nsev_es 0\n"
    assert tenant(host, "encryption_ids.sev.current") == "1\n"
    assert tenant(host, "cgroup.procs") == f"{vm.pid}\n"
    host.stop_vm("a")
    assert tenant(host, "misc.current") == "sev 0\nsev_es 0\n"
    assert tenant(host, "cgroup.procs") == ""
    assert host.vm_statistics() == []


async def test_refused_vm_leaves_nothing_and_names_the_limit(host):
    set_tenant(host, "misc.max", "sev 1")
    start(host, "a", type="sev")
    with pytest.raises(KvmError) as caught:
        start(host, "b", type="sev")
    cause = caught.value.__cause__
    assert isinstance(cause, ChargeRefused)
    assert (cause.cgroup, cause.file, cause.value) == ("/tenant", "misc.max", "sev 1")
    assert list(host.vms) == ["a"]
    assert len(tenant(host, "cgroup.procs").split()) == 1
    assert tenant(host, "encryption_ids.sev.current") == "1\n"


@pytest.mark.parametrize(
    ("fields", "exit_code"),
    [
        ({"guest": "nonsense"}, os.EX_USAGE),
        ({"type": "sgx"}, os.EX_USAGE),
        ({"type": "tdx"}, os.EX_UNAVAILABLE),
        ({"name": "taken"}, os.EX_UNAVAILABLE),
    ],
)
async def test_request_that_cannot_be_met_leaves_nothing(host, fields, exit_code):
    start(host, "taken")
    with pytest.raises(CommandError) as caught:
        start(host, **({"name": "b"} | fields))
    assert caught.value.exit_code == exit_code
    assert list(host.vms) == ["taken"]
    assert len(tenant(host, "cgroup.procs").split()) == 1


async def test_missing_cgroup_is_enoent(host):
    with pytest.raises(CgroupError) as caught:
        start(host, "a", cgroup="/nowhere")
    assert caught.value.errno == errno.ENOENT


async def test_more_vcpus_than_kvm_has_leaves_nothing(host):
    with pytest.raises(KvmError):
        start(host, "a", type="sev", vcpus=5000)
    assert tenant(host, "misc.current") == "sev 0\nsev_es 0\n"
    assert tenant(host, "cgroup.procs") == ""


async def test_limit_of_the_cgroup_holds_all_its_vms_together(host, autojump_clock):
    set_tenant(host, "bus_lock.max", "100 1000000")
    for name in ("a", "b"):
        start(host, name, guest="buslock rate=5000")
    await trio.sleep(10)
    taken = sum(vm.bus_locks for vm in host.vm_statistics())
    # A full bucket, then one per 10 ms; each vCPU may have taken one it has not been admitted for.
    assert 100 + 10 * 100 - 2 <= taken <= 100 + 10 * 100 + 2


async def test_same_seed_gives_the_same_result_and_another_does_not(autojump_clock):
    async def run(seed):
        async with kvmsim.open_host(seed=seed) as host:
            start(host, "a", cgroup="/", guest="buslock rate=50", vcpus=2)
            start(host, "b", cgroup="/", guest="mixed buslock=20 io=70 hlt=5")
            await trio.sleep(10)
            return host.vm_statistics()

    first, again, other = await run(1), await run(1), await run(2)
    assert first == again
    assert first != other


async def test_scripted_guest_plays_its_stops(host, autojump_clock):
    script = [BusLock(after_ns=1000), BusLock(after_ns=1000), Hlt()]
    host.start_vm(StartVm("a", cgroup="/tenant"), engines=lambda _vcpu: Scripted(script))
    await trio.sleep(1)
    assert host.vm_statistics()[0].bus_locks == 2


async def test_guest_that_shuts_down_ends_its_vm(host, autojump_clock):
    engine = Scripted([Shutdown(after_ns=1000)])
    host.start_vm(StartVm("a", type="sev", cgroup="/tenant"), engines=lambda _vcpu: engine)
    await trio.sleep(1)
    assert host.vms == {}
    assert tenant(host, "cgroup.procs") == ""
    assert tenant(host, "misc.current") == "sev 0\nsev_es 0\n"


async def test_vm_that_failed_says_why_and_keeps_its_asid(host, autojump_clock):
    engine = Scripted([InternalError(after_ns=1000)])
    request = StartVm("a", type="sev", cgroup="/tenant")
    host.start_vm(request, engines=lambda _vcpu: engine)
    await trio.sleep(1)
    [vm] = host.vm_statistics()
    assert (vm.state, vm.error) == ("internal-error", "KVM internal error. Suberror: 1")
    assert tenant(host, "misc.current") == "sev 1\nsev_es 0\n"


async def test_cgroup_kill_ends_the_vms_in_it(host):
    start(host, "a", type="sev")
    start(host, "b")
    start(host, "elsewhere", cgroup="/")
    set_tenant(host, "cgroup.kill", "1")
    assert list(host.vms) == ["elsewhere"]
    assert tenant(host, "cgroup.events") == "populated 0\nfrozen 0\n"
    host.files.rmdir(f"{CGROUP}/tenant")


async def test_vm_killed_before_it_runs_gives_everything_back(host):
    def engines(_vcpu):
        set_tenant(host, "cgroup.kill", "1")
        return Scripted([Hlt()])

    host.start_vm(StartVm("a", type="sev", cgroup="/tenant"), engines=engines)
    assert host.vms == {}
    assert not host.system.vms
    assert tenant(host, "cgroup.procs") == ""
    assert tenant(host, "misc.current") == "sev 0\nsev_es 0\n"


async def test_freezer_stops_the_guest_and_lets_it_go_on(host, autojump_clock):
    start(host, "a", guest="buslock rate=1000")
    await trio.sleep(1)
    set_tenant(host, "cgroup.freeze", "1")
    frozen = host.vm_statistics()[0]
    await trio.sleep(1)
    later = host.vm_statistics()[0]
    set_tenant(host, "cgroup.freeze", "0")
    await trio.sleep(1)
    assert (frozen.state, frozen.bus_locks) == ("frozen", later.bus_locks)
    assert host.vm_statistics()[0].bus_locks > later.bus_locks + 500


async def test_vm_started_in_a_frozen_cgroup_waits(host, autojump_clock):
    set_tenant(host, "cgroup.freeze", "1")
    start(host, "a", guest="buslock rate=1000")
    await trio.sleep(1)
    assert (host.vm_statistics()[0].state, host.vm_statistics()[0].bus_locks) == ("frozen", 0)
    set_tenant(host, "cgroup.freeze", "0")
    await trio.sleep(1)
    assert host.vm_statistics()[0].bus_locks > 500


async def test_moved_vm_leaves_its_charge_behind(host):
    vm = start(host, "a", type="sev")
    host.files.write(f"{CGROUP}/cgroup.procs", str(vm.pid))
    assert host.vm_statistics()[0].cgroup == "/"
    assert tenant(host, "misc.current") == "sev 1\nsev_es 0\n"


async def test_statistics_show_what_is_used(host):
    start(host, "a", type="sev")
    start(host, "b", type="sev-es")
    info = host.statistics()
    used = {name: (resource.used, resource.capacity) for name, resource in info.resources.items()}
    assert used == {"sev": (1, 10), "sev_es": (1, 5)}
    assert (info.vms, info.cgroups, info.preset) == (2, 2, "lab-amd")


async def test_debugfs_counts_the_exits_of_all_vms(host, autojump_clock):
    start(host, "a", guest="mixed io=1000")
    await trio.sleep(1)
    assert int(host.files.read("sys/kernel/debug/kvm/io_exits")) > 500


async def test_resource_of_a_preset_is_counted(autojump_clock):
    preset = presets.parse('vendor = "amd"\n[misc]\nepc = 7\n', "mine.toml")
    async with kvmsim.open_host(preset) as host:
        assert host.files.read(f"{CGROUP}/misc.capacity") == "epc 7\n"
        assert host.statistics().resources["epc"].capacity == 7


async def test_host_without_a_controller_has_none_of_its_files(autojump_clock):
    async with kvmsim.open_host(controllers=["misc"]) as host:
        names = host.files.listdir(CGROUP)
        start(host, "a", cgroup="/", type="sev")
        assert host.files.read(f"{CGROUP}/misc.current") == "sev 1\nsev_es 0\n"
    assert [name for name in names if "encryption" in name] == []


async def test_end_of_the_block_ends_every_vm(autojump_clock):
    async with kvmsim.open_host() as host:
        start(host, "a", cgroup="/", type="sev")
    assert host.vms == {}
    assert not host.system.vms


async def test_error_in_the_block_comes_out_as_it_is(autojump_clock):
    with pytest.raises(ZeroDivisionError):
        async with kvmsim.open_host():
            raise ZeroDivisionError


async def test_unknown_preset_is_a_configuration_error(autojump_clock):
    with pytest.raises(ConfigError):
        async with kvmsim.open_host(preset="nonsense"):
            pass


async def test_path_that_is_not_there_is_enoent(host):
    with pytest.raises(CgroupError) as caught:
        host.files.read(f"{CGROUP}/tenant/nonsense")
    assert caught.value.errno == errno.ENOENT
