"""A hierarchy under random use stays what its parts say it is."""

from __future__ import annotations

import errno
from contextlib import suppress

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from owners import Owner

from cgfs.controllers.encryption_ids import EncryptionIds
from cgfs.controllers.misc import Misc
from cgfs.core.caller import KERNEL
from cgfs.core.files import thread_ids
from cgfs.core.roots import Roots
from cgfs.core.tasks import NoProcesses, RealTask
from cgfs.errors import CgroupError

CAPACITY = 3
NAMES = ("a", "b", "c")
CONTROLLERS = ("encryption_ids", "misc")


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


class RealThreads(NoProcesses):
    """Real processes as a table: tgid to thread ids, and who was told to stop."""

    def __init__(self):
        self.table = {}
        self.stopped = set()

    def find(self, tid):
        for tgid, tids in self.table.items():
            if tid in tids:
                return RealTask(tid, tgid, kthread=False, zombie=False, state="S", uid=0, suid=0)
        return None

    def tgids(self):
        return sorted(self.table)

    def threads(self, tgid):
        return sorted(self.table.get(tgid, ()))

    def freeze(self, tgid):
        assert tgid not in self.stopped
        self.stopped.add(tgid)

    def thaw(self, tgid):
        self.stopped.remove(tgid)

    def is_frozen(self, tgid):
        return tgid in self.stopped


class MembershipMachine(RuleBasedStateMachine):
    """Threads that fork, move and end, in v2 and in a v1 hierarchy, against a plain map."""

    def __init__(self):
        super().__init__()
        self.processes = RealThreads()
        self.roots = Roots([], self.processes)
        self.hierarchies = [self.roots.v2, self.roots.mount_v1([], "x")]
        self.where = {hierarchy: {} for hierarchy in self.hierarchies}
        self.next_pid = 100
        self.shown = {}
        for hierarchy in self.hierarchies:
            for name in ("a", "b"):
                hierarchy.mkdir(hierarchy.mkdir(hierarchy.root, name), "c")

    def pick(self, data, hierarchy=None):
        hierarchies = [hierarchy] if hierarchy else self.hierarchies
        return data.draw(st.sampled_from([c for h in hierarchies for c in h.root.subtree()]))

    def thread(self, data):
        """(tid, tgid) of a live thread."""
        return data.draw(
            st.sampled_from([(t, tgid) for tgid, ts in self.processes.table.items() for t in ts])
        )

    def write(self, cgrp, file, text):
        node, slot = cgrp.hierarchy.file(cgrp, file)
        node.rows[slot - 1].write(node, text, KERNEL, 0)

    def born(self, tid, tgid):
        self.processes.table.setdefault(tgid, set()).add(tid)
        self.next_pid += 1

    @rule(data=st.data(), version=st.sampled_from((2, 1)), name=st.sampled_from(NAMES))
    def mkdir(self, data, version, name):
        parent = self.pick(data, self.hierarchies[2 - version])
        if name not in parent.children and parent.level < 3:
            parent.hierarchy.mkdir(parent, name)

    @rule(data=st.data())
    def rmdir(self, data):
        cgrp = self.pick(data)
        inhabited = any(at is cgrp for at in self.where[cgrp.hierarchy].values())
        try:
            cgrp.hierarchy.rmdir(cgrp)
        except CgroupError as error:
            assert error.errno == errno.EBUSY
            assert inhabited or cgrp.children or cgrp.is_root
        else:
            assert not inhabited

    @rule()
    def start(self):
        for hierarchy in self.hierarchies:
            self.where[hierarchy][self.next_pid] = hierarchy.root
        self.born(self.next_pid, self.next_pid)

    @precondition(lambda self: self.processes.table)
    @rule(data=st.data(), thread=st.booleans())
    def clone(self, data, thread):
        tid, tgid = self.thread(data)
        child = self.next_pid
        for hierarchy in self.hierarchies:
            self.where[hierarchy][child] = self.where[hierarchy][tid]
        self.born(child, tgid if thread else child)
        self.roots.tasks.forked(tid, tgid, child, tgid if thread else child, 0)

    @precondition(lambda self: self.processes.table)
    @rule(data=st.data())
    def exit(self, data):
        """A thread ends; the leader takes its process along."""
        tid, tgid = self.thread(data)
        gone = self.processes.table.pop(tgid) if tid == tgid else {tid}
        self.processes.table.get(tgid, set()).discard(tid)
        for hierarchy in self.hierarchies:
            for each in gone:
                del self.where[hierarchy][each]
        if tid == tgid:
            self.processes.stopped.discard(tgid)
        self.roots.tasks.exited(tid, tgid, 0)

    @precondition(lambda self: self.processes.table)
    @rule(data=st.data(), whole=st.booleans())
    def move(self, data, whole):
        tid, tgid = self.thread(data)
        cgrp = self.pick(data)
        file = (
            "cgroup.procs" if whole else {2: "cgroup.threads", 1: "tasks"}[cgrp.hierarchy.version]
        )
        try:
            self.write(cgrp, file, b"%d" % tid)
        except CgroupError as error:
            assert error.errno == errno.EOPNOTSUPP
            assert cgrp.hierarchy.version == 2
        else:
            for each in self.processes.table[tgid] if whole else {tid}:
                self.where[cgrp.hierarchy][each] = cgrp

    @rule(data=st.data())
    def become_threaded(self, data):
        cgrp = self.pick(data, self.roots.v2)
        if not cgrp.is_root:
            with suppress(CgroupError):
                self.write(cgrp, "cgroup.type", b"threaded")

    @rule(data=st.data(), freeze=st.booleans())
    def freeze(self, data, freeze):
        cgrp = self.pick(data, self.roots.v2)
        if not cgrp.is_root:
            self.write(cgrp, "cgroup.freeze", b"1" if freeze else b"0")

    @invariant()
    def every_thread_is_where_it_was_put(self):
        for hierarchy in self.hierarchies:
            for cgrp in hierarchy.root.subtree():
                here = {tid for tid, at in self.where[hierarchy].items() if at is cgrp}
                listed = thread_ids(cgrp)
                assert len(listed) == len(set(listed))
                assert set(listed) == here

    @invariant()
    def populated_is_whether_a_thread_is_below(self):
        for hierarchy in self.hierarchies:
            inhabited = {c for at in self.where[hierarchy].values() for c in at.ancestors()}
            for cgrp in hierarchy.root.subtree():
                if not cgrp.is_root:
                    assert cgrp.populated == (cgrp in inhabited)

    @invariant()
    def stopped_are_the_processes_with_a_thread_in_a_frozen_cgroup(self):
        at = self.where[self.roots.v2]
        assert self.processes.stopped == {
            tgid
            for tgid, tids in self.processes.table.items()
            if any(at[tid].e_freeze for tid in tids)
        }

    @invariant()
    def every_change_of_populated_is_one_event(self):
        shown = {}
        for cgrp in self.roots.v2.root.subtree():
            if not cgrp.is_root:
                events = cgrp.sequence(cgrp.hierarchy.core_slots["cgroup.events"])
                shown[cgrp] = cgrp.populated, cgrp.e_freeze > 0, events
                populated, frozen, before = self.shown.get(cgrp, shown[cgrp])
                if frozen != shown[cgrp][1]:
                    assert events > before
                elif not frozen:
                    assert events - before == (populated != cgrp.populated)
        self.shown = shown

    @invariant()
    def only_processes_outside_the_roots_are_tracked(self):
        tracked = {task.pid for task in self.roots.tasks}
        outside = {
            tgid
            for tgid, tids in self.processes.table.items()
            if any(not self.where[h][tid].is_root for tid in tids for h in self.hierarchies)
        }
        assert tracked == outside


TestMembership = MembershipMachine.TestCase
TestMembership.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
