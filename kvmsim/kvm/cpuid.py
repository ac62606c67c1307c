"""CPUID: what a guest can have, and what the VMM gives it.

Only the leaves by which programs tell vendor, SEV and bus lock support are filled; the rest of a
processor's identity belongs to an engine that executes CPUID.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import KVM_GET_CPUID2, KVM_SET_CPUID2
from kvmsim.abi.structs import (
    KVM_CPUID2,
    KVM_CPUID_ENTRY2,
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_MAX_CPUID_ENTRIES,
)
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import VcpuFile, handles

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

VENDORS = {"amd": b"AuthenticAMD", "intel": b"GenuineIntel"}

FN7_ECX_BUS_LOCK_DETECT = 1 << 24
SEV_EAX_SEV = 1 << 1
SEV_EAX_SEV_ES = 1 << 3
SEV_EAX_SEV_SNP = 1 << 4
_ENTRY_BYTES = KVM_CPUID_ENTRY2.size_bytes
_HEADER_BYTES = KVM_CPUID2.size_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf: ``kvm_cpuid_entry2``."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def pack(self) -> bytes:
        """The bytes of the structure."""
        return bytes(KVM_CPUID_ENTRY2.pack(**asdict(self)))


def supported(machine: Machine) -> list[Entry]:
    """What KVM can show a guest on a machine (kvm.md D.1, B.2)."""
    preset = machine.preset
    name = VENDORS[preset.vendor]
    ebx, edx, ecx = (int.from_bytes(name[at : at + 4], "little") for at in (0, 4, 8))
    detect = preset.vendor == "intel" and preset.bus_lock.detect
    entries = [
        Entry(0, eax=0x1F, ebx=ebx, ecx=ecx, edx=edx),
        Entry(1, eax=signature(preset.family, preset.model, preset.stepping)),
        Entry(
            7,
            flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ecx=FN7_ECX_BUS_LOCK_DETECT if detect else 0,
        ),
        Entry(0x80000000, eax=0x8000001F, ebx=ebx, ecx=ecx, edx=edx),
        Entry(0x80000001),
        Entry(0x80000008, eax=48 << 8 | _physical_bits(machine)),
    ]
    if preset.vendor == "amd":
        entries.append(_encryption_leaf(machine))
    return entries


def signature(family: int, model: int, stepping: int) -> int:
    """CPUID.1:EAX of a processor; families from 15 on use the extended field."""
    base = min(family, 15)
    extended_model = (model >> 4) if base in {6, 15} else 0
    return (
        stepping & 0xF
        | (model & 0xF) << 4
        | base << 8
        | extended_model << 16
        | max(0, family - 15) << 20
    )


def _physical_bits(machine: Machine) -> int:
    sev = machine.preset.sev
    return 52 - sev.reduced_phys_bits if sev is not None else 52


def _encryption_leaf(machine: Machine) -> Entry:
    """Fn8000_001F: all zero without SEV; the ASID numbers are the host's."""
    sev = machine.sev
    hardware = machine.preset.sev
    if not sev.sev or hardware is None:
        return Entry(0x8000001F)
    features = SEV_EAX_SEV
    features |= SEV_EAX_SEV_ES if sev.sev_es else 0
    features |= SEV_EAX_SEV_SNP if sev.sev_snp else 0
    return Entry(
        0x8000001F,
        eax=features,
        ebx=hardware.c_bit,
        ecx=sev.max_sev_asid,
        edx=sev.min_sev_asid,
    )


def copy_out_supported(call: Call, entries: list[Entry]) -> int:
    """Answer KVM_GET_SUPPORTED_CPUID: E2BIG leaves ``nent`` alone, more than 256 is clamped."""
    nent = KVM_CPUID2.get(call.read(_HEADER_BYTES), "nent")
    if min(nent, KVM_MAX_CPUID_ENTRIES) < len(entries):
        raise KvmError(E2BIG, f"{len(entries)} CPUID entries")
    call.write(b"".join(entry.pack() for entry in entries), _HEADER_BYTES)
    call.write(KVM_CPUID2.pack(nent=len(entries)))
    return 0


@handles(VcpuFile, KVM_SET_CPUID2)
def set_cpuid2(vcpu: Vcpu, call: Call) -> int:
    """Give the guest its CPUID.

    Raises:
        KvmError: EFAULT; E2BIG more than 256 entries; EINVAL another table after the first run.
    """
    nent = KVM_CPUID2.get(call.read(_HEADER_BYTES), "nent")
    if nent > KVM_MAX_CPUID_ENTRIES:
        raise KvmError(E2BIG, f"{nent} CPUID entries")
    set_table(vcpu, call.read(nent * _ENTRY_BYTES, _HEADER_BYTES) if nent else b"")
    return 0


def set_table(vcpu: Vcpu, table: bytes) -> None:
    """Set the table; after the first run only the same one, without effect.

    Raises:
        KvmError: EINVAL.
    """
    if not vcpu.has_run:
        vcpu.cpuid = table
        vcpu.cpuid_changed()
    elif table != vcpu.cpuid:
        raise KvmError(EINVAL, "CPUID is fixed once the vCPU has run")


@handles(VcpuFile, KVM_GET_CPUID2)
def get_cpuid2(vcpu: Vcpu, call: Call) -> int:
    """Copy the table out; E2BIG leaves ``nent`` alone."""
    nent = KVM_CPUID2.get(call.read(_HEADER_BYTES), "nent")
    present = len(vcpu.cpuid) // _ENTRY_BYTES
    if nent < present:
        raise KvmError(E2BIG, f"{present} CPUID entries")
    call.write(vcpu.cpuid, _HEADER_BYTES)
    call.write(KVM_CPUID2.pack(nent=present))
    return 0
