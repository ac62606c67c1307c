"""Every file that enters handlers; importing this one fills the tables of ``dispatch``."""

from kvmsim.kvm import (
    capabilities,
    cpuid,
    debug,
    dirty_log,
    fpu,
    guest_memfd,
    irqchip,
    lapic,
    memslots,
    msrs,
    pit,
    routing,
    run,
    sregs,
    vcpu_events,
)

__all__ = (
    "capabilities",
    "cpuid",
    "debug",
    "dirty_log",
    "fpu",
    "guest_memfd",
    "irqchip",
    "lapic",
    "memslots",
    "msrs",
    "pit",
    "routing",
    "run",
    "sregs",
    "vcpu_events",
)
