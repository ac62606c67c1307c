from errno import EBADF, EBUSY, EINTR, EINVAL, EIO

import pytest
from owners import Owner

from cgfs.controllers.encryption_ids import EncryptionIds
from cgfs.controllers.misc import Misc
from cgfs.core import attach
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from kvmsim.abi import sev as abi
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.system import System

SEV, SEV_ES, SNP = 2, 3, 4
UNTOUCHED = 77
PRESET = 'vendor = "amd"\n[sev]\nmax-asid = 5\nmin-sev-asid = 4\n'


def vmsa(vmm, vm, **values):
    outcome = vmm.run(vm, abi.KVM_SEV_LAUNCH_UPDATE_VMSA, **values)
    assert outcome.answer == (0, 0)


# -- mirror ----------------------------------------------------------------------------------------


def test_mirror_shares_the_guest_and_is_charged_nothing(vmm, accounting):
    owner = vmm.started()
    mirror = vmm.create(SEV)
    assert vmm.mirror(mirror, owner) == 0
    assert vmm.status(mirror)["handle"] == vmm.status(owner)["handle"] == 1
    assert accounting.charged == {"sev": 1}
    statistics = mirror.statistics()
    assert (statistics.asid, statistics.kind, statistics.state) == (5, None, "active")


@pytest.mark.parametrize("fd", [99, -1])
@pytest.mark.parametrize("cap", [197, 206])
def test_source_that_is_not_open_is_ebadf(vmm, cap, fd):
    assert vmm.enable(vmm.create(), cap, fd) == EBADF


@pytest.mark.parametrize("cap", [197, 206])
def test_source_that_is_no_vm_is_ebadf(vmm, cap):
    assert vmm.enable(vmm.create(), cap, vmm.sev_fd) == EBADF
    vcpu = vmm.client.open(vmm.create().create_vcpu(0))
    assert vmm.enable(vmm.create(), cap, vcpu) == EBADF


@pytest.mark.parametrize("cap", [197, 206])
def test_only_32_bits_of_the_descriptor_count(vmm, cap):
    owner = vmm.guest()
    assert vmm.enable(vmm.create(), cap, vmm.fd_of(owner) | 7 << 32) == 0


@pytest.mark.parametrize("cap", [197, 206])
def test_own_descriptor_is_einval(vmm, cap):
    vm = vmm.guest()
    assert vmm.enable(vm, cap, vm) == EINVAL


def test_mirror_of_a_vm_that_is_no_guest_is_einval(vmm):
    assert vmm.mirror(vmm.create(), vmm.create()) == EINVAL


def test_mirror_of_an_snp_guest_is_einval(vmm):
    assert vmm.mirror(vmm.create(SNP), vmm.guest(SNP)) == EINVAL


def test_mirror_of_a_mirror_is_einval(vmm):
    mirror = vmm.create()
    vmm.mirror(mirror, vmm.guest())
    assert vmm.mirror(vmm.create(), mirror) == EINVAL


def test_mirror_into_a_vm_with_vcpus_is_einval(vmm):
    assert vmm.mirror(vmm.create(vcpus=1), vmm.guest()) == EINVAL


def test_mirror_into_a_guest_is_einval(vmm):
    assert vmm.mirror(vmm.guest(), vmm.guest()) == EINVAL


def test_mirror_may_be_of_another_type(vmm):
    assert vmm.mirror(vmm.create(0), vmm.guest(SEV)) == 0


def test_mirror_takes_four_commands_and_refuses_the_others_unread(vmm):
    owner = vmm.started(SEV_ES, vcpus=1)
    mirror = vmm.create(SEV_ES)
    vmm.mirror(mirror, owner)
    refused = [n for n in range(103) if vmm.run(mirror, n).answer == (EINVAL, UNTOUCHED)]
    assert sorted(set(range(103)) - set(refused)) == [4, 16, 17, 18]


def test_vmsa_of_a_mirror_goes_through_the_descriptor_of_its_owner(vmm):
    mirror = vmm.create(SEV_ES)
    vmm.mirror(mirror, vmm.started(SEV_ES, vcpus=1))
    mirror.create_vcpu(0)
    vmsa(vmm, mirror, sev_fd=-1)
    assert mirror.vcpus[0].state_protected


def test_owner_lives_until_its_mirror_is_closed(vmm, accounting):
    owner, mirror = vmm.started(), vmm.create()
    vmm.mirror(mirror, owner)
    owner.close()
    assert owner.alive
    assert vmm.state(mirror) == 1
    assert accounting.charged == {"sev": 1}
    mirror.close()
    assert not owner.alive
    assert accounting.charged == {"sev": 0}
    assert vmm.system.firmware.guests == {}
    assert vmm.system.vms == {}


def test_mirror_closed_first_leaves_the_owner_alone(vmm, accounting):
    owner, mirror = vmm.started(), vmm.create()
    vmm.mirror(mirror, owner)
    mirror.close()
    assert vmm.state(owner) == 1
    owner.close()
    assert accounting.charged == {"sev": 0}


@pytest.mark.parametrize(("quirk", "features"), [("true", 0), ("false", 32)])
def test_quirk_mirror_drops_vmsa_features(vmm_on, quirk, features):
    vmm = vmm_on(f"[quirks]\nmirror_drops_vmsa_features = {quirk}\n")
    owner = vmm.create(SEV_ES)
    vmm.run(owner, abi.KVM_SEV_INIT2, abi.KVM_SEV_INIT_STRUCT, vmsa_features=32)
    mirror = vmm.create(SEV_ES)
    assert vmm.mirror(mirror, owner) == 0
    assert (owner.vmsa_features, mirror.vmsa_features) == (32, features)


# -- move ------------------------------------------------------------------------------------------


def test_move_takes_everything_and_leaves_a_dead_vm(vmm, accounting):
    source, target = vmm.started(), vmm.create()
    address, _ = vmm.memory(bytes(8192))
    vmm.region(source, address, 8192)
    assert vmm.move(target, source) == 0
    assert vmm.status(target).errno == EBADF  # the descriptor number stayed behind
    vmm.client.files[0] = vmm.client.files[vmm.sev_fd]
    assert vmm.status(target)["handle"] == 1
    assert vmm.region(target, address, 8192, 0x8010AEBC) == 0
    assert vmm.status(source).errno == EIO
    assert source.statistics().state == "dead"
    assert accounting.charged == {"sev": 1}
    assert (source.key, target.key.asid) == (None, 5)


def test_everything_on_a_dead_vm_is_eio(vmm):
    source = vmm.guest(vcpus=1)
    vcpu = source.vcpus[0]
    vmm.move(vmm.create(), source)
    for request in (0xAE03, 0xAE41, 0xC008AEBA, 0x8010AEBB, 0x12345678):
        assert vmm.errno(source.ioctl, request) == EIO
    assert vmm.errno(vcpu.ioctl, 0x8090AE81, bytearray(144)) == EIO
    assert vmm.errno(vcpu.kvm_run, 0) == EIO


def test_move_back_into_a_dead_vm_is_eio(vmm):
    source, target = vmm.guest(), vmm.create()
    vmm.move(target, source)
    assert vmm.move(source, target) == EIO


def test_move_from_a_dead_vm_is_einval(vmm):
    source = vmm.guest()
    vmm.move(vmm.create(), source)
    assert vmm.move(vmm.create(), source) == EINVAL


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (lambda vmm: vmm.create(SEV), lambda vmm: vmm.create(SEV)),
        (lambda vmm: vmm.guest(SEV), lambda vmm: vmm.guest(SEV)),
        (lambda vmm: vmm.create(0), lambda vmm: vmm.guest(SEV)),
        (lambda vmm: vmm.create(SEV_ES), lambda vmm: vmm.guest(SEV)),
        (lambda vmm: vmm.create(SNP), lambda vmm: vmm.guest(SNP)),
    ],
)
def test_move_between_vms_that_do_not_fit_is_einval(vmm, target, source):
    assert vmm.move(target(vmm), source(vmm)) == EINVAL


def test_move_of_an_es_guest_needs_as_many_vcpus(vmm, accounting):
    source = vmm.started(SEV_ES, vcpus=2)
    vmsa(vmm, source)
    assert vmm.move(vmm.create(SEV_ES, vcpus=1), source) == EINVAL
    assert vmm.status(source).errno == 0
    assert accounting.charged == {"sev_es": 1}


def test_move_of_an_es_guest_needs_a_vmsa_of_every_vcpu(vmm):
    source = vmm.started(SEV_ES, vcpus=1)
    vmsa(vmm, source)
    source.create_vcpu(1)
    assert vmm.move(vmm.create(SEV_ES, vcpus=2), source) == EINVAL


def test_move_of_an_es_guest_takes_its_registers_along(vmm):
    source = vmm.started(SEV_ES, vcpus=2)
    source.vcpus[1].rip = 0x1234
    vmsa(vmm, source)
    target = vmm.create(SEV_ES, vcpus=2)
    assert vmm.move(target, source) == 0
    assert target.vcpus[1].rip == 0x1234
    assert [vcpu.state_protected for vcpu in target.vcpus.values()] == [True, True]
    assert [vcpu.state_protected for vcpu in source.vcpus.values()] == [False, False]


def test_move_of_a_plain_sev_guest_does_not_look_at_vcpus(vmm):
    assert vmm.move(vmm.create(vcpus=3), vmm.guest(vcpus=1)) == 0


@pytest.mark.parametrize("running", ["source", "target"])
def test_move_while_a_vcpu_runs_is_ebusy(vmm, accounting, running):
    vms = {"source": vmm.legacy(es=False, vcpus=1), "target": vmm.create(0, vcpus=1)}
    vcpu = vms[running].vcpus[0]
    assert vcpu.kvm_run(0) is not None
    assert vmm.move(vms["target"], vms["source"]) == EBUSY
    assert accounting.charged == {"sev": 1}
    assert vmm.errno(vcpu.interrupt, 0) == EINTR
    assert vmm.move(vms["target"], vms["source"]) == 0


@pytest.mark.parametrize(("quirk", "errno"), [("true", EINVAL), ("false", 0)])
def test_quirk_move_keeps_need_init(vmm_on, quirk, errno):
    vmm = vmm_on(f"[quirks]\nmove_keeps_need_init = {quirk}\n")
    target = vmm.create(SEV, vcpus=1)
    assert vmm.move(target, vmm.guest(SEV)) == 0
    assert vmm.errno(target.vcpus[0].kvm_run, 0) == errno


# -- interleaved: upstream's test_sev_move_copy ----------------------------------------------------


@pytest.mark.parametrize("es", [False, True])
@pytest.mark.parametrize("first", ["mirror", "owner"])
def test_mirror_and_owner_move_in_turn_and_end_in_either_order(vmm, accounting, es, first):
    owner = vmm.legacy(es=es)
    vmm.start(owner)
    mirror = vmm.create(0)
    vmm.mirror(mirror, owner)
    before = []
    for _ in range(3):
        before += [mirror, owner]
        new_mirror, new_owner = vmm.create(0), vmm.create(0)
        assert vmm.move(new_mirror, mirror) == 0
        assert vmm.move(new_owner, owner) == 0
        mirror, owner = new_mirror, new_owner
    for dead in before:
        dead.close()
        assert not dead.alive
    kind = "sev_es" if es else "sev"
    assert accounting.charged == {kind: 1}
    assert vmm.status(mirror).errno == EBADF
    for vm in (mirror, owner) if first == "mirror" else (owner, mirror):
        vm.close()
    assert accounting.charged == {kind: 0}
    assert vmm.system.vms == {}
    assert vmm.system.firmware.guests == {}
    assert vmm.system.statistics().asids.sev + vmm.system.statistics().asids.sev_es == 0


def test_dead_owner_is_not_kept_by_mirrors_that_went_with_the_guest(vmm):
    owner, mirror, target = vmm.guest(), vmm.create(), vmm.create()
    vmm.mirror(mirror, owner)
    vmm.move(target, owner)
    owner.close()
    assert not owner.alive
    target.close()
    assert target.alive
    mirror.close()
    assert not target.alive


# -- whose cgroup pays -----------------------------------------------------------------------------


class Host:
    """A machine with cgroups /a and /b, and a client in /a that can go to the other."""

    def __init__(self, client_type, quirks):
        self.roots = Roots((EncryptionIds, Misc))
        machine = Machine(parse(PRESET + quirks, "t"), self.roots, CgroupAccounting(self.roots))
        self.write("/", "cgroup.subtree_control", "+encryption_ids +misc")
        for name in "ab":
            self.roots.v2.mkdir(self.roots.v2.find("/"), name)
        task = self.roots.spawn(self.roots.v2.find("/a"), Owner(), 0)
        self.vmm = client_type(System(machine), task.pid)

    def write(self, path, name, text):
        node, slot = self.roots.v2.file(self.roots.v2.find(path), name)
        node.rows[slot - 1].write(node, text.encode(), KERNEL, 0)

    def go(self, path):
        attach.attach(self.roots.v2.find(path), self.vmm.client.pid, KERNEL, 0)

    def charged(self, kind="sev"):
        """Units in the root, /a and /b; the two controllers agree."""
        cgroups = [self.roots.v2.find(path) for path in ("/", "/a", "/b")]
        misc = [cgrp.css["misc"].account(kind).usage for cgrp in cgroups]
        index = ("sev", "sev_es").index(kind)
        assert [cgrp.css["encryption_ids"].usage[index] for cgrp in cgroups] == misc
        return misc

    def protected_guest(self):
        vm = self.vmm.started(SEV_ES, vcpus=1)
        vmsa(self.vmm, vm)
        return vm


@pytest.fixture
def host(vmm):
    return lambda quirks="": Host(type(vmm), quirks)


def test_move_within_a_cgroup_passes_the_charge_on_even_at_the_limit(host):
    host = host()
    host.write("/a", "misc.max", "sev 1")
    source, target = host.vmm.guest(), host.vmm.create()
    assert host.vmm.move(target, source) == 0
    assert host.charged() == [1, 1, 0]
    host.go("/b")
    target.close()
    source.close()
    assert host.charged() == [0, 0, 0]


def test_move_to_another_cgroup_takes_the_charge_along(host):
    host = host()
    source, target = host.vmm.guest(), host.vmm.create()
    host.go("/b")
    assert host.vmm.move(target, source) == 0
    assert host.charged() == [1, 0, 1]
    target.close()
    assert host.charged() == [0, 0, 0]


def test_move_into_a_full_cgroup_is_ebusy_and_changes_nothing(host):
    host = host()
    host.write("/b", "misc.max", "sev 0")
    source, target = host.vmm.guest(), host.vmm.create()
    host.go("/b")
    assert host.vmm.move(target, source) == EBUSY
    assert host.charged() == [1, 1, 0]
    assert (source.sev_active, target.sev_active, source.dead) == (True, False, False)
    host.write("/b", "misc.max", "sev 1")
    assert host.vmm.move(target, source) == 0


def test_move_on_a_full_machine_is_ebusy_because_both_are_charged_for_a_moment(host):
    host = host()
    source, target = host.vmm.guest(), host.vmm.create()
    host.vmm.guest()
    host.go("/b")
    assert host.vmm.move(target, source) == EBUSY
    assert host.charged() == [2, 2, 0]
    host.go("/a")
    assert host.vmm.move(target, source) == 0


def test_move_refused_for_its_vcpus_returns_the_charge(host):
    host = host()
    source = host.protected_guest()
    host.go("/b")
    assert host.vmm.move(host.vmm.create(SEV_ES), source) == EINVAL
    assert host.charged("sev_es") == [1, 1, 0]


def test_es_guest_moves_with_its_own_kind_of_charge(host):
    host = host()
    source, target = host.protected_guest(), host.vmm.create(SEV_ES, vcpus=1)
    host.go("/b")
    assert host.vmm.move(target, source) == 0
    assert host.charged("sev_es") == [1, 0, 1]
    assert host.charged("sev") == [0, 0, 0]
    target.close()
    assert host.charged("sev_es") == [0, 0, 0]


def test_quirk_move_charges_wrong_type(host):
    host = host("[quirks]\nmove_charges_wrong_type = true\n")
    source, target = host.protected_guest(), host.vmm.create(SEV_ES, vcpus=1)
    host.go("/b")
    assert host.vmm.move(target, source) == 0
    assert host.charged("sev") == [0, -1, 1]
    assert host.charged("sev_es") == [1, 1, 0]
    target.close()
    assert host.charged("sev") == [0, -1, 1]
    assert host.charged("sev_es") == [0, 1, -1]


def test_quirk_move_charges_wrong_type_refuses_where_there_are_no_sev_asids(host):
    host = host("[quirks]\nmove_charges_wrong_type = true\n")
    host.roots.controller("misc").set_capacity("sev", 0)
    source, target = host.protected_guest(), host.vmm.create(SEV_ES, vcpus=1)
    host.go("/b")
    assert host.vmm.move(target, source) == EINVAL
    assert host.charged("sev_es") == [1, 1, 0]


def test_quirk_move_charges_wrong_type_does_not_show_within_a_cgroup(host):
    host = host("[quirks]\nmove_charges_wrong_type = true\n")
    source, target = host.protected_guest(), host.vmm.create(SEV_ES, vcpus=1)
    assert host.vmm.move(target, source) == 0
    target.close()
    assert (host.charged("sev"), host.charged("sev_es")) == ([0, 0, 0], [0, 0, 0])


@pytest.mark.parametrize(("quirk", "left"), [("true", [1, 1, 0]), ("false", [0, 0, 0])])
def test_quirk_move_mirror_leaks_charge(host, quirk, left):
    host = host(f"[quirks]\nmove_mirror_leaks_charge = {quirk}\n")
    owner, mirror, target = host.vmm.guest(), host.vmm.create(), host.vmm.create()
    host.vmm.mirror(mirror, owner)
    assert host.vmm.move(target, mirror) == 0
    for vm in (owner, mirror, target):
        vm.close()
    assert host.charged() == left
