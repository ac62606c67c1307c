"""CPUID as the guest executes it: the table user space set, and what KVM changes in it as it runs.

Leaves outside the table: Intel answers with the highest basic leaf, AMD with zeros. Some bits
follow registers: OSXSAVE follows CR4, APIC the APIC base, MWAIT IA32_MISC_ENABLE where
that quirk is off, the sizes of leaf 0xD XCR0 and IA32_XSS. User space reads them back as they are.
Linux 6.12 cpuid.c ``kvm_cpuid``, ``__kvm_update_cpuid_runtime``.
"""

from __future__ import annotations

from errno import E2BIG
from struct import Struct, pack
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi import cpuid as abi_cpuid
from kvmsim.abi import msrs as abi
from kvmsim.abi.ioctls import KVM_GET_CPUID2
from kvmsim.abi.regs import CR4_OSXSAVE
from kvmsim.abi.structs import KVM_CPUID2
from kvmsim.abi.structs import KVM_CPUID_FLAG_SIGNIFCANT_INDEX as SIGNIFICANT_INDEX
from kvmsim.errors import KvmError
from kvmsim.kvm import capabilities, cpuid, fpu, msr_rules, sregs
from kvmsim.kvm.dispatch import VcpuFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

    Words = tuple[int, int, int, int]

_ENTRY = Struct("<7I12x")
_AMD = tuple(int.from_bytes(word, "little") for word in (b"Auth", b"cAMD", b"enti"))
_OSXSAVE, _APIC, _MWAIT = 1 << 27, 1 << 9, 1 << 3
_APIC_ENABLE = 1 << 11
_XSAVES, _XSAVEC = 1 << 3, 1 << 1
_PV_UNHALT = 1 << 7
#: Leaves that :func:`updated` changes.
_FOLLOWS = frozenset({1, 0xD, abi_cpuid.KVM_CPUID_FEATURES})


class Leaves:
    """A table, by leaf, for looking up; made again when user space sets another.

    Attributes:
        table: the bytes it is made from.
        by_leaf: leaf -> its entries: index, flags and the four registers.
    """

    __slots__ = ("by_leaf", "table")

    def __init__(self, vcpu: Vcpu | None = None) -> None:
        del vcpu
        self.table = b""
        self.by_leaf: dict[int, list[tuple[int, int, Words]]] = {}

    def use(self, table: bytes) -> None:
        """Look up in this table from here on."""
        self.table = table
        self.by_leaf = {}
        for function, index, flags, *words in _ENTRY.iter_unpack(table):
            a, b, c, d = words
            self.by_leaf.setdefault(function, []).append((index, flags, (a, b, c, d)))

    def find(self, function: int, index: int = 0) -> Words | None:
        """An entry; without a significant index it is that of all subleaves."""
        for own, flags, words in self.by_leaf.get(function, ()):
            if own == index or not flags & SIGNIFICANT_INDEX:
                return words
        return None


def leaves(vcpu: Vcpu) -> Leaves:
    """The table of a vCPU."""
    found = state_of(vcpu, Leaves)
    if found.table is not vcpu.cpuid:
        found.use(vcpu.cpuid)
    return found


def read(vcpu: Vcpu, function: int, index: int) -> Words:
    """EAX, EBX, ECX, EDX of a leaf."""
    table = leaves(vcpu)
    words = table.find(function, index)
    if words is None:
        substitute = _out_of_range(table, function)
        if substitute is not None:
            function = substitute
            words = table.find(function, index)
    if words is not None:
        return updated(vcpu, function, index, words)
    if function in {0xB, 0x1F} and (first := table.find(function, 1)) is not None:
        # Every subleaf of the topology gives back its number and the x2APIC id.
        return 0, 0, index & 0xFF, first[3]
    return 0, 0, 0, 0


def _out_of_range(table: Leaves, function: int) -> int | None:
    """The highest basic leaf, where the guest is no AMD and asks beyond its range; None: zeros."""
    basic = table.find(0)
    if basic is None or (basic[1], basic[3], basic[2]) == (_AMD[0], _AMD[2], _AMD[1]):
        return None
    if 0x40000000 <= function <= 0x4FFFFFFF:
        first = table.find(function & 0xFFFFFF00)
    elif function >= 0xC0000000:
        first = table.find(0xC0000000)
    else:
        first = table.find(function & 0x80000000)
    return None if first is not None and function <= first[0] else basic[0]


def updated(vcpu: Vcpu, function: int, index: int, words: Words) -> Words:
    """An entry with what follows registers."""
    a, b, c, d = words
    if function == 1:
        on = sregs.of(vcpu).get("cr4") & CR4_OSXSAVE
        c = c & ~_OSXSAVE | (_OSXSAVE if on else 0)
        if _mwait_follows(vcpu):
            mwait = msr_rules.value_of(vcpu, abi.IA32_MISC_ENABLE) & abi.MISC_ENABLE_MWAIT
            c = c & ~_MWAIT | (_MWAIT if mwait else 0)
        d = d & ~_APIC | (_APIC if vcpu.apic_base & _APIC_ENABLE else 0)
    elif function == abi_cpuid.KVM_CPUID_FEATURES and _halts_unseen(vcpu):
        a &= ~_PV_UNHALT
    elif function == 0xD and index == 0:
        b = _area_bytes(fpu.of(vcpu).xcr0)
    elif function == 0xD and index == 1 and a & (_XSAVES | _XSAVEC):
        b = _area_bytes(fpu.of(vcpu).xcr0 | msr_rules.stored(vcpu, abi.IA32_XSS))
    return a, b, c, d


def _halts_unseen(vcpu: Vcpu) -> bool:
    """Whether the guest halts without KVM, which then cannot end a halt for another vCPU."""
    if not capabilities.of(vcpu.vm).disabled_exits & caps.KVM_X86_DISABLE_EXITS_HLT:
        return False
    shown = leaves(vcpu).find(abi_cpuid.KVM_CPUID_SIGNATURE)
    return shown is not None and pack("<3I", *shown[1:]) == abi_cpuid.KVM_SIGNATURE


def _mwait_follows(vcpu: Vcpu) -> bool:
    return bool(capabilities.of(vcpu.vm).disabled_quirks & caps.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)


def _area_bytes(components: int) -> int:
    """Bytes of an XSAVE area, in either format: AVX is the only component behind the header."""
    return fpu.EXTENDED + (cpuid.AVX_BYTES if components & fpu.XCR0_AVX else 0)


def table_now(vcpu: Vcpu, table: bytes) -> bytes:
    """A table as user space reads it back: with what follows registers."""
    out = bytearray(table)
    for at in range(0, len(table), _ENTRY.size):
        function, index, flags, a, b, c, d = _ENTRY.unpack_from(table, at)
        if function in _FOLLOWS:
            words = updated(vcpu, function, index, (a, b, c, d))
            _ENTRY.pack_into(out, at, function, index, flags, *words)
    return bytes(out)


@handles(VcpuFile, KVM_GET_CPUID2)
def get_cpuid2(vcpu: Vcpu, call: Call) -> int:
    """Copy the table out as it is for the guest now; E2BIG leaves ``nent`` alone."""
    nent = KVM_CPUID2.get(call.read(KVM_CPUID2.size_bytes), "nent")
    present = len(vcpu.cpuid) // _ENTRY.size
    if nent < present:
        raise KvmError(E2BIG, f"{present} CPUID entries")
    call.write(table_now(vcpu, vcpu.cpuid), KVM_CPUID2.size_bytes)
    call.write(KVM_CPUID2.pack(nent=present))
    return 0
