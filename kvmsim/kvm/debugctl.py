"""IA32_DEBUGCTL: what a guest and its VMM may set (kvm.md B.2).

Intel, Linux 6.12 vmx.c ``vmx_set_msr``: bits the guest has are stored, LBR and BTF it does not have
are dropped without a word, any other is refused::

    0 LBR, 11 FREEZE_LBRS_ON_PMI   last-branch records     2 bus lock #DB     15 RTM debug

AMD, svm.c ``svm_set_msr``: without LBR virtualization every write is ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.kvm import debug, lbr, pmu
from kvmsim.kvm.lbr import DEBUGCTL_FREEZE_LBRS_ON_PMI, DEBUGCTL_LBR

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

DEBUGCTL_BTF = 1 << 1
DEBUGCTL_BUS_LOCK = debug.DEBUGCTL_BUS_LOCK
DEBUGCTL_RTM_DEBUG = 1 << 15
_AMD_PIN_CONTROL = 0x3C
#: Of bits 0 to 5 all but these are reserved on AMD.
_AMD_KNOWN = DEBUGCTL_LBR | DEBUGCTL_BTF | _AMD_PIN_CONTROL


def read(vcpu: Vcpu) -> int:
    """The register as guest and user space read it."""
    return debug.of(vcpu).debugctl


def write(vcpu: Vcpu, value: int, *, host_initiated: bool) -> bool:
    """Write the register; False: refused (#GP in the guest), nothing changed."""
    if vcpu.vm.machine.preset.vendor == "amd":
        return _write_amd(vcpu, value)
    supported = supported_bits(vcpu, host_initiated=host_initiated)
    forgiven = DEBUGCTL_BTF
    if not vcpu.vm.machine.quirks.lbr_first_series:
        forgiven |= DEBUGCTL_LBR
    if value & ~supported & ~forgiven:
        return False
    debug.of(vcpu).debugctl = value & supported
    if value & supported & DEBUGCTL_LBR and lbr.available(vcpu) is not None:
        lbr.switched_on(vcpu)
    return True


def supported_bits(vcpu: Vcpu, *, host_initiated: bool) -> int:
    """What can be set; user space may set what the host has, the guest what its CPUID shows."""
    machine = vcpu.vm.machine
    supported = 0
    if machine.preset.bus_lock.detect and (host_initiated or debug.has_bus_lock_detect(vcpu)):
        supported |= DEBUGCTL_BUS_LOCK
    if pmu.supported_capabilities(machine) & pmu.LBR_FORMAT and (
        host_initiated or lbr.available(vcpu) is not None
    ):
        supported |= DEBUGCTL_LBR | DEBUGCTL_FREEZE_LBRS_ON_PMI
    if machine.preset.rtm and (host_initiated or debug.has_rtm(vcpu)):
        supported |= DEBUGCTL_RTM_DEBUG
    return supported


def _write_amd(vcpu: Vcpu, value: int) -> bool:
    machine = vcpu.vm.machine
    sev = machine.preset.sev
    if sev is None or not sev.lbr_virtualization:
        return True
    known = _AMD_KNOWN
    if not machine.quirks.amd_debugctl_drops_bits:
        known &= ~_AMD_PIN_CONTROL
    if value & ~known:
        return False
    debug.of(vcpu).debugctl = value & DEBUGCTL_LBR
    return True
