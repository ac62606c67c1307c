"""The PC's interval timer in the kernel, as a structure user space reads back."""

from __future__ import annotations

from errno import EEXIST, ENOENT, ENXIO
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import (
    KVM_CREATE_PIT,
    KVM_CREATE_PIT2,
    KVM_GET_PIT,
    KVM_GET_PIT2,
    KVM_REINJECT_CONTROL,
    KVM_SET_PIT,
    KVM_SET_PIT2,
)
from kvmsim.abi.irq import (
    KVM_PIT_CONFIG,
    KVM_PIT_STATE,
    KVM_PIT_STATE2,
)
from kvmsim.abi.irq import (
    KVM_REINJECT_CONTROL as REINJECT_CONTROL_STRUCT,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import irqchip
from kvmsim.kvm.dispatch import VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

#: A channel nobody programmed counts from 65536.
COUNT = 0x10000
MODE_NONE = 0xFF


class Pit:
    """The timer of one VM.

    Attributes:
        state: ``kvm_pit_state2``; None: there is none.
        reinject: ticks the guest missed are made up for.
    """

    __slots__ = ("reinject", "state")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.state: bytearray | None = None
        self.reinject = True

    def create(self, now_ns: int) -> None:
        """Power it on. The gate of channel 2, the speaker's, is down."""
        self.state = KVM_PIT_STATE2.pack()
        for channel in range(3):
            for name, value in (
                ("count", COUNT),
                ("mode", MODE_NONE),
                ("gate", int(channel != 2)),
                ("count_load_time", now_ns),
            ):
                KVM_PIT_STATE2.put(self.state, f"channels[{channel}].{name}", value)


def of(vm: Vm) -> Pit:
    """The timer of a VM."""
    return state_of(vm, Pit)


def _state(vm: Vm) -> bytearray:
    """The structure; KvmError ENXIO without a timer."""
    state = of(vm).state
    if state is None:
        raise KvmError(ENXIO, "no interval timer in the kernel")
    return state


def _create(vm: Vm, call: Call) -> int:
    pit = of(vm)
    if pit.state is not None:
        raise KvmError(EEXIST, "an interval timer exists")
    if not irqchip.of(vm).full:
        raise KvmError(ENOENT, "no PIC in the kernel to wire it to")
    pit.create(call.now_ns)
    return 0


@handles(VmFile, KVM_CREATE_PIT)
def create_pit(vm: Vm, call: Call) -> int:
    """Make the timer, with a speaker port."""
    return _create(vm, call)


@handles(VmFile, KVM_CREATE_PIT2)
def create_pit2(vm: Vm, call: Call) -> int:
    """Make the timer; flag 1 gives it a dummy speaker port, others are ignored."""
    call.read(KVM_PIT_CONFIG.size_bytes)
    return _create(vm, call)


def _load(state: bytearray, data: bytes, now_ns: int) -> None:
    """Take channels over. They start anew, except channel 0's clock; a count of 0 is 65536."""
    state[: len(data)] = data
    for channel in range(3):
        name = f"channels[{channel}].count"
        if not KVM_PIT_STATE2.get(state, name):
            KVM_PIT_STATE2.put(state, name, COUNT)
        if channel:
            KVM_PIT_STATE2.put(state, f"{name}_load_time", now_ns)


@handles(VmFile, KVM_GET_PIT)
def get_pit(vm: Vm, call: Call) -> int:
    """Copy the channels out."""
    call.read(KVM_PIT_STATE.size_bytes)
    call.write(_state(vm)[: KVM_PIT_STATE.size_bytes])
    return 0


@handles(VmFile, KVM_SET_PIT)
def set_pit(vm: Vm, call: Call) -> int:
    """Take the channels over."""
    data = call.read(KVM_PIT_STATE.size_bytes)
    _load(_state(vm), data, call.now_ns)
    return 0


@handles(VmFile, KVM_GET_PIT2)
def get_pit2(vm: Vm, call: Call) -> int:
    """Copy channels and flags out."""
    call.write(_state(vm))
    return 0


@handles(VmFile, KVM_SET_PIT2)
def set_pit2(vm: Vm, call: Call) -> int:
    """Take channels and flags over."""
    data = call.read(KVM_PIT_STATE2.size_bytes)
    _load(_state(vm), data[: KVM_PIT_STATE.size_bytes + 4], call.now_ns)
    return 0


@handles(VmFile, KVM_REINJECT_CONTROL)
def reinject_control(vm: Vm, call: Call) -> int:
    """Say whether missed ticks are made up for."""
    data = call.read(REINJECT_CONTROL_STRUCT.size_bytes)
    _state(vm)
    of(vm).reinject = bool(REINJECT_CONTROL_STRUCT.get(data, "pit_reinject"))
    return 0
