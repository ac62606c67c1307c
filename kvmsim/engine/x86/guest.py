"""The engine KVM_RUN asks: real code between one stop and the next.

A vCPU's registers have two homes: KVM's (what user space gets and sets) and the emulator's. They
are the same at every stop. What connects them belongs to KVM and is given to the engine as a
:class:`RegisterFile`.

When a stop is returned, the guest has got there already; KVM lets ``after_ns`` pass and then acts
on it. ``insn_len`` is 0 in every stop: RIP is where the kind of stop wants it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmsim.engine.base import Debug, Executing, Mmio
from kvmsim.engine.x86 import breakpoints

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import GuestVcpu, Stop
    from kvmsim.engine.x86.cpu import Cpu


class RegisterFile(Protocol):
    """KVM's side of a vCPU's registers."""

    def load(self, cpu: Cpu) -> None:
        """Put what was changed since the last stop into the emulator, RIP among it."""

    def deliver(self, cpu: Cpu) -> None:
        """Queue the exceptions and interrupts that wait in KVM."""

    def store(self, cpu: Cpu) -> None:
        """Take all registers out of the emulator."""


class X86Guest:
    """The engine of one vCPU that executes real code.

    Args:
        cpu: the vCPU in the emulator.
        file: the vCPU's registers in KVM.
    """

    __slots__ = ("_file", "_rip", "cpu")

    def __init__(self, cpu: Cpu, file: RegisterFile) -> None:
        self.cpu = cpu
        self._file = file
        self._rip = -1

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """Execute up to the next stop."""
        cpu, file = self.cpu, self._file
        vm = cpu.vm
        if vm.busy and vm.must_wait(cpu):
            stop = vm.run(cpu)
        else:
            if vcpu.rip != self._rip:
                self._go_elsewhere()
            file.load(cpu)
            if cpu.completion is not None:
                self._complete(vcpu)
            stop = vm.run(cpu, vcpu.allowance_ns)
            file.store(cpu)
            self._rip = vcpu.rip
        if type(stop) is Executing:
            stop.end = self._withdraw
        return stop

    def _withdraw(self) -> None:
        """The vCPU leaves the guest instead of going on."""
        if self.cpu.vm.withdraw(self.cpu):
            self._file.store(self.cpu)
            self._rip = self.cpu.registers.rip

    def deliver_events(self) -> None:
        """KVM is about to deliver what waits: the guest gets it at the next entry."""
        self._file.deliver(self.cpu)

    def set_interrupt(
        self, vector: int | None, threshold: int, acknowledge: Callable[[], int | None]
    ) -> None:
        """An external interrupt waits, or none does: see ``Cpu``."""
        cpu = self.cpu
        cpu.interrupt, cpu.tpr_threshold, cpu.acknowledge = vector, threshold, acknowledge

    def forget(self) -> None:
        """The vCPU is reset: what it was doing is gone."""
        self._rip = -1
        self.cpu.events.clear()
        self.cpu.interrupt = None

    def undo(self) -> None:
        """The instruction of the last stop did not happen: the next entry begins with it."""
        self._rip = -1

    def take_traps(self) -> int:
        """Payload of the #DB that is due, which KVM merges with one of its own; then none is."""
        return breakpoints.take(self.cpu)

    def settle(self, vcpu: GuestVcpu) -> Stop | None:
        """Finish the instruction of the last stop with what user space answered.

        For whoever shows registers between KVM's completion of an exit and the next entry: a
        KVM_RUN with ``immediate_exit`` completes and returns. Doing it again does nothing.

        Returns:
            Another access of the same instruction, which is not made before; None: it is done.
        """
        cpu, stops = self.cpu, self.cpu.stops
        if not cpu.must_wait:
            if vcpu.rip != self._rip:
                self._go_elsewhere()
            self._file.load(cpu)
            if cpu.completion is not None:
                self._complete(vcpu)
            self._rip = cpu.registers.rip
        return stops.pop(0) if stops and isinstance(stops[0], Mmio | Debug) else None

    def _go_elsewhere(self) -> None:
        """User space set RIP: what waited for the instruction there is of no use."""
        self.cpu.abandon()
        self.cpu.admitted = -1

    def _complete(self, vcpu: GuestVcpu) -> None:
        self.cpu.complete(vcpu.input)
        self._file.store(self.cpu)
