"""What the kernel makes of a machine's SEV hardware when its KVM module is loaded.

The order of the checks, the log lines and which values are set by then follow Linux 6.12
``arch/x86/kvm/svm/sev.c`` ``sev_hardware_setup``; kvm.md D.1 has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsim.abi.sev import SVM_SEV_FEAT_DEBUG_SWAP

if TYPE_CHECKING:
    from kvmsim.host.presets import Preset, SevTable


@dataclass(frozen=True, slots=True)
class SevSetup:
    """SEV as KVM may use it.

    Attributes:
        sev: plain SEV guests can be made; also the module parameter ``sev``.
        sev_es: SEV-ES guests can be made; also the module parameter ``sev_es``.
        sev_snp: SNP guests can be made; also the module parameter ``sev_snp``.
        debug_swap: the module parameter ``debug_swap``.
        min_sev_asid: lowest ASID of a plain SEV guest; 1 below it is the highest of SEV-ES.
        max_sev_asid: highest ASID.
        sev_capacity: plain SEV ASIDs, 0 when there are none.
        sev_es_capacity: SEV-ES ASIDs, 0 when there are none.
        log: the kernel's own lines about it.
    """

    sev: bool = False
    sev_es: bool = False
    sev_snp: bool = False
    debug_swap: bool = False
    min_sev_asid: int = 0
    max_sev_asid: int = 0
    sev_capacity: int = 0
    sev_es_capacity: int = 0
    log: tuple[str, ...] = ()

    @property
    def vmsa_features(self) -> int:
        """Bits a guest may ask for in ``kvm_sev_init.vmsa_features``."""
        return SVM_SEV_FEAT_DEBUG_SWAP if self.debug_swap else 0


def set_up(preset: Preset) -> SevSetup:
    """Probe the SEV of a machine."""
    if preset.vendor != "amd":
        return SevSetup()
    if preset.sev is None:
        return SevSetup(log=("SEV disabled (ASIDs 0 - 0)",))
    hardware = preset.sev
    if not _usable(preset, hardware) or hardware.max_asid == 0:
        return SevSetup(log=_log(hardware, sev=False, es=False, snp=False, ranged=False))
    es = _es_usable(preset, hardware)
    snp = es and hardware.snp and preset.kvm_amd.sev_snp
    sev_capacity = hardware.max_asid - hardware.min_sev_asid + 1
    es_capacity = hardware.min_sev_asid - 1 if es else 0
    if preset.faults.psp_init:
        if not preset.quirks.psp_fail_keeps_capacity:
            sev_capacity = es_capacity = 0
        sev = es = snp = False
    else:
        sev = True
    return SevSetup(
        sev=sev,
        sev_es=es,
        sev_snp=snp,
        debug_swap=es and hardware.debug_swap,
        min_sev_asid=hardware.min_sev_asid,
        max_sev_asid=hardware.max_asid,
        sev_capacity=sev_capacity,
        sev_es_capacity=es_capacity,
        log=_log(hardware, sev=sev, es=es, snp=snp, ranged=True),
    )


def _usable(preset: Preset, hardware: SevTable) -> bool:
    return (
        preset.kvm_amd.sev
        and hardware.nested_paging
        and hardware.next_rip
        and hardware.decode_assists
        and hardware.flush_by_asid
    )


def _es_usable(preset: Preset, hardware: SevTable) -> bool:
    return (
        preset.kvm_amd.sev_es
        and hardware.es
        and hardware.lbr_virtualization
        and hardware.min_sev_asid != 1
    )


def _log(hardware: SevTable, *, sev: bool, es: bool, snp: bool, ranged: bool) -> tuple[str, ...]:
    """The lines of one set-up; ``ranged``: the ASID range was read before it ended."""
    low, high = (hardware.min_sev_asid, hardware.max_asid) if ranged else (0, 0)
    state = ("enabled" if low <= high else "unusable") if sev else "disabled"
    es_range = f"(ASIDs {min(1, low - 1)} - {low - 1})" if low else "(ASIDs 0 - 0)"
    lines = [f"SEV {state} (ASIDs {low} - {high})"]
    if hardware.es:
        lines.append(f"SEV-ES {'enabled' if es else 'disabled'} {es_range}")
    if hardware.snp:
        lines.append(f"SEV-SNP {'enabled' if snp else 'disabled'} {es_range}")
    return tuple(lines)
