"""What a vCPU takes when it enters the guest: timers, INIT and SIPI, external interrupts.

An external interrupt comes from one of three places: queued by user space that has the PIC, from
the PICs in the kernel by way of LINT0, or from the local APIC. It leaves that place at the very
moment it is delivered (:func:`acknowledge`); until then a more urgent one may take its turn.
Linux 6.12 irq.c, x86.c ``kvm_check_and_inject_events``, ``kvm_vcpu_has_events``.

Guests without code of their own take everything that waits at every entry, and end it at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from kvmsim.abi.caps import (
    KVM_MP_STATE_AP_RESET_HOLD,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
)
from kvmsim.abi.exits import Exit
from kvmsim.abi.regs import RFLAGS_IF
from kvmsim.abi.structs import KVM_REGS
from kvmsim.engine.base import Executing
from kvmsim.kvm import apic_messages, events, irqchip, lapic, pit, sregs

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Stop
    from kvmsim.kvm.lapic import Lapic
    from kvmsim.kvm.vcpu import Vcpu

APIC_BASE_BSP = 1 << 8
VECTORS = 256


class TakesInterrupts(Protocol):
    """An engine whose guests have code that handles interrupts."""

    def set_interrupt(
        self, vector: int | None, threshold: int, acknowledge: Callable[[], int | None]
    ) -> None:
        """An interrupt waits, or none does.

        Args:
            vector: which one it looks like now.
            threshold: stop when the guest sets its task priority (CR8) below this.
            acknowledge: asks for the vector at the moment of delivery; None: none any more.
        """

    def forget(self) -> None:
        """The vCPU is reset: what it was doing is gone."""


def executes_code(vcpu: Vcpu) -> bool:
    """Whether the guest has code that handles what it is given."""
    return hasattr(vcpu.engine, "deliver_events")


def _handler(vcpu: Vcpu) -> TakesInterrupts | None:
    """The engine, if its guests handle interrupts; asking for the type takes microseconds."""
    engine = vcpu.engine
    return cast("TakesInterrupts", engine) if hasattr(engine, "set_interrupt") else None


# -- what waits ------------------------------------------------------------------------------------


def waiting(vcpu: Vcpu) -> int | None:
    """The external interrupt that would be delivered now; None: none.

    Of one that is at the PIC nobody knows the vector before it is acknowledged; then it is 0.
    """
    state = events.of(vcpu)
    if state.interrupt:
        return state.interrupt_nr
    if not vcpu.vm.irqchip:
        return None
    apic = lapic.of(vcpu)
    external = _external(vcpu, apic)
    return apic.waiting() if external is None else external


def _external(vcpu: Vcpu, apic: Lapic) -> int | None:
    """What comes through LINT0, past the local APIC's own priorities."""
    pics = irqchip.of(vcpu.vm).pics
    if pics is not None:
        return 0 if pics.output and apic.takes_pic() else None
    return apic.external if apic.external is not None and apic.takes_pic() else None


def acknowledge(vcpu: Vcpu, now_ns: int) -> int | None:
    """The vCPU takes an external interrupt: its vector; None: none is left."""
    vector = _take(vcpu, now_ns)
    if vector is not None:
        events.of(vcpu).nr_interrupts += 1
    offer(vcpu, now_ns)
    return vector


def _take(vcpu: Vcpu, now_ns: int) -> int | None:
    state = events.of(vcpu)
    if state.interrupt:
        state.interrupt = False
        return state.interrupt_nr
    if not vcpu.vm.irqchip:
        return None
    apic = lapic.of(vcpu)
    if _external(vcpu, apic) is not None:
        pics = irqchip.of(vcpu.vm).pics
        if pics is not None:
            return pics.acknowledge(now_ns)
        vector, apic.external = apic.external, None
        return vector
    vector = apic.waiting()
    if vector is not None:
        apic.acknowledge(vector)
    return vector


def offer(vcpu: Vcpu, now_ns: int) -> None:
    """Show the guest what waits; one without code takes it."""
    engine = _handler(vcpu)
    if engine is not None:
        threshold = lapic.of(vcpu).threshold() if vcpu.vm.irqchip else 0
        engine.set_interrupt(waiting(vcpu), threshold, lambda: acknowledge(vcpu, now_ns))
    elif not executes_code(vcpu):
        _swallow(vcpu, now_ns)


def _swallow(vcpu: Vcpu, now_ns: int) -> None:
    """Take everything and end it, each vector once: a line that stays up would come for ever."""
    taken: set[int] = set()
    while (vector := waiting(vcpu)) is not None and len(taken) < VECTORS:
        vector = _take(vcpu, now_ns)
        if vector is None or vector in taken:
            return
        taken.add(vector)
        events.of(vcpu).nr_interrupts += 1
        if vcpu.vm.irqchip:
            apic_messages.end_of_interrupt(lapic.of(vcpu), now_ns)


# -- halts -----------------------------------------------------------------------------------------


def awake(vcpu: Vcpu) -> bool:
    """Whether a vCPU that waits inside KVM has a reason to go on."""
    signals = lapic.signals_of(vcpu)
    if signals.init or signals.sipi is not None:
        return True
    if vcpu.mp_state != KVM_MP_STATE_HALTED:
        return vcpu.mp_state == KVM_MP_STATE_RUNNABLE
    if lapic.of(vcpu).unhalted:
        return True
    state = events.of(vcpu)
    if state.exception.pending or (state.nmi_pending and not state.nmi_masked):
        return True
    if waiting(vcpu) is None:
        return False
    flags = KVM_REGS.get(vcpu.get_regs(), "rflags")
    return bool(flags & RFLAGS_IF) or not executes_code(vcpu)


def wake_after_ns(vcpu: Vcpu, now_ns: int) -> int | None:
    """For how long a halted vCPU waits at most; None: nothing of its own ends the wait."""
    due = [due_ns for due_ns in (vcpu.wake_at_ns, deadline_ns(vcpu)) if due_ns is not None]
    return max(0, min(due) - now_ns) if due else None


# -- timers ----------------------------------------------------------------------------------------


def deadline_ns(vcpu: Vcpu) -> int | None:
    """When the next timer of a vCPU or its VM is due; None: never."""
    if not vcpu.vm.irqchip:
        return None
    own, shared = lapic.of(vcpu).timer.due_ns, pit.of(vcpu.vm).due_ns
    if own is None or shared is None:
        return shared if own is None else own
    return min(own, shared)


def advance(vcpu: Vcpu, now_ns: int) -> None:
    """Let every timer that is due by now fire."""
    lapic.of(vcpu).expire(now_ns)
    pit.of(vcpu.vm).expire(now_ns)


# -- entry -----------------------------------------------------------------------------------------


def entering(vcpu: Vcpu, now_ns: int) -> int | None:
    """Bring a vCPU with an in-kernel APIC up to date; an exit reason, if user space has to know."""
    advance(vcpu, now_ns)
    accept_signals(vcpu)
    if vcpu.mp_state == KVM_MP_STATE_HALTED and awake(vcpu):
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE
        lapic.of(vcpu).unhalted = False
    if vcpu.mp_state:
        return None
    apic = lapic.of(vcpu)
    vector, apic.eoi_exit = apic.eoi_exit, None
    if vector is not None:
        vcpu.run.memory[32] = vector
        return Exit.IOAPIC_EOI
    offer(vcpu, now_ns)
    return None


def accept_signals(vcpu: Vcpu) -> None:
    """INIT and SIPI that wait happen (lapic.c ``kvm_apic_accept_events``)."""
    signals = lapic.signals_of(vcpu)
    if signals.init:
        signals.init = False
        _reset(vcpu)
        boots = vcpu.apic_base & APIC_BASE_BSP
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE if boots else KVM_MP_STATE_INIT_RECEIVED
    vector, signals.sipi = signals.sipi, None
    if vector is None:
        return
    if vcpu.mp_state in {KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_AP_RESET_HOLD}:
        vcpu.rip = 0
        sregs.start_at(vcpu, vector)
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE


def before_reset(vcpu: Vcpu, stop: Stop) -> None:
    """An INIT waits for a vCPU that executed on its own: what it did is over, registers and all."""
    if isinstance(stop, Executing) and lapic.signals_of(vcpu).init:
        stop.end()


def _reset(vcpu: Vcpu) -> None:
    vcpu.init()
    vcpu.wake_at_ns = None
    engine = _handler(vcpu)
    if engine is not None:
        engine.forget()
