"""Encrypted VMs come, move and go; what the cgroups show is always what is held."""

from errno import EBUSY

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
from kvmsim.errors import KvmError
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.system import System

GROUPS = ("/", "/a", "/a/b", "/c")
CAPACITY = {"sev": 3, "sev_es": 2}
KINDS = {2: "sev", 3: "sev_es"}
PRESET = 'vendor = "amd"\n[sev]\nmax-asid = 5\nmin-sev-asid = 3\n'


class Host(RuleBasedStateMachine):
    vms = Bundle("vms")

    @initialize()
    def boot(self):
        self.roots = Roots((EncryptionIds, Misc))
        self.kvm = System(Machine(parse(PRESET, "t"), self.roots, CgroupAccounting(self.roots)))
        for path in ("/", "/a"):
            self.write(path, "cgroup.subtree_control", "+encryption_ids +misc")
            for child in GROUPS[1:]:
                parent, _, name = child.rpartition("/")
                if (parent or "/") == path:
                    self.roots.v2.mkdir(self.roots.v2.find(path), name)
        self.limits = {}
        self.held = {}

    def write(self, path, name, text):
        node, slot = self.roots.v2.file(self.roots.v2.find(path), name)
        node.rows[slot - 1].write(node, text.encode(), KERNEL, 0)

    def usage(self, path, kind):
        """What the model expects: VMs charged at or below a cgroup."""
        inside = path.rstrip("/") + "/"
        return sum(
            at == path or at.startswith(inside)
            for at, held_kind in self.held.values()
            if held_kind == kind
        )

    def room(self, path, kind):
        """Whether one more unit fits every limit from a cgroup to the root, and the machine."""
        above = [group for group in GROUPS if path == group or path.startswith(group + "/")]
        within = all(
            self.usage(group, kind) < limit
            for group in above
            for limit in self.limits.get((group, kind), [])
        )
        return within and self.usage("/", kind) < CAPACITY[kind]

    @rule(
        path=st.sampled_from(GROUPS[1:]),
        kind=st.sampled_from(sorted(CAPACITY)),
        interface=st.sampled_from(["misc", "encryption_ids"]),
        limit=st.integers(0, 3),
    )
    def limit(self, path, kind, interface, limit):
        if interface == "misc":
            self.write(path, "misc.max", f"{kind} {limit}")
        else:
            self.write(path, f"encryption_ids.{kind}.max", f"{limit}")
        both = self.limits.setdefault((path, kind), [9, 9])
        both[interface == "misc"] = limit

    @rule(target=vms, path=st.sampled_from(GROUPS[2:]), vm_type=st.sampled_from([2, 3]))
    def start(self, path, vm_type):
        kind = KINDS[vm_type]
        task = self.roots.spawn(self.roots.v2.find(path), Owner(), 0)
        vm = self.kvm.create_vm(vm_type, task.pid)
        room = self.room(path, kind)
        try:
            vm.encrypt()
        except KvmError as error:
            assert error.errno == EBUSY
            assert not room
        else:
            assert room
            self.held[vm] = (path, kind)
        return vm

    @rule(vm=vms, path=st.sampled_from(GROUPS[2:]))
    def move(self, vm, path):
        attach.attach(self.roots.v2.find(path), vm.creator.pid, KERNEL, 0)

    @rule(vm=consumes(vms))
    def stop(self, vm):
        vm.close()
        self.held.pop(vm, None)

    @invariant()
    def files_show_what_is_held(self):
        for path in GROUPS if hasattr(self, "kvm") else ():
            misc = self.roots.v2.find(path).css["misc"]
            ids = self.roots.v2.find(path).css["encryption_ids"]
            for index, kind in enumerate(("sev", "sev_es")):
                expected = self.usage(path, kind)
                assert misc.account(kind).usage == expected
                assert ids.usage[index] == expected

    @invariant()
    def no_asid_is_held_twice_and_each_is_of_its_class(self):
        asids = [vm.key.asid for vm in getattr(self, "held", ())]
        assert len(set(asids)) == len(asids)
        for vm, (_, kind) in getattr(self, "held", {}).items():
            assert (vm.key.asid < 3) == (kind == "sev_es")


TestHost = Host.TestCase
TestHost.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
