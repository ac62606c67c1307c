"""The engine as KVM_RUN uses it, against a vCPU that is a few attributes."""

from types import SimpleNamespace

import pytest

from kvmsim.engine.base import BusLock, Hlt, Io
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.guest import X86Guest
from kvmsim.engine.x86.policy import PlainPolicy

CODE, DATA = 0x1000, 0x8000
HLT = "f4"


class Rip:
    """A register file of RIP and nothing else."""

    def __init__(self, vcpu):
        self.vcpu = vcpu

    def load(self, cpu):
        cpu.registers.rip = self.vcpu.rip

    def deliver(self, cpu):
        cpu.interrupt = 0x30

    def store(self, cpu):
        self.vcpu.rip = cpu.registers.rip


@pytest.fixture
def start(make_guest):
    def begin(*code, **options):
        guest = make_guest(PlainPolicy(**options)).long(*code)
        vcpu = SimpleNamespace(id=0, rip=CODE, input=b"", allowance_ns=None)
        return guest, vcpu, X86Guest(guest.cpu, Rip(vcpu))

    return begin


def test_an_in_is_completed_with_the_input_at_the_next_stop(start):
    guest, vcpu, engine = start("ec", HLT)
    stop = engine.next_stop(vcpu)
    assert isinstance(stop, Io)
    assert (vcpu.rip, stop.insn_len) == (CODE, 0)
    vcpu.input = b"\x42"
    assert isinstance(engine.next_stop(vcpu), Hlt)
    assert guest.q[r.RAX] & 0xFF == 0x42
    assert vcpu.rip == CODE + 2


def test_registers_can_be_settled_without_entering_the_guest(start):
    guest, vcpu, engine = start("ec", HLT)
    engine.next_stop(vcpu)
    vcpu.input = b"\x42"
    engine.settle(vcpu)
    engine.settle(vcpu)
    assert (guest.q[r.RAX] & 0xFF, vcpu.rip) == (0x42, CODE + 1)
    assert isinstance(engine.next_stop(vcpu), Hlt)


def test_an_instruction_user_space_left_is_not_completed(start):
    guest, vcpu, engine = start("ec", "90", HLT)
    engine.next_stop(vcpu)
    vcpu.rip, vcpu.input = CODE + 2, b"\x42"
    assert isinstance(engine.next_stop(vcpu), Hlt)
    assert guest.q[r.RAX] == 0


@pytest.mark.parametrize("fault_like", [False, True])
def test_bus_locks_come_one_by_one(start, fault_like):
    guest, vcpu, engine = start("f0 ff 07", "f0 ff 07", HLT, fault_like=fault_like)
    guest.q[r.RDI] = DATA + 62
    seen = []
    while isinstance(engine.next_stop(vcpu), BusLock):
        seen.append((vcpu.rip - CODE, guest.word(DATA + 62)))
    assert seen == ([(0, 0), (3, 1)] if fault_like else [(3, 1), (6, 2)])


def test_leave_to_lock_ends_when_user_space_goes_elsewhere(start):
    guest, vcpu, engine = start("f0 ff 07", "90", "eb fa", fault_like=True)
    guest.q[r.RDI] = DATA + 62
    assert isinstance(engine.next_stop(vcpu), BusLock)
    vcpu.rip = CODE + 3
    assert isinstance(engine.next_stop(vcpu), BusLock)
    assert (vcpu.rip, guest.word(DATA + 62)) == (CODE, 0)


def test_events_of_kvm_reach_the_guest(start):
    guest, vcpu, engine = start("fb", "90", "90", HLT)
    guest.gate(0x30, 0x2000)
    guest.put(0x2000, "ff c3", "48 cf")
    guest.q[r.RBX] = 0
    engine.deliver_events()
    assert isinstance(engine.next_stop(vcpu), Hlt)
    assert guest.q[r.RBX] == 1
