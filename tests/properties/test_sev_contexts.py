"""Guests, mirrors, moves and closes in any order: ASIDs and charges always add up."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from owners import Owner

from cgfs.controllers.encryption_ids import EncryptionIds
from cgfs.controllers.misc import Misc
from cgfs.core import attach
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.sev import SevCmd
from kvmsim.kvm.sev_command import info
from kvmsim.kvm.system import System
from kvmsim.kvm.vm import KvmEnableCap

GROUPS = ("/a", "/a/b", "/c")
KINDS = {2: "sev", 3: "sev_es"}
PRESET = 'vendor = "amd"\n[sev]\nmax-asid = 6\nmin-sev-asid = 4\n'


class Context:
    """What the model of this test knows of one guest.

    Attributes:
        group: who pays.
        kind: for what.
        asid: its number.
        users: the VMs that have it: its owner and mirrors.
        owner: the one that does not just mirror.
    """

    def __init__(self, owner, group, kind, asid):
        self.owner, self.group, self.kind, self.asid = owner, group, kind, asid
        self.users = {owner}


class Contexts(RuleBasedStateMachine):
    vms = Bundle("vms")

    @initialize()
    def boot(self):
        self.roots = Roots((EncryptionIds, Misc))
        self.kvm = System(Machine(parse(PRESET, "t"), self.roots, CgroupAccounting(self.roots)))
        for path in ("/", "/a"):
            node, slot = self.roots.v2.file(self.roots.v2.find(path), "cgroup.subtree_control")
            node.rows[slot - 1].write(node, b"+encryption_ids +misc", KERNEL, 0)
            for child in GROUPS:
                parent, _, name = child.rpartition("/")
                if (parent or "/") == path:
                    self.roots.v2.mkdir(self.roots.v2.find(path), name)
        task = self.roots.spawn(self.roots.v2.find("/c"), Owner(), 0)
        self.client = LocalClient(task.pid)
        self.client.files[0] = SevFile(self.kvm)
        self.here = "/c"
        self.closed = set()
        self.contexts = {}

    def used(self, kind):
        """The guests of a kind."""
        return {context for context in self.contexts.values() if context.kind == kind}

    @rule(path=st.sampled_from(("/a/b", "/c")))
    def go(self, path):
        attach.attach(self.roots.v2.find(path), self.client.pid, KERNEL, 0)
        self.here = path

    @rule(target=vms, vm_type=st.sampled_from(sorted(KINDS)), vcpus=st.integers(0, 1))
    def create(self, vm_type, vcpus):
        vm = self.kvm.create_vm(vm_type, self.client)
        self.client.open(vm)
        for number in range(vcpus):
            vm.create_vcpu(number)
        return vm

    @rule(target=vms, vm_type=st.sampled_from(sorted(KINDS)), vcpus=st.integers(0, 1))
    def start(self, vm_type, vcpus):
        """A guest as far as its launch update; over capacity there is none."""
        vm = self.create(vm_type, 0)
        kind = KINDS[vm_type]
        try:
            vm.memory_encrypt_op(SevCmd(abi.KVM_SEV_INIT2, bytes(48)), self.client)
        except KvmError:
            assert len(self.used(kind)) == 3
            return vm
        start = abi.KVM_SEV_LAUNCH_START_STRUCT.pack(policy=4 if vm_type == 3 else 0)
        vm.memory_encrypt_op(SevCmd(abi.KVM_SEV_LAUNCH_START, start), self.client)
        for number in range(vcpus):
            vm.create_vcpu(number)
        if vm_type == 3:
            vm.memory_encrypt_op(SevCmd(abi.KVM_SEV_LAUNCH_UPDATE_VMSA), self.client)
        self.contexts[vm] = Context(vm, self.here, kind, vm.key.asid)
        return vm

    def transfer(self, cap, target, source):
        number = next(fd for fd, file in self.client.files.items() if file is source)
        try:
            target.enable_cap(KvmEnableCap(cap, (number,)), self.client)
        except KvmError:
            return False
        return True

    @rule(target_vm=vms, source=vms)
    def mirror(self, target_vm, source):
        if target_vm.dead or not self.transfer(197, target_vm, source):
            return
        context = self.contexts[source]
        assert context.owner is source
        self.contexts[target_vm] = context
        context.users.add(target_vm)

    @rule(target_vm=vms, source=vms)
    def move(self, target_vm, source):
        if target_vm.dead:
            return
        before = self.contexts.get(source)
        if not self.transfer(206, target_vm, source):
            assert self.contexts.get(source) is before
            return
        context = self.contexts.pop(source)
        context.users.remove(source)
        context.users.add(target_vm)
        self.contexts[target_vm] = context
        if context.owner is source:
            context.owner = target_vm
            context.group = self.here
        assert source.dead

    @rule(target=vms, source=vms)
    def mirror_to_a_fresh_vm(self, source):
        fresh = self.create(source.vm_type, 0)
        self.mirror(fresh, source)
        return fresh

    @rule(target=vms, source=vms)
    def move_to_a_fresh_vm(self, source):
        fresh = self.create(source.vm_type, len(source.vcpus))
        self.move(fresh, source)
        return fresh

    @rule(vm=consumes(vms))
    def close(self, vm):
        vm.close()
        self.closed.add(vm)
        for number, file in tuple(self.client.files.items()):
            if file is vm:
                del self.client.files[number]
        context = self.contexts.get(vm)
        if context is None:
            assert not vm.alive
            return
        if context.owner is not vm:
            context.users.remove(vm)
            del self.contexts[vm]
        if context.users == {context.owner} and context.owner in self.closed:
            del self.contexts[context.owner]

    @invariant()
    def charges_are_where_the_guests_are_paid_for(self):
        guests = set(getattr(self, "contexts", {}).values())
        for path in ("/", *GROUPS) if hasattr(self, "kvm") else ():
            inside = path.rstrip("/") + "/"
            css = self.roots.v2.find(path).css
            for index, kind in enumerate(("sev", "sev_es")):
                expected = sum(
                    guest.kind == kind and (guest.group + "/").startswith(inside)
                    for guest in guests
                )
                assert css["misc"].account(kind).usage == expected
                assert css["encryption_ids"].usage[index] == expected

    @invariant()
    def every_guest_has_its_asid_and_handle_and_no_other(self):
        if not hasattr(self, "kvm"):
            return
        guests = set(self.contexts.values())
        assert len({guest.asid for guest in guests}) == len(guests)
        assert len(self.kvm.firmware.guests) == len(guests)
        statistics = self.kvm.statistics().asids
        assert statistics.sev + statistics.sev_es == len(guests)
        for vm, guest in self.contexts.items():
            assert info(vm).asid == guest.asid
            assert self.kvm.firmware.guests[info(vm).handle].asid == guest.asid

    def teardown(self):
        if not hasattr(self, "kvm"):
            return
        for vm in tuple(self.kvm.vms):
            if vm not in self.closed:
                self.close(vm)
        assert self.kvm.vms == {}
        assert self.contexts == {}
        self.charges_are_where_the_guests_are_paid_for()
        self.every_guest_has_its_asid_and_handle_and_no_other()


TestContexts = Contexts.TestCase
TestContexts.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
