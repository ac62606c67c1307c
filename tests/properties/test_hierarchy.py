"""A hierarchy under random use stays what its parts say it is."""

from __future__ import annotations

import errno

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cgfs.controllers.encryption_ids import EncryptionIds
from cgfs.controllers.misc import Misc
from cgfs.core.caller import KERNEL
from cgfs.core.roots import Roots
from cgfs.core.tasks import NoProcesses
from cgfs.errors import CgroupError

CAPACITY = 3
NAMES = ("a", "b", "c")
CONTROLLERS = ("encryption_ids", "misc")


class Owner:
    def killed(self, now_ns):
        pass

    def frozen(self, frozen, now_ns):
        pass

    def moved(self, now_ns):
        pass


class HierarchyMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.roots = Roots([EncryptionIds, Misc], NoProcesses())
        for name in CONTROLLERS:
            self.roots.controller(name).set_capacity("sev", CAPACITY)
        self.v2 = self.roots.v2
        self.charges = []
        self.dead_css = []

    def cgroups(self):
        return list(self.v2.root.subtree())

    def pick(self, data):
        return data.draw(st.sampled_from(self.cgroups()))

    def write(self, cgrp, file, text):
        node, slot = self.v2.file(cgrp, file)
        node.rows[slot - 1].write(node, text, KERNEL, 0)

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def mkdir(self, data, name):
        parent = self.pick(data)
        exists = name in parent.children
        try:
            self.v2.mkdir(parent, name)
        except CgroupError as error:
            assert (error.errno == errno.EEXIST) == exists
            assert error.errno in (errno.EEXIST, errno.EAGAIN)

    @rule(data=st.data())
    def rmdir(self, data):
        cgrp = self.pick(data)
        busy = cgrp.is_root or cgrp.children or cgrp.members
        try:
            self.v2.rmdir(cgrp)
        except CgroupError as error:
            assert error.errno == errno.EBUSY
            assert busy
        else:
            assert not busy

    @rule(data=st.data(), name=st.sampled_from(CONTROLLERS), sign=st.sampled_from("+-"))
    def control(self, data, name, sign):
        cgrp = self.pick(data)
        before = cgrp.subtree_control
        try:
            self.write(cgrp, "cgroup.subtree_control", f"{sign}{name}".encode())
        except CgroupError as error:
            assert error.errno in (errno.ENOENT, errno.EBUSY, errno.EOPNOTSUPP)
            assert cgrp.subtree_control == before

    @rule(data=st.data(), limit=st.integers(0, 4), name=st.sampled_from(CONTROLLERS))
    def limit(self, data, limit, name):
        cgrp = self.pick(data)
        if name in cgrp.css and not cgrp.is_root:
            misc = name == "misc"
            file = "misc.max" if misc else "encryption_ids.sev.max"
            self.write(cgrp, file, f"sev {limit}".encode() if misc else b"%d" % limit)

    @rule(data=st.data(), limit=st.integers(0, 3))
    def max_descendants(self, data, limit):
        self.write(self.pick(data), "cgroup.max.descendants", b"%d" % limit)

    @rule(data=st.data())
    def spawn(self, data):
        cgrp = self.pick(data)
        try:
            self.roots.spawn(cgrp, Owner())
        except CgroupError as error:
            assert error.errno in (errno.EBUSY, errno.EOPNOTSUPP)
            assert not cgrp.is_root

    @precondition(lambda self: list(self.roots.tasks))
    @rule(data=st.data())
    def move(self, data):
        task = data.draw(st.sampled_from(list(self.roots.tasks)))
        cgrp = self.pick(data)
        try:
            self.write(cgrp, "cgroup.procs", b"%d" % task.pid)
        except CgroupError as error:
            assert error.errno in (errno.EBUSY, errno.EOPNOTSUPP)
        else:
            assert task.place(self.v2) is cgrp

    @precondition(lambda self: list(self.roots.tasks))
    @rule(data=st.data())
    def exit(self, data):
        self.roots.exit(data.draw(st.sampled_from(list(self.roots.tasks))))

    @rule(data=st.data())
    def become_threaded(self, data):
        cgrp = self.pick(data)
        if not cgrp.is_root:
            try:
                self.write(cgrp, "cgroup.type", b"threaded")
            except CgroupError as error:
                assert error.errno == errno.EOPNOTSUPP

    @rule(data=st.data(), freeze=st.booleans())
    def freeze(self, data, freeze):
        cgrp = self.pick(data)
        if not cgrp.is_root:
            self.write(cgrp, "cgroup.freeze", b"1" if freeze else b"0")

    @precondition(lambda self: list(self.roots.tasks))
    @rule(data=st.data(), name=st.sampled_from(CONTROLLERS))
    def charge(self, data, name):
        task = data.draw(st.sampled_from(list(self.roots.tasks)))
        css = self.roots.css_of(task.pid, name)
        before = [self.usage(c) for c in css.ancestors()]
        try:
            css.try_charge("sev")
        except CgroupError as error:
            assert error.errno == errno.EBUSY
            assert [self.usage(c) for c in css.ancestors()] == before
            assert any(
                u >= min(self.max(c), CAPACITY)
                for u, c in zip(before, css.ancestors(), strict=True)
            )
        else:
            self.charges.append(css)

    @precondition(lambda self: self.charges)
    @rule(data=st.data())
    def uncharge(self, data):
        css = data.draw(st.sampled_from(self.charges))
        self.charges.remove(css)
        css.uncharge("sev")

    def usage(self, css):
        return css.account("sev").usage if css.controller.name == "misc" else css.usage[0]

    def max(self, css):
        return css.account("sev").max if css.controller.name == "misc" else css.max[0]

    @invariant()
    def usage_is_the_sum_of_the_charges_below(self):
        live = [css for cgrp in self.cgroups() for css in cgrp.css.values()]
        for css in {*live, *self.charges}:
            charged = [c for c in self.charges if css in list(c.ancestors())]
            assert self.usage(css) == len(charged)
            assert self.usage(css) <= CAPACITY

    @invariant()
    def counters_match_the_tree(self):
        for cgrp in self.cgroups():
            below = list(cgrp.subtree())[1:]
            assert cgrp.nr_descendants == len(below)
            assert cgrp.populated == any(c.members for c in cgrp.subtree())
            assert cgrp.nr_populated_children == sum(c.populated for c in cgrp.children.values())
            assert cgrp.e_freeze == sum(c.freeze for c in cgrp.ancestors())
            for name, css in cgrp.css.items():
                assert css.nr_active == sum(name in c.css for c in cgrp.subtree())

    @invariant()
    def dying_is_what_is_pinned(self):
        pinned = {cgrp for c in self.charges for cgrp in c.cgrp.ancestors() if cgrp.dead}
        assert self.v2.root.nr_dying == len(pinned)

    @invariant()
    def pinned_state_of_a_controller_is_dying_with_what_is_above_it(self):
        offline = {css for c in self.charges for css in c.ancestors() if not css.online}
        for cgrp in self.cgroups():
            below = [css for css in offline if css.cgrp.is_descendant_of(cgrp)]
            for name in CONTROLLERS:
                assert cgrp.nr_dying_css(name) == sum(c.controller.name == name for c in below)

    @invariant()
    def controllers_are_enabled_from_the_top(self):
        for cgrp in self.cgroups():
            if not cgrp.is_root:
                assert set(cgrp.css) <= cgrp.parent.subtree_control
                assert set(cgrp.css) <= set(cgrp.parent.css)
                assert cgrp.subtree_control <= set(cgrp.css)


TestHierarchy = HierarchyMachine.TestCase
TestHierarchy.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
