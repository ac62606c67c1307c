"""Registers that whoever executes the guest has newer than KVM.

A vCPU that executes code has its registers there while it runs, and most of its exits need none of
them. They are fetched when KVM or user space asks; nothing else may look at the stored values.
"""

from __future__ import annotations

from typing import Protocol


class Mirror(Protocol):
    """The other home of a vCPU's registers.

    Attributes:
        regs_ahead: its general registers are newer than KVM's.
        sregs_ahead: so are its segments and control registers.
        fpu_ahead: so are its x87 and SSE registers, and XCR0.
        events_ahead: so is what holds interrupts off, and what it still has to deliver.
    """

    regs_ahead: bool
    sregs_ahead: bool
    fpu_ahead: bool
    events_ahead: bool

    def reset(self) -> None:
        """KVM's registers are the ones that count, except those that INIT keeps."""

    def fetch_regs(self) -> bytes:
        """The bytes of ``kvm_regs``, as KVM has them from here on."""

    def fetch_sregs(self) -> None:
        """Put segments and control registers into ``Sregs``."""

    def fetch_fpu(self) -> None:
        """Put x87 and SSE registers and XCR0 into ``Fpu``."""

    def fetch_events(self) -> None:
        """Put into ``Events`` what only the other side knows."""

    def fetch_msr(self, index: int) -> int | None:
        """A model-specific register the guest changes without KVM."""
