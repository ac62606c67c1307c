"""Supervisors that take, give back, mistake numbers and vanish, in any order."""

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from owners import Owner

from cgfs.control.errors import CommandError
from cgfs.control.server import Peer
from cgfs.core.tasks import NoProcesses
from cgfs.errors import CgroupError
from kvmsim.builder.host import Host
from kvmsim.control.client_messages import (
    BusLockRequest,
    EndCharge,
    ForCaller,
    FreeKey,
    Process,
    WaiterNumber,
)
from kvmsim.errors import KvmError
from kvmsim.host.presets import parse

PRESET = 'vendor = "amd"\n[sev]\nmax-asid = 6\nmin-sev-asid = 4\n[bus-lock]\nexit = "fault"\n'
CGROUPS = ("a", "b", "a/inner")
KINDS = ("sev", "sev_es")
NUMBERS = st.integers(0, 12)
SESSIONS = st.integers(0, 2)


class Sessions(RuleBasedStateMachine):
    """Three supervisors, each with a process of its own."""

    def __init__(self):
        super().__init__()
        trio.run(self._start)

    async def _start(self):
        self.host = Host(parse(PRESET, "t"), "t", processes=NoProcesses())
        write = self.host.files.write
        write("sys/fs/cgroup/cgroup.subtree_control", "+encryption_ids +misc +bus_lock")
        for name in ("a", "b"):
            self.host.files.mkdir(f"sys/fs/cgroup/{name}")
            write(f"sys/fs/cgroup/{name}/cgroup.subtree_control", "+encryption_ids +misc")
        self.host.files.mkdir("sys/fs/cgroup/a/inner")
        self.host.files.mkdir("sys/fs/cgroup/b/inner")
        self.host.loop.catch_up = lambda: None  # no clock here
        self.host.catch_up = lambda: None
        self.pids = [self.host.roots.spawn(self._cgroup("a/inner"), Owner()).pid for _ in range(3)]
        self.places = ["a/inner"] * 3
        self.keys = [{} for _ in range(3)]  # charge -> (number, kind, cgroup)
        self.charges = [{} for _ in range(3)]  # charge -> (kind, cgroup)
        self.sessions = [self._attach() for _ in range(3)]

    def _attach(self):
        return self.host.attach_client("x", Peer(1, 0, 0), lambda *_: None)

    def _cgroup(self, path):
        return self.host.roots.v2.find(f"/{path}")

    @rule(who=SESSIONS, kind=st.sampled_from(KINDS))
    def take(self, who, kind):
        held = [key for keys in self.keys for key in keys.values() if key[1] == kind]
        try:
            taken = self.sessions[who].take_key(ForCaller(self.pids[who], kind))
        except KvmError:
            assert len(held) + self._count(kind, self.charges) == 3
        else:
            assert taken.number not in [number for number, _, _ in held]
            self.keys[who][taken.charge] = (taken.number, kind, self.places[who])

    @rule(who=SESSIONS, kind=st.sampled_from(KINDS))
    def charge(self, who, kind):
        try:
            number = self.sessions[who].charge(ForCaller(self.pids[who], kind))
        except CgroupError:
            assert self._count(kind, self.charges) + self._count(kind, self.keys) == 3
        else:
            self.charges[who][number] = (kind, self.places[who])

    @precondition(lambda self: any(self.keys))
    @rule(chance=NUMBERS)
    def free(self, chance):
        held = [(who, charge) for who, keys in enumerate(self.keys) for charge in keys]
        who, charge = held[chance % len(held)]
        number, _, _ = self.keys[who].pop(charge)
        self.sessions[who].free_key(FreeKey(number, charge))

    @rule(who=SESSIONS, charge=NUMBERS, number=NUMBERS)
    def free_what_may_not_be_held(self, who, charge, number):
        if charge in self.keys[who]:
            return
        try:
            self.sessions[who].free_key(FreeKey(number, charge))
        except CommandError:
            pass
        else:
            self._freed_otherwise(who, number, charge)

    def _freed_otherwise(self, who, number, charge):
        """A key given back with another charge, or none: its own stays to be ended alone."""
        [(own, key)] = [item for item in self.keys[who].items() if item[1][0] == number]
        del self.keys[who][own]
        self.charges[who][own] = key[1:]
        if charge:
            del self.charges[who][charge]

    @rule(who=SESSIONS, charge=NUMBERS)
    def uncharge(self, who, charge):
        if charge in self.keys[who]:
            return
        known = charge in self.charges[who]
        try:
            self.sessions[who].uncharge(EndCharge(charge))
        except CommandError:
            assert not known
        else:
            del self.charges[who][charge]

    @rule(who=SESSIONS, place=st.sampled_from(["a/inner", "b/inner"]))
    def move(self, who, place):
        task = self.host.roots.tasks.get(self.pids[who])
        self.host.roots.tasks.move(task, self._cgroup(place), 1)
        self.places[who] = place

    @rule(who=SESSIONS, waiter=NUMBERS, how=st.sampled_from(["bus_lock", "withdraw", "cancel"]))
    def lock(self, who, waiter, how):
        session = self.sessions[who]
        if how == "withdraw":
            session.withdraw(WaiterNumber(waiter))
        else:
            getattr(session, how)(BusLockRequest(self.pids[who], waiter))

    @rule(who=SESSIONS, limit=st.sampled_from(["1 1000000", "max"]))
    def limit(self, who, limit):
        self.host.files.write("sys/fs/cgroup/a/bus_lock.max", limit)
        self.sessions[who].follow(Process(self.pids[who]))
        self.host.clients.tell_situations()

    @rule(who=SESSIONS)
    def vanish(self, who):
        self.sessions[who].close()
        self.keys[who].clear()
        self.charges[who].clear()
        self.sessions[who] = self._attach()

    def _count(self, kind, held):
        return sum(entry[-2] == kind for own in held for entry in own.values())

    @invariant()
    def counts_are_what_is_held(self):
        for kind in KINDS:
            for place in ("a/inner", "b/inner"):
                expected = sum(
                    entry[-2:] == (kind, place)
                    for held in (self.keys, self.charges)
                    for own in held
                    for entry in own.values()
                )
                assert self._current(f"{place}/encryption_ids.{kind}.current") == expected
                misc = self.host.files.read(f"sys/fs/cgroup/{place}/misc.current")
                assert dict(line.split() for line in misc.splitlines())[kind] == str(expected)

    def _current(self, path):
        return int(self.host.files.read(f"sys/fs/cgroup/{path}"))

    @invariant()
    def pool_holds_what_is_taken(self):
        statistics = self.host.system.keys.asids.statistics()
        assert statistics.sev == self._count("sev", self.keys)
        assert statistics.sev_es == self._count("sev_es", self.keys)

    def teardown(self):
        for session in self.sessions:
            session.close()
        statistics = self.host.system.keys.asids.statistics()
        assert (statistics.sev, statistics.sev_es) == (0, 0)
        assert self.host.roots.tasks.followers == {}


Sessions.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
test_whatever_supervisors_do_the_host_knows_who_holds_what = Sessions.TestCase
