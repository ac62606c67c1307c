"""What waits to be delivered to a vCPU when it is entered next: exceptions, interrupts, NMIs.

The part of ``kvm_vcpu_events`` that is state. Guests here have no code of their own unless an
engine executes some, so delivery is the end of an event: what the guest does with it is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

DB_VECTOR = 1
BP_VECTOR = 3


@dataclass(slots=True)
class QueuedException:
    """An exception on its way into the guest.

    Attributes:
        vector: which.
        pending: not delivered; its effects on other registers have not happened.
        injected: being delivered.
        has_error_code: it pushes one.
        error_code: which.
        has_payload: it does something to DR6 or CR2 on delivery, and has not yet.
        payload: what.
    """

    vector: int = 0
    pending: bool = False
    injected: bool = False
    has_error_code: bool = False
    error_code: int = 0
    has_payload: bool = False
    payload: int = 0


class Events:
    """The events of one vCPU.

    Attributes:
        exception: at most one is on its way.
        interrupt: an interrupt is on its way.
        interrupt_nr: its vector, or the last one's.
        interrupt_soft: it is an INT instruction's.
        shadow: interrupts are held off for one instruction: 1 by MOV SS, 2 by STI.
        nmi_injected: an NMI is on its way.
        nmi_pending: NMIs that wait, 0 to 2.
        nmi_masked: the guest is in its NMI handler.
        sipi_vector: where an AP starts.
        latched_init: an INIT waits.
        triple_fault: the guest shut down.
        nr_interrupts: external interrupts delivered.
    """

    __slots__ = (
        *("exception", "interrupt", "interrupt_nr", "interrupt_soft", "latched_init"),
        *("nmi_injected", "nmi_masked", "nmi_pending", "nr_interrupts", "shadow"),
        *("sipi_vector", "triple_fault"),
    )

    def __init__(self, vcpu: Vcpu | None = None) -> None:
        del vcpu
        self.nr_interrupts = 0
        self.reset()

    def reset(self) -> None:
        """Power-on or INIT."""
        self.exception = QueuedException()
        self.interrupt = False
        self.interrupt_nr = 0
        self.interrupt_soft = False
        self.shadow = 0
        self.nmi_injected = False
        self.nmi_pending = 0
        self.nmi_masked = False
        self.sipi_vector = 0
        self.latched_init = False
        self.triple_fault = False

    @property
    def waiting(self) -> bool:
        """Whether anything is to be delivered."""
        exception = self.exception
        return (
            exception.pending
            or exception.injected
            or self.interrupt
            or self.nmi_injected
            or self.nmi_pending > 0
            or self.triple_fault
        )

    def queue_interrupt(self, vector: int) -> None:
        """An external interrupt for the next entry."""
        self.interrupt = True
        self.interrupt_nr = vector
        self.interrupt_soft = False

    def settle_nmis(self) -> None:
        """Of NMIs that wait two are kept, one while another is handled (x86.c process_nmi)."""
        limit = 1 if self.nmi_masked or self.nmi_injected else 2
        self.nmi_pending = min(self.nmi_pending, limit)

    def take_exception(self) -> QueuedException | None:
        """The exception that is on its way, which is no longer."""
        exception, self.exception = self.exception, QueuedException()
        return exception if exception.pending or exception.injected else None

    def delivered(self) -> QueuedException | None:
        """Entering the guest: what waits arrives; the exception, if there is one.

        A triple fault stays: it ends the run. So does an external interrupt, which the guest takes
        when it allows interrupts (``kvmsim.kvm.interrupts``).
        """
        arrived = self.take_exception()
        self.shadow = 0
        if self.nmi_injected or self.nmi_pending:
            self.nmi_injected = False
            self.nmi_pending = max(0, self.nmi_pending - 1)
        return arrived


def queue_exception(vcpu: Vcpu, vector: int) -> None:
    """User space injects an exception without a payload."""
    of(vcpu).exception = QueuedException(vector, pending=True)


def of(vcpu: Vcpu) -> Events:
    """The events of a vCPU."""
    return state_of(vcpu, Events)
