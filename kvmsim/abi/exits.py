"""Why KVM_RUN returned: ``KVM_EXIT_*`` and the flags beside the reason."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """``kvm_run.exit_reason``."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    X86_RDMSR = 29
    X86_WRMSR = 30
    X86_BUS_LOCK = 33
    NOTIFY = 37
    MEMORY_FAULT = 39


#: One more than the highest reason; the size of a table indexed by reason.
NR_EXITS: Final = 40

KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1

# kvm_run.flags
KVM_RUN_X86_SMM: Final = 1 << 0
KVM_RUN_X86_BUS_LOCK: Final = 1 << 1
KVM_RUN_X86_GUEST_MODE: Final = 1 << 2
