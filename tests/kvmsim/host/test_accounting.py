"""KVM against the real cgroup model: who is charged, who refuses, where a charge ends."""

from errno import EBUSY, EINVAL

import pytest
from owners import Owner

from cgfs.controllers.bus_lock import BusLock
from cgfs.controllers.encryption_ids import EncryptionIds
from cgfs.controllers.misc import Misc
from cgfs.core import attach
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from cgfs.errors import ChargeRefused
from kvmsim.abi.exits import Exit
from kvmsim.engine.base import BusLock as Lock
from kvmsim.engine.base import Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.run import InGuest, Throttled
from kvmsim.kvm.system import System

ALL = (EncryptionIds, Misc, BusLock)
SEV, SEV_ES, SNP, TDX = 2, 3, 4, 5
AMD = """vendor = "amd"
[sev]
max-asid = 5
min-sev-asid = 4
snp = true
[bus-lock]
exit = "fault"
[misc]
widgets = 7
"""
INTEL = 'vendor = "intel"\n[tdx]\nkeys = 2\n[bus-lock]\nexit = "trap"\n'
S = 1_000_000_000


class Host:
    """A machine with its cgroups, used as with a shell."""

    def __init__(self, toml=AMD, controllers=ALL):
        self.roots = Roots(controllers)
        self.accounting = CgroupAccounting(self.roots)
        self.kvm = System(Machine(parse(toml, "t"), self.roots, self.accounting))
        for controller in controllers:
            self.write("/", "cgroup.subtree_control", f"+{controller.name}")

    def mkdir(self, path):
        parent, _, name = path.rpartition("/")
        return self.roots.v2.mkdir(self.roots.v2.find(parent or "/"), name)

    def row(self, path, name):
        node, slot = self.roots.v2.file(self.roots.v2.find(path), name)
        return node, node.rows[slot - 1]

    def write(self, path, name, text, now_ns=0):
        node, row = self.row(path, name)
        row.write(node, text.encode(), KERNEL, now_ns)

    def cat(self, path, name):
        node, row = self.row(path, name)
        return row.show(node, KERNEL)

    def spawn(self, path):
        return self.roots.spawn(self.roots.v2.find(path), Owner(), 0)

    def start(self, path, vm_type=SEV):
        vm = self.kvm.create_vm(vm_type, self.spawn(path).pid)
        vm.encrypt()
        return vm

    def both(self, path):
        ids = self.cat(path, "encryption_ids.sev.current").strip()
        return ids, self.cat(path, "misc.current").splitlines()[0]


@pytest.fixture
def host():
    host = Host()
    host.mkdir("/tenant")
    host.mkdir("/other")
    return host


def refusal(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno, error.value.__cause__


def test_capacities_are_those_of_the_machine(host):
    assert host.cat("/", "misc.capacity") == "sev 2\nsev_es 3\nwidgets 7\n"
    assert host.cat("/", "encryption_ids.sev.stat") == "total 2\nused 0\n"
    assert host.cat("/", "encryption_ids.sev_es.stat") == "total 3\nused 0\n"


def test_tdx_keys_are_known_to_misc_only():
    host = Host(INTEL)
    host.mkdir("/tenant")
    vm = host.start("/tenant", TDX)
    assert host.cat("/", "misc.capacity") == "tdx 2\n"
    assert host.cat("/tenant", "misc.current") == "tdx 1\n"
    vm.close()
    assert host.cat("/tenant", "misc.current") == "tdx 0\n"


def test_guest_is_charged_to_both_interfaces(host):
    host.start("/tenant")
    assert host.both("/tenant") == ("1", "sev 1")
    assert host.cat("/", "encryption_ids.sev.stat") == "total 2\nused 1\n"


@pytest.mark.parametrize("vm_type", [SEV_ES, SNP])
def test_es_and_snp_guests_are_charged_as_sev_es(host, vm_type):
    host.start("/tenant", vm_type)
    assert host.cat("/tenant", "misc.current") == "sev 0\nsev_es 1\nwidgets 0\n"
    assert host.cat("/tenant", "encryption_ids.sev_es.current") == "1\n"


def test_refusal_by_misc_undoes_encryption_ids_and_names_the_limit(host):
    host.write("/tenant", "misc.max", "sev 0")
    errno, cause = refusal(host.start, "/tenant")
    assert errno == EBUSY
    assert isinstance(cause, ChargeRefused)
    assert (cause.cgroup, cause.file, cause.value) == ("/tenant", "misc.max", "sev 0")
    assert host.both("/tenant") == ("0", "sev 0")
    assert host.cat("/tenant", "misc.events") == "sev.max 1\nsev_es.max 0\nwidgets.max 0\n"


def test_refusal_by_encryption_ids_does_not_reach_misc(host):
    host.write("/tenant", "encryption_ids.sev.max", "0")
    errno, cause = refusal(host.start, "/tenant")
    assert (errno, cause.file) == (EBUSY, "encryption_ids.sev.max")
    assert host.cat("/tenant", "misc.events").startswith("sev.max 0\n")


def test_exhausted_machine_is_refused_at_the_root(host):
    host.start("/tenant")
    host.start("/other")
    errno, cause = refusal(host.start, "/tenant")
    assert (errno, cause.cgroup, cause.file) == (EBUSY, "/", "encryption_ids.sev.stat")
    assert host.kvm.statistics().asids.flushes == 0


def test_t_d_2_third_guest_is_refused_by_capacity_without_a_flush():
    host = Host(controllers=(Misc,))
    first = host.start("/")
    assert (first.key.asid, host.start("/").key.asid) == (4, 5)
    errno, cause = refusal(host.start, "/")
    assert (errno, cause.file) == (EBUSY, "misc.capacity")
    assert host.kvm.statistics().asids.flushes == 0
    first.close()
    assert host.start("/").key.asid == 4
    assert host.kvm.statistics().asids.flushes == 1


def test_t_d_5_leaf_limit_of_one_refuses_the_second_init_with_an_event_there():
    host = Host(controllers=(Misc,))
    host.mkdir("/leaf")
    host.write("/leaf", "misc.max", "sev 1")
    host.start("/leaf")
    assert refusal(host.start, "/leaf")[0] == EBUSY
    assert host.cat("/leaf", "misc.events.local").startswith("sev.max 1\n")
    assert host.kvm.statistics().asids.flushes == 0


def test_failed_flush_returns_the_charge():
    host = Host(AMD + "[faults]\ndf-flush = true\n")
    host.start("/").close()
    host.start("/").close()
    assert refusal(host.start, "/")[0] == EBUSY
    assert host.cat("/", "misc.current").startswith("sev 0\n")
    assert host.cat("/", "encryption_ids.sev.stat") == "total 2\nused 0\n"


def test_migration_leaves_the_charge_behind(host):
    vm = host.start("/tenant")
    attach.attach(host.roots.v2.find("/other"), vm.creator.pid, KERNEL, 0)
    assert (host.both("/tenant"), host.both("/other")) == (("1", "sev 1"), ("0", "sev 0"))
    vm.close()
    assert host.both("/tenant") == ("0", "sev 0")


def test_charge_survives_the_removal_of_its_cgroup(host):
    vm = host.start("/tenant")
    attach.attach(host.roots.v2.find("/other"), vm.creator.pid, KERNEL, 0)
    host.roots.v2.rmdir(host.roots.v2.find("/tenant"), 0)
    assert host.cat("/", "misc.current").startswith("sev 1\n")
    vm.close()
    assert host.cat("/", "misc.current").startswith("sev 0\n")
    assert host.cat("/", "encryption_ids.sev.stat") == "total 2\nused 0\n"


def test_disabled_controller_charges_the_nearest_ancestor_that_has_it(host):
    host.write("/", "cgroup.subtree_control", "-misc")
    host.start("/tenant")
    assert host.cat("/tenant", "encryption_ids.sev.current") == "1\n"
    assert host.roots.v2.file(host.roots.v2.find("/tenant"), "misc.current") is None
    assert host.cat("/", "misc.current").startswith("sev 1\n")


@pytest.mark.parametrize("controllers", [(EncryptionIds,), (Misc,), ()])
def test_host_with_some_of_the_controllers_charges_those(controllers):
    host = Host(controllers=controllers)
    vm = host.start("/")
    assert len(vm.key.charge.charged) == len(controllers)
    vm.close()
    assert host.kvm.statistics().asids.sev == 0


def test_host_without_any_controller_is_limited_by_its_pool():
    host = Host(controllers=())
    host.start("/")
    host.start("/")
    errno, cause = refusal(host.start, "/")
    assert (errno, cause) == (EBUSY, None)


def test_missing_capacity_is_ebusy_from_encryption_ids_and_einval_from_misc():
    for controller, errno in ((EncryptionIds, EBUSY), (Misc, EINVAL)):
        host = Host(controllers=(controller,))
        host.roots.controller(controller.name).set_capacity("sev", 0)
        assert refusal(host.start, "/")[0] == errno


def test_uncharging_a_charge_twice_is_once(host):
    charge = host.accounting.charge_asid(host.spawn("/tenant").pid, "sev")
    host.accounting.uncharge_asid(charge)
    host.accounting.uncharge_asid(charge)
    assert host.both("/tenant") == ("0", "sev 0")


# -- bus locks -----------------------------------------------------------------------------------


def locking_vcpu(host, path, locks):
    vm = host.kvm.create_vm(0, host.spawn(path).pid)
    vcpu = vm.create_vcpu(0)
    vcpu.engine = Scripted([Lock(after_ns=10)] * locks)
    return vcpu


def run_until_it_waits(vcpu, now_ns=0):
    blocked = vcpu.kvm_run(now_ns)
    while isinstance(blocked, InGuest):
        now_ns += blocked.guest_ns
        blocked = vcpu.resume(now_ns)
    return blocked, now_ns


@pytest.mark.parametrize("toml", [AMD, INTEL], ids=["fault", "trap"])
def test_finite_limit_holds_a_vm_that_asked_for_nothing(toml):
    host = Host(toml)
    host.mkdir("/tenant")
    host.write("/tenant", "bus_lock.max", "3 1000000")
    vcpu = locking_vcpu(host, "/tenant", 9)
    assert run_until_it_waits(vcpu) == (Throttled(), 40)
    assert vcpu.bus_locks == (3 if vcpu.fault_like else 4)
    limiter = host.roots.controller("bus_lock")
    due = limiter.next_ready_ns()
    limiter.pump(due)
    assert isinstance(vcpu.resume(due), InGuest)
    assert vcpu.bus_locks == 4
    assert host.cat("/tenant", "bus_lock.stat").startswith("nr_events 4\nnr_throttled 1\n")


def test_vm_without_limit_or_capability_is_not_even_counted(host):
    vcpu = locking_vcpu(host, "/tenant", 5)
    assert run_until_it_waits(vcpu) == (None, 50)
    assert vcpu.run.exit_reason == Exit.HLT
    assert host.cat("/tenant", "bus_lock.stat").startswith("nr_events 0\n")


def test_raising_the_limit_wakes_the_vcpu(host):
    host.write("/tenant", "bus_lock.max", "1 1000000")
    vcpu = locking_vcpu(host, "/tenant", 3)
    woken = []
    vcpu.on_wake = lambda vcpu, now_ns: woken.append(now_ns)
    run_until_it_waits(vcpu)
    host.write("/tenant", "bus_lock.max", "max", now_ns=100)
    assert woken == [100]
    assert isinstance(vcpu.resume(100), InGuest)


def test_signals_do_not_escape_the_limit(host):
    host.write("/tenant", "bus_lock.max", "1 1000000")
    vcpu = locking_vcpu(host, "/tenant", 3)
    _, now_ns = run_until_it_waits(vcpu)
    for _ in range(5):
        with pytest.raises(KvmError):
            vcpu.interrupt(now_ns)
        assert vcpu.kvm_run(now_ns) == Throttled()
    assert host.cat("/tenant", "bus_lock.stat").startswith("nr_events 1\nnr_throttled 1\n")


def test_move_to_an_unlimited_cgroup_ends_the_wait(host):
    host.write("/tenant", "bus_lock.max", "1 1000000")
    vcpu = locking_vcpu(host, "/tenant", 3)
    run_until_it_waits(vcpu)
    attach.attach(host.roots.v2.find("/other"), vcpu.pid, KERNEL, 0)
    vcpu.vm.moved(50)
    assert vcpu.statistics().phase == "ready"
    assert isinstance(vcpu.resume(50), InGuest)


def test_teardown_of_a_waiting_vcpu_is_counted_as_cancelled(host):
    host.write("/tenant", "bus_lock.max", "1 1000000")
    vcpu = locking_vcpu(host, "/tenant", 3)
    _, now_ns = run_until_it_waits(vcpu)
    vcpu.vm.close(now_ns)
    assert "nr_cancelled 1\n" in host.cat("/tenant", "bus_lock.stat")
    assert host.roots.controller("bus_lock").next_ready_ns() in {None, S + 10}


@pytest.mark.parametrize("toml", [AMD, INTEL], ids=["fault", "trap"])
def test_teardown_before_an_owed_lock_was_asked_for_is_counted_as_cancelled(toml):
    # C.4: the wait comes with the next KVM_RUN, which never comes.
    host = Host(toml)
    host.mkdir("/tenant")
    vcpu = locking_vcpu(host, "/tenant", 3)
    vcpu.bus_lock_exit = True
    assert run_until_it_waits(vcpu)[0] is None
    assert vcpu.run.exit_reason == Exit.X86_BUS_LOCK
    vcpu.vm.close(20)
    assert host.cat("/tenant", "bus_lock.stat").startswith("nr_events 0\n")
    assert "nr_cancelled 1\n" in host.cat("/tenant", "bus_lock.stat")


def test_host_without_the_controller_admits_everything():
    host = Host(controllers=(Misc,))
    vcpu = locking_vcpu(host, "/", 2)
    vcpu.bus_lock_exit = True
    vcpu.engine = Scripted([Lock(), Hlt()])
    assert run_until_it_waits(vcpu)[0] is None
    assert run_until_it_waits(vcpu)[0] is None
    vcpu.vm.moved(0)
    vcpu.vm.close(0)
