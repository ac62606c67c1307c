"""CPUID: what a guest can have, and what the VMM gives it. ``cpuid_guest`` executes it.

A machine shows the features of a plain server processor of its vendor (``kvmsim.abi.cpuid``), its
preset's identity, and what the preset says about SEV and bus locks. There is no nested
virtualisation. Registers of AVX are kept, but guests have none of its instructions.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, replace
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi import cpuid as abi
from kvmsim.abi.ioctls import KVM_SET_CPUID, KVM_SET_CPUID2
from kvmsim.abi.structs import (
    KVM_CPUID2,
    KVM_CPUID_ENTRY,
    KVM_CPUID_ENTRY2,
    KVM_MAX_CPUID_ENTRIES,
)
from kvmsim.abi.structs import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX as SIGNIFICANT_INDEX,
)
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import VcpuFile, handles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmsim.host.machine import Machine
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

VENDORS = {"amd": b"AuthenticAMD", "intel": b"GenuineIntel"}

SEV_EAX_SEV = 1 << 1
SEV_EAX_SEV_ES = 1 << 3
SEV_EAX_SEV_SNP = 1 << 4
#: Widths a guest can have; 0: it does not say.
LINEAR_BITS = frozenset({0, 48, 57})
AVX_BYTES = 256
"""Of AVX state in an XSAVE area: the upper halves of 16 registers."""
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


def supported(machine: Machine) -> tuple[Entry, ...]:
    """What KVM can show a guest on a machine (kvm.md D.1, B.2)."""
    preset = machine.preset
    name = VENDORS[preset.vendor]
    ebx, edx, ecx = (int.from_bytes(name[at : at + 4], "little") for at in (0, 4, 8))
    vendor = Entry(0, ebx=ebx, ecx=ecx, edx=edx)
    leaf_1 = _features(machine, 1)
    # CLFLUSH of 64 bytes, one logical processor, the APIC id of whoever asks.
    identity = replace(
        leaf_1, eax=signature(preset.family, preset.model, preset.stepping), ebx=0x0001_0800
    )
    signature_words = struct.unpack("<3I", abi.KVM_SIGNATURE)
    entries = [
        replace(vendor, eax=0x1F),
        identity,
        *(Entry(function) for function in (2, 3, 5)),
        Entry(4, flags=SIGNIFICANT_INDEX),
        Entry(6, eax=4),  # the APIC timer never stops
        replace(_features(machine, 7), flags=SIGNIFICANT_INDEX),
        Entry(9),
        _monitoring_leaf(machine),
        Entry(0xB, flags=SIGNIFICANT_INDEX),
        *_xsave_leaves(machine),
        Entry(
            abi.KVM_CPUID_SIGNATURE,
            0,
            0,
            abi.KVM_CPUID_FEATURES,
            *signature_words,
        ),
        Entry(abi.KVM_CPUID_FEATURES, eax=abi.KVM_FEATURES),
        replace(vendor, function=0x80000000, eax=0x80000021 if _amd(machine) else 0x80000008),
        _features(machine, 0x80000001),
        *_brand_leaves(preset.model_name),
        Entry(0x80000006, ecx=0x02006140),
        _features(machine, 0x80000007),
        replace(
            _features(machine, 0x80000008),
            eax=48 << 8 | physical_bits(machine),
        ),
    ]
    if _amd(machine):
        entries += [
            Entry(0x8000000A),
            Entry(0x8000001D, flags=SIGNIFICANT_INDEX),
            Entry(0x8000001E),
            _encryption_leaf(machine),
            replace(_features(machine, 0x80000021)),
        ]
    return tuple(entries)


def emulated() -> tuple[Entry, ...]:
    """What KVM can emulate although the processor lacks it: MOVBE."""
    return (Entry(0, eax=7), Entry(1, ecx=1 << 22), Entry(7, flags=SIGNIFICANT_INDEX))


def _amd(machine: Machine) -> bool:
    return machine.preset.vendor == "amd"


def _features(machine: Machine, function: int) -> Entry:
    """The feature bits of one leaf."""
    preset = machine.preset
    names = {*abi.COMMON_FEATURES, *abi.VENDOR_FEATURES[preset.vendor]}
    if preset.vendor == "intel" and preset.bus_lock.detect:
        names.add("bus_lock_detect")
    if preset.pmu is not None:
        names.add("pdcm")
    if preset.rtm:
        names.add("rtm")
    words = dict.fromkeys(("eax", "ebx", "ecx", "edx"), 0)
    for name in names:
        leaf, word, bit = abi.FEATURES[name]
        if leaf == function:
            words[word] |= 1 << bit
    if function == 0x80000001 and _amd(machine):
        words["edx"] |= _features(machine, 1).edx & abi.AMD_REPEATED_EDX
    return Entry(function, **words)


def _monitoring_leaf(machine: Machine) -> Entry:
    """Leaf 0xA: counters of 48 bits and the seven architectural events.

    Linux 6.12 pmu.h ``kvm_init_pmu_capability``: KVM shows version 2 at most.
    """
    pmu = machine.preset.pmu
    if pmu is None:
        return Entry(0xA)
    anythread_deprecated = 1 << 15
    return Entry(
        0xA,
        eax=min(pmu.version, 2) | pmu.counters << 8 | 48 << 16 | 7 << 24,
        edx=pmu.fixed_counters | 48 << 5 | anythread_deprecated,
    )


def supported_xcr0(machine: Machine) -> int:
    """Vector state a guest can have: x87, SSE, AVX on every machine here."""
    del machine
    return 7


def _xsave_leaves(machine: Machine) -> Iterator[Entry]:
    """Leaf 0xD: 512 bytes of legacy area, 64 of header, then AVX."""
    xcr0 = supported_xcr0(machine)
    yield Entry(0xD, 0, SIGNIFICANT_INDEX, eax=xcr0, ebx=832, ecx=832)
    yield Entry(0xD, 1, SIGNIFICANT_INDEX)
    yield Entry(0xD, 2, SIGNIFICANT_INDEX, eax=AVX_BYTES, ebx=576)


def _brand_leaves(model_name: str) -> Iterator[Entry]:
    """Leaves 0x80000002 to 4: the name, 48 bytes."""
    name = model_name.encode("ascii", "replace")[:47].ljust(48, b"\0")
    for leaf in range(3):
        words = struct.unpack("<4I", name[16 * leaf : 16 * leaf + 16])
        yield Entry(0x80000002 + leaf, 0, 0, *words)


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


def physical_bits(machine: Machine) -> int:
    """MAXPHYADDR of a machine, without the bits memory encryption takes."""
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


def register(entries: Sequence[Entry], function: int, name: str) -> int:
    """One register of the first entry of a leaf; 0 without such a leaf."""
    for entry in entries:
        if entry.function == function:
            value: int = getattr(entry, name)
            return value
    return 0


def guest_register(vcpu: Vcpu, function: int, name: str, index: int = 0) -> int:
    """One register of a leaf of the guest's own CPUID; 0 without such a leaf."""
    get = KVM_CPUID_ENTRY2.get
    for at in range(0, len(vcpu.cpuid), _ENTRY_BYTES):
        entry = vcpu.cpuid[at : at + _ENTRY_BYTES]
        if get(entry, "function") == function and get(entry, "index") == index:
            return get(entry, name)
    return 0


def guest_model(vcpu: Vcpu) -> int:
    """Model number of a guest's processor; -1 without the leaf that says it."""
    word = guest_register(vcpu, 1, "eax")
    if not word:
        return -1
    extended = word >> 16 & 0xF if word >> 8 & 0xF >= 6 else 0
    return word >> 4 & 0xF | extended << 4


def guest_physical_bits(vcpu: Vcpu) -> int:
    """MAXPHYADDR of a guest; 36 without the leaf that says it."""
    return guest_register(vcpu, 0x80000008, "eax") & 0xFF or 36


def guest_xcr0(vcpu: Vcpu) -> int:
    """Vector state a guest may enable: what its leaf 0xD says, of what the machine has."""
    return guest_register(vcpu, 0xD, "eax") & supported_xcr0(vcpu.vm.machine)


def copy_out_supported(call: Call, entries: Sequence[Entry]) -> int:
    """Answer KVM_GET_SUPPORTED_CPUID: E2BIG leaves ``nent`` alone, more than 256 is clamped."""
    nent = KVM_CPUID2.get(call.read(_HEADER_BYTES), "nent")
    if min(nent, KVM_MAX_CPUID_ENTRIES) < len(entries):
        raise KvmError(E2BIG, f"{len(entries)} CPUID entries")
    call.write(b"".join(entry.pack() for entry in entries), _HEADER_BYTES)
    call.write(KVM_CPUID2.pack(nent=len(entries)))
    return 0


@handles(VcpuFile, KVM_SET_CPUID)
def set_cpuid(vcpu: Vcpu, call: Call) -> int:
    """Give the guest its CPUID, in the older form without indices."""
    nent = KVM_CPUID2.get(call.read(_HEADER_BYTES), "nent")
    if nent > KVM_MAX_CPUID_ENTRIES:
        raise KvmError(E2BIG, f"{nent} CPUID entries")
    size = KVM_CPUID_ENTRY.size_bytes
    data = call.read(nent * size, _HEADER_BYTES) if nent else b""
    get = KVM_CPUID_ENTRY.get
    names = ("function", "eax", "ebx", "ecx", "edx")
    table = b"".join(
        Entry(**{name: get(data[at : at + size], name) for name in names}).pack()
        for at in range(0, len(data), size)
    )
    set_table(vcpu, table)
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


def _linear_bits(table: bytes) -> int:
    """What leaf 0x80000008 says; 0 without it."""
    get = KVM_CPUID_ENTRY2.get
    for at in range(0, len(table), _ENTRY_BYTES):
        entry = table[at : at + _ENTRY_BYTES]
        if get(entry, "function") == 0x80000008:
            return get(entry, "eax") >> 8 & 0xFF
    return 0


def set_table(vcpu: Vcpu, table: bytes) -> None:
    """Set the table; after the first run only the same one, without effect.

    Raises:
        KvmError: EINVAL, also for linear addresses of another width than 48 or 57 bits.
    """
    if _linear_bits(table) not in LINEAR_BITS:
        raise KvmError(EINVAL, "width of linear addresses")
    if not vcpu.has_run:
        vcpu.cpuid = table
        vcpu.cpuid_changed()
    elif _lasting(table) != _lasting(vcpu.cpuid):
        raise KvmError(EINVAL, "CPUID is fixed once the vCPU has run")


#: Leaf, index and register -> bits that follow registers of the guest, whatever the table says.
FOLLOWING = {
    (1, 0): ("ecx", 1 << 27),  # OSXSAVE
    (0xD, 0): ("ebx", 0xFFFF_FFFF),
    (0xD, 1): ("ebx", 0xFFFF_FFFF),
}


def _lasting(table: bytes) -> bytes:
    """A table without what changes at run time."""
    data = bytearray(table)
    for at in range(0, len(table), _ENTRY_BYTES):
        entry = data[at : at + _ENTRY_BYTES]
        get = KVM_CPUID_ENTRY2.get
        key = (get(entry, "function"), get(entry, "index"))
        if key in FOLLOWING:
            name, mask = FOLLOWING[key]
            KVM_CPUID_ENTRY2.put(entry, name, get(entry, name) & ~mask)
        if key == (1, 0):
            KVM_CPUID_ENTRY2.put(entry, "edx", get(entry, "edx") & ~(1 << 9))  # APIC
        data[at : at + _ENTRY_BYTES] = entry
    return bytes(data)
