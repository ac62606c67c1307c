"""Segments and control registers: KVM_GET_SREGS, KVM_SET_SREGS and their second form.

Rules: Linux 6.12 x86.c ``kvm_is_valid_sregs``, ``kvm_set_apic_base``. A refused set changes
nothing.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi.caps import KVM_MP_STATE_RUNNABLE
from kvmsim.abi.ioctls import KVM_GET_SREGS, KVM_GET_SREGS2, KVM_SET_SREGS, KVM_SET_SREGS2
from kvmsim.abi.regs import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_ALWAYS,
    CR4_FSGSBASE,
    CR4_LA57,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PKE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_UMIP,
    EFER_FFXSR,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    KVM_SREGS,
    KVM_SREGS2,
    KVM_SREGS2_FLAGS_PDPTRS_VALID,
    SREGS_COMMON_BYTES,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, events, irqchip, protected, vcpu_events
from kvmsim.kvm.dispatch import VcpuFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

CR0_RESET = 0x60000010
SEGMENT_LIMIT = 0xFFFF
#: Segment -> its selector, base and type after reset; TR and LDT are system segments.
RESET_SEGMENTS = {
    "cs": (0xF000, 0xFFFF0000, 0xB, 1),
    **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), (0, 0, 0x3, 1)),
    "tr": (0, 0, 0xB, 0),
    "ldt": (0, 0, 0x2, 0),
}
EFER_KNOWN = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
#: EFER bit -> bit of CPUID 0x80000001 EDX that shows it to the guest.
EFER_FEATURES = {EFER_FFXSR: 25, EFER_LME: 29, EFER_LMA: 29, EFER_NX: 20}
#: CR4 bit -> leaf, register and bit of CPUID that announces it.
CR4_FEATURES = {
    CR4_UMIP: (7, "ecx", 2),
    CR4_LA57: (7, "ecx", 16),
    CR4_FSGSBASE: (7, "ebx", 0),
    CR4_PCIDE: (1, "ecx", 17),
    CR4_OSXSAVE: (1, "ecx", 26),
    CR4_SMEP: (7, "ebx", 7),
    CR4_SMAP: (7, "ebx", 20),
    CR4_PKE: (7, "ecx", 3),
}
APIC_BASE_RESERVED = 0x2FF
CR8_MAX = 15
APIC_X2APIC = 1 << 10
APIC_ENABLE = 1 << 11


class Sregs:
    """The special registers of one vCPU, except CR8 and the APIC base, which the vCPU has.

    Attributes:
        data: the part ``kvm_sregs`` and ``kvm_sregs2`` have in common.
        pdptrs: page directory pointers of PAE paging; None: not loaded.
    """

    __slots__ = ("data", "pdptrs")

    def __init__(self, vcpu: Vcpu | None = None) -> None:
        del vcpu
        self.reset()

    def reset(self) -> None:
        """Power-on or INIT."""
        self.pdptrs: tuple[int, ...] | None = None
        data = self.data = bytearray(SREGS_COMMON_BYTES)
        put = KVM_SREGS.put
        for segment, (selector, base, kind, s) in RESET_SEGMENTS.items():
            put(data, f"{segment}.selector", selector)
            put(data, f"{segment}.base", base)
            put(data, f"{segment}.limit", SEGMENT_LIMIT)
            put(data, f"{segment}.type", kind)
            put(data, f"{segment}.present", 1)
            put(data, f"{segment}.s", s)
        put(data, "gdt.limit", SEGMENT_LIMIT)
        put(data, "idt.limit", SEGMENT_LIMIT)
        put(data, "cr0", CR0_RESET)

    def get(self, name: str) -> int:
        """Read a register by the name of its member: ``cr3``, ``cs.base``."""
        return KVM_SREGS.get(self.data, name)

    def put(self, name: str, value: int) -> None:
        """Set a register by the name of its member, without any check."""
        KVM_SREGS.put(self.data, name, value)

    @property
    def pae_paging(self) -> bool:
        """Whether the guest uses 32-bit paging with 64-bit entries."""
        return bool(
            self.get("cr0") & CR0_PG
            and self.get("cr4") & CR4_PAE
            and not self.get("efer") & EFER_LMA
        )


def of(vcpu: Vcpu) -> Sregs:
    """The special registers of a vCPU."""
    mirror = vcpu.mirror
    if mirror is not None and mirror.sregs_ahead:
        mirror.fetch_sregs()
    return state_of(vcpu, Sregs)


def linear_rip(vcpu: Vcpu) -> int:
    """Address of the next instruction, with the base of CS."""
    sregs = of(vcpu)
    if sregs.get("cs.l"):
        return vcpu.rip
    return (vcpu.rip + sregs.get("cs.base")) & 0xFFFF_FFFF


def start_at(vcpu: Vcpu, vector: int) -> None:
    """A SIPI: real mode code at page ``vector``."""
    sregs = of(vcpu)
    sregs.put("cs.selector", vector << 8 & 0xFFFF)
    sregs.put("cs.base", vector << 12 & 0xFF000)


# -- rules ---------------------------------------------------------------------------------------


def valid_efer(vcpu: Vcpu, efer: int) -> bool:
    """Whether EFER can hold a value; the host's AMD bit FFXSR is no feature of Intel's."""
    known = EFER_KNOWN | (EFER_FFXSR if vcpu.vm.machine.preset.vendor == "amd" else 0)
    return not efer & ~known


def guest_may_have_efer(vcpu: Vcpu, efer: int) -> bool:
    """Whether the guest may write a value: only bits its CPUID shows, and the host has."""
    shown = cpuid.guest_register(vcpu, 0x80000001, "edx")
    for bit, feature in EFER_FEATURES.items():
        if efer & bit and not shown >> feature & 1:
            return False
    return valid_efer(vcpu, efer)


def valid_cr4(vcpu: Vcpu, cr4: int) -> bool:
    """Whether CR4 can hold a value: what the host has and, once it is set, the guest's CPUID."""
    if not cr4 & ~CR4_ALWAYS:
        return True
    host = vcpu.vm.system.supported_cpuid
    known = CR4_ALWAYS
    for bit, (function, register, index) in CR4_FEATURES.items():
        has = cpuid.register(host, function, register) >> index & 1
        if has and vcpu.cpuid:
            has = cpuid.guest_register(vcpu, function, register) >> index & 1
        known |= bit if has else 0
    return not cr4 & ~known


def valid(vcpu: Vcpu, data: bytes) -> bool:
    """Whether the registers go together."""
    get = KVM_SREGS.get
    cr0, cr4, efer = get(data, "cr0"), get(data, "cr4"), get(data, "efer")
    if efer & EFER_LME and cr0 & CR0_PG:
        if not cr4 & CR4_PAE or not efer & EFER_LMA:
            return False
        if get(data, "cr3") >> cpuid.guest_physical_bits(vcpu):
            return False
    elif efer & EFER_LMA or get(data, "cs.l"):
        return False
    if cr0 >> 32 or (cr0 & CR0_NW and not cr0 & CR0_CD) or (cr0 & CR0_PG and not cr0 & CR0_PE):
        return False
    return valid_cr4(vcpu, cr4)


def valid_apic_base(vcpu: Vcpu, value: int) -> bool:
    """Whether the APIC base can hold a value; x2APIC without the APIC enabled is no mode."""
    if value == vcpu.apic_base:
        return True
    reserved = APIC_BASE_RESERVED | -1 << cpuid.guest_physical_bits(vcpu)
    if not cpuid.guest_register(vcpu, 1, "ecx") >> 21 & 1:
        reserved |= APIC_X2APIC
    if value & reserved:
        return False
    return bool(value & APIC_ENABLE) or not value & APIC_X2APIC


# -- get and set ---------------------------------------------------------------------------------


def pack(vcpu: Vcpu) -> bytearray:
    """The bytes of ``kvm_sregs``."""
    data = _pack_common(vcpu) + bytes(KVM_SREGS.size_bytes - SREGS_COMMON_BYTES)
    state = events.of(vcpu)
    if state.interrupt and not state.interrupt_soft:
        index, bit = divmod(state.interrupt_nr, 64)
        KVM_SREGS.put(data, "interrupt_bitmap", 1 << bit, index)
    return data


def _pack_common(vcpu: Vcpu) -> bytearray:
    data = bytearray(of(vcpu).data)
    KVM_SREGS.put(data, "cr8", vcpu.cr8)
    KVM_SREGS.put(data, "apic_base", vcpu.apic_base)
    return data


def unpack(vcpu: Vcpu, data: bytes) -> None:
    """Take ``kvm_sregs`` over.

    Raises:
        KvmError: EINVAL, values that do not go together.
    """
    _unpack_common(vcpu, data)
    words = [KVM_SREGS.get(data, "interrupt_bitmap", index) for index in range(4)]
    for index, word in enumerate(words):
        if word:
            lowest = (word & -word).bit_length() - 1
            events.of(vcpu).queue_interrupt(64 * index + lowest)
            vcpu_events.arm(vcpu)
            break


def _unpack_common(vcpu: Vcpu, data: bytes) -> None:
    get = KVM_SREGS.get
    if not valid(vcpu, data):
        raise KvmError(EINVAL, "control registers that do not go together")
    if not valid_apic_base(vcpu, get(data, "apic_base")):
        raise KvmError(EINVAL, f"APIC base {get(data, 'apic_base'):#x}")
    of(vcpu).data = bytearray(data[:SREGS_COMMON_BYTES])
    vcpu.apic_base = get(data, "apic_base")
    if get(data, "cr8") <= CR8_MAX:  # a wider one is dropped
        vcpu.cr8 = get(data, "cr8")
    if _is_reset(vcpu, data):
        # Older VMMs do not end a halt of the boot processor when they reset it.
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE


def _is_reset(vcpu: Vcpu, data: bytes) -> bool:
    """Whether these are the registers of a boot processor after reset."""
    get = KVM_SREGS.get
    code = (get(data, "cs.selector"), get(data, "cs.base"))
    return (
        vcpu.id == irqchip.of(vcpu.vm).boot_cpu
        and vcpu.rip == 0xFFF0
        and code == (0xF000, 0xFFFF0000)
        and not get(data, "cr0") & CR0_PE
    )


@handles(VcpuFile, KVM_GET_SREGS)
def get_sregs(vcpu: Vcpu, call: Call) -> int:
    """Copy the special registers out."""
    protected.refuse(vcpu)
    call.write(pack(vcpu))
    return 0


@handles(VcpuFile, KVM_SET_SREGS)
def set_sregs(vcpu: Vcpu, call: Call) -> int:
    """Take special registers over."""
    protected.refuse(vcpu)
    unpack(vcpu, call.read(KVM_SREGS.size_bytes))
    return 0


@handles(VcpuFile, KVM_GET_SREGS2)
def get_sregs2(vcpu: Vcpu, call: Call) -> int:
    """Copy the special registers out, with the page directory pointers of PAE paging."""
    protected.refuse(vcpu)
    data = _pack_common(vcpu) + bytes(KVM_SREGS2.size_bytes - SREGS_COMMON_BYTES)
    sregs = of(vcpu)
    if sregs.pae_paging and sregs.pdptrs is not None:
        KVM_SREGS2.put(data, "flags", KVM_SREGS2_FLAGS_PDPTRS_VALID)
        for index, entry in enumerate(sregs.pdptrs):
            KVM_SREGS2.put(data, "pdptrs", entry, index)
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_SREGS2)
def set_sregs2(vcpu: Vcpu, call: Call) -> int:
    """Take special registers over; page directory pointers only for a guest with PAE paging."""
    protected.refuse(vcpu)
    data = call.read(KVM_SREGS2.size_bytes)
    get = KVM_SREGS2.get
    flags = get(data, "flags")
    pae = bool(
        get(data, "cr0") & CR0_PG
        and get(data, "cr4") & CR4_PAE
        and not get(data, "efer") & EFER_LMA
    )
    if flags & ~KVM_SREGS2_FLAGS_PDPTRS_VALID or (flags and not pae):
        raise KvmError(EINVAL, f"flags {flags:#x} of kvm_sregs2")
    _unpack_common(vcpu, data)
    of(vcpu).pdptrs = tuple(get(data, "pdptrs", index) for index in range(4)) if flags else None
    return 0
