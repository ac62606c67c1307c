"""Giving the vCPUs of a VM an engine that executes code."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EOPNOTSUPP
from typing import TYPE_CHECKING

from kvmsim.engine.x86.guest import X86Guest
from kvmsim.engine.x86.vm import X86Vm
from kvmsim.errors import ConfigError, KvmError
from kvmsim.kvm import split_lock
from kvmsim.kvm.x86.policy import VcpuPolicy
from kvmsim.kvm.x86.registers import VcpuRegisters
from kvmsim.kvm.x86.slots import engine_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmsim.engine.base import GuestVcpu, Stop
    from kvmsim.engine.x86.memory import Slot
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm


def attach(vm: Vm, vcpus: Iterable[Vcpu], slots: list[Slot]) -> X86Vm:
    """Let the vCPUs of a VM execute real code.

    Args:
        vm: the VM.
        vcpus: its vCPUs.
        slots: its memory.

    Raises:
        ConfigError: the engine is not installed.
    """
    policy = VcpuPolicy(fault_like=vm.machine.bus_lock_exit == "fault")
    emulated = Emulated(X86Vm(slots, policy), policy)
    for vcpu in vcpus:
        emulated.enter(vcpu)
    return emulated.engine


@dataclass(frozen=True, slots=True)
class Emulated:
    """The emulator of one VM.

    Attributes:
        engine: it.
        policy: what its processors are like.
    """

    engine: X86Vm
    policy: VcpuPolicy

    def enter(self, vcpu: Vcpu) -> X86Guest:
        """Let a vCPU execute from here on."""
        cpu = self.engine.add_cpu()
        self.policy.vcpus[cpu] = vcpu
        cpu.detects_splits = split_lock.detector(vcpu, lambda: self.policy.now_ns(cpu))
        guest = X86Guest(cpu, VcpuRegisters(vcpu))
        vcpu.engine = guest
        return guest


class CodeGuests:
    """Makes the engines of vCPUs that execute code: one emulator per VM, at its first entry.

    Args:
        inline_bytes: see ``X86Vm``.
        paced: see ``X86Vm``.
        clock_ns: the present in real time, for guests that are not paced.
        on_missing: called with one line when there is no engine, once.
    """

    def __init__(
        self,
        *,
        inline_bytes: int | None = None,
        paced: bool = True,
        clock_ns: Callable[[], int] | None = None,
        on_missing: Callable[[str], None] | None = None,
    ) -> None:
        self._inline_bytes = inline_bytes
        self._paced = paced
        self._clock_ns = clock_ns
        self._on_missing = on_missing
        self._emulated: dict[Vm, Emulated] = {}

    def __call__(self, vcpu: Vcpu) -> NotEntered:
        """The engine of a new vCPU."""
        return NotEntered(self, vcpu)

    def memory_changed(self, vm: Vm) -> None:
        """The pages behind the slots of a VM are others. Not while a vCPU of it executes."""
        emulated = self._emulated.get(vm)
        if emulated is not None:
            emulated.engine.set_slots(engine_slots(vm))

    def ended(self, vm: Vm) -> None:
        """A VM is no more. Not while a vCPU of it executes."""
        emulated = self._emulated.pop(vm, None)
        if emulated is not None:
            emulated.engine.close()
            emulated.engine.set_slots([])  # what still knows the VM keeps none of its memory

    def emulated(self, vm: Vm) -> Emulated:
        """The emulator of a VM.

        Raises:
            KvmError: EOPNOTSUPP, the engine is not installed.
        """
        emulated = self._emulated.get(vm)
        if emulated is None:
            emulated = self._emulated[vm] = self._make(vm)
        return emulated

    def _make(self, vm: Vm) -> Emulated:
        policy = VcpuPolicy(fault_like=vm.machine.bus_lock_exit == "fault")
        policy.clock_ns = self._clock_ns
        try:
            engine = X86Vm(
                engine_slots(vm), policy, inline_bytes=self._inline_bytes, paced=self._paced
            )
        except ConfigError as missing:
            if self._on_missing is not None:
                self._on_missing(str(missing))
                self._on_missing = None
            raise KvmError(EOPNOTSUPP, str(missing)) from missing
        return Emulated(engine, policy)


class NotEntered:
    """The engine of a vCPU before its first entry.

    Args:
        guests: makes the real one.
        vcpu: the vCPU.
    """

    __slots__ = ("_guests", "_vcpu")

    def __init__(self, guests: CodeGuests, vcpu: Vcpu) -> None:
        self._guests = guests
        self._vcpu = vcpu

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """See ``GuestEngine``."""
        return self._enter().next_stop(vcpu)

    def deliver_events(self) -> None:
        """See ``X86Guest``."""
        self._enter().deliver_events()

    def set_interrupt(
        self, vector: int | None, threshold: int, acknowledge: Callable[[], int | None]
    ) -> None:
        """See ``X86Guest``."""
        self._enter().set_interrupt(vector, threshold, acknowledge)

    def forget(self) -> None:
        """See ``X86Guest``: there is nothing yet."""

    def _enter(self) -> X86Guest:
        return self._guests.emulated(self._vcpu.vm).enter(self._vcpu)
