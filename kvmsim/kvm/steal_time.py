"""Stolen time: how long the thread of a vCPU was ready to run and did not, as the guest reads it.

The guest names an address by KVM_STEAL_TIME. KVM adds there, at every KVM_RUN, what the thread has
waited since the last one. Linux 6.12 x86.c ``record_steal_time``, asm/kvm_para.h.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmsim.abi import msrs as abi
from kvmsim.engine.x86.memory import NoMemory
from kvmsim.kvm import memslots, msr_rules
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from kvmsim.engine.x86.memory import Memory
    from kvmsim.kvm.vcpu import Vcpu

#: Nanoseconds stolen, version (odd while it is written), flags, whether the vCPU is preempted.
STEAL_TIME = Struct("<QIIB")
ENABLED = 1
ADDRESS = ~0x3F


class StealTime:
    """Stolen time of one vCPU.

    Attributes:
        waited_ns: how long its thread has waited in all, when it entered KVM_RUN last.
        told_ns: how much of that the guest has been told.
        due: it is to be told at the next entry.
    """

    __slots__ = ("due", "told_ns", "waited_ns")

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.waited_ns = 0
        self.told_ns = 0
        self.due = False


def of(vcpu: Vcpu) -> StealTime:
    """The stolen time of a vCPU."""
    return state_of(vcpu, StealTime)


def is_wanted(vcpu: Vcpu) -> bool:
    """Whether the guest has asked for it."""
    return bool(msr_rules.value_of(vcpu, abi.KVM_STEAL_TIME) & ENABLED)


def waited(vcpu: Vcpu, total_ns: int) -> None:
    """A thread enters KVM_RUN that has waited so long since it began."""
    state = of(vcpu)
    state.waited_ns, state.due = total_ns, True


def enter(vcpu: Vcpu, memory: Memory) -> None:
    """The vCPU enters the guest. An address without memory is skipped."""
    state, gpa = of(vcpu), msr_rules.value_of(vcpu, abi.KVM_STEAL_TIME)
    state.due = False
    if not gpa & ENABLED:
        return
    gpa &= ADDRESS
    try:
        stolen_ns, version, flags, _ = STEAL_TIME.unpack(memory.read(gpa, STEAL_TIME.size))
        # The guest may have left anything there.
        version = version + (version & 1) + 2
        stolen_ns += state.waited_ns - state.told_ns
        data = STEAL_TIME.pack(stolen_ns & (1 << 64) - 1, version & 0xFFFF_FFFF, flags, 0)
        memory.write(gpa, data)
    except NoMemory:
        return
    state.told_ns = state.waited_ns
    memslots.of(vcpu.vm).mark_dirty(gpa, len(data))
