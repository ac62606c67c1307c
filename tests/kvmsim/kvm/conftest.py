"""A machine with a hand-driven accounting, and the shapes its VMs come in."""

from errno import EBUSY

import pytest

from cgfs.errors import CgroupError
from kvmsim.engine.scripted import Scripted
from kvmsim.host.accounting import AsidCharge
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.system import System
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304

TRAP = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\n'
FAULT = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
NO_BUS_LOCK = 'vendor = "intel"\n'
SEV = 'vendor = "amd"\n[sev]\nmax-asid = {ecx}\nmin-sev-asid = {edx}\ndebug-swap = true\n'


class HandDriven:
    """Accounting whose answers the test decides.

    Attributes:
        charged: units now charged, by kind.
        limit: highest number of units of any kind.
        same_cgroup: every caller is in the cgroup its VM is charged to.
        limited: whether a finite bus lock limit applies.
        tokens: bus locks still admitted at once; None: all.
        queue: waiters, first in first out.
        admissions: bus locks admitted so far.
    """

    def __init__(self):
        self.charged = {}
        self.limit = 1000
        self.same_cgroup = True
        self.limited = False
        self.tokens = None
        self.queue = []
        self.admissions = 0
        self.cancelled = []
        self.charged_pids = []

    def charge_asid(self, pid, kind):
        if self.charged.get(kind, 0) >= self.limit:
            raise CgroupError(EBUSY, "at the limit")
        self.charged[kind] = self.charged.get(kind, 0) + 1
        self.charged_pids.append(pid)
        return AsidCharge(kind, ())

    def uncharge_asid(self, charge, kind=None):
        self.charged[kind or charge.kind] -= 1

    def is_charged_to(self, pid, charge):
        return self.same_cgroup

    def bus_lock(self, pid, waiter, now_ns):
        if self.tokens == 0:
            self.queue.append(waiter)
            return False
        if self.tokens is not None:
            self.tokens -= 1
        self.admissions += 1
        return True

    def admit(self, now_ns):
        self.admissions += 1
        self.queue.pop(0).admitted(now_ns)

    def bus_lock_withdraw(self, waiter, now_ns):
        self.queue.remove(waiter)

    def bus_lock_cancel(self, waiter, now_ns):
        self.cancelled.append(waiter)
        self.queue = [other for other in self.queue if other is not waiter]

    def bus_lock_moved(self, pid, waiter, now_ns):
        self.queue.remove(waiter)
        self.queue.append(waiter)

    def bus_lock_limited(self, pid):
        return self.limited


@pytest.fixture
def accounting():
    return HandDriven()


@pytest.fixture
def kvm(accounting):
    """Make the KVM of a machine from its TOML."""

    def make(toml=TRAP):
        return System(Machine(parse(toml, "test.toml"), None, accounting))

    return make


@pytest.fixture
def guest(kvm):
    """Make a vCPU that plays stops, with bus lock exits on unless told otherwise."""

    def make(stops, toml=TRAP, *, exits=True, times=1, irqchip=False):
        vm = kvm(toml).create_vm(0, PID)
        if irqchip:
            vm.create_irqchip()
        if exits:
            vm.enable_cap(KvmEnableCap(193, (2,)))
        vcpu = vm.create_vcpu(0)
        vcpu.engine = Scripted(stops, times)
        return vcpu

    return make
