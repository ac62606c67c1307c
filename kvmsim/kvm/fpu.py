"""Floating-point and vector state: KVM_GET_FPU, KVM_GET_XSAVE, KVM_GET_XCRS and their setters.

Kept in the XSAVE format; ``kvm_fpu`` is a view of its legacy area (Linux 6.12 x86.c).
"""

from __future__ import annotations

from errno import EINVAL
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import (
    KVM_GET_FPU,
    KVM_GET_XCRS,
    KVM_GET_XSAVE,
    KVM_GET_XSAVE2,
    KVM_SET_FPU,
    KVM_SET_XCRS,
    KVM_SET_XSAVE,
)
from kvmsim.abi.regs import KVM_FPU, KVM_MAX_XCRS, KVM_XCRS, KVM_XSAVE
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, protected
from kvmsim.kvm.dispatch import VcpuFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vcpu import Vcpu

FCW_RESET = 0x037F
MXCSR_RESET = 0x1F80
MXCSR_MASK = 0x0002FFFF
#: Of the XSAVE area: x87 registers, XMM registers, which components are valid.
ST_SPACE = 32
XMM_SPACE = 160
XSTATE_BV = 512
XCOMP_BV = 520
HEADER_RESERVED = slice(528, 576)
EXTENDED = 576
XCR0_X87 = 1
XCR0_SSE = 2
XCR0_AVX = 4


class Fpu:
    """The floating-point state of one vCPU; INIT keeps it.

    Attributes:
        area: XSAVE area in the standard format, 4096 bytes.
        xcr0: components the guest enabled.
    """

    __slots__ = ("area", "xcr0")

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.xcr0 = XCR0_X87
        area = self.area = bytearray(KVM_XSAVE.size_bytes)
        pack_into("<H", area, 0, FCW_RESET)
        pack_into("<II", area, 24, MXCSR_RESET, MXCSR_MASK)


def of(vcpu: Vcpu) -> Fpu:
    """The floating-point state of a vCPU."""
    mirror = vcpu.mirror
    if mirror is not None and mirror.fpu_ahead:
        mirror.fetch_fpu()
    return state_of(vcpu, Fpu)


def in_use(area: bytearray) -> tuple[bytearray, bytes]:
    """The legacy part of an area and that of AVX.

    Components the header says are not in use have their initial values.
    """
    (xstate_bv,) = unpack_from("<Q", area, XSTATE_BV)
    legacy = bytearray(area[:XSTATE_BV])
    if not xstate_bv & XCR0_X87:
        legacy[:24] = bytes(24)
        pack_into("<H", legacy, 0, FCW_RESET)
        legacy[ST_SPACE:XMM_SPACE] = bytes(XMM_SPACE - ST_SPACE)
    if not xstate_bv & XCR0_SSE:
        legacy[XMM_SPACE : XMM_SPACE + 256] = bytes(256)
    if not xstate_bv & (XCR0_SSE | XCR0_AVX):
        pack_into("<I", legacy, 24, MXCSR_RESET)
    avx = bytes(area[EXTENDED : EXTENDED + cpuid.AVX_BYTES])
    return legacy, avx if xstate_bv & XCR0_AVX else bytes(cpuid.AVX_BYTES)


def put(area: bytearray, legacy: bytearray, avx: bytes) -> None:
    """Put registers into an area, which has x87 and SSE in use from here on."""
    area[:28] = legacy[:28]
    area[ST_SPACE : len(legacy)] = legacy[ST_SPACE:]
    area[EXTENDED : EXTENDED + len(avx)] = avx
    (xstate_bv,) = unpack_from("<Q", area, XSTATE_BV)
    xstate_bv |= XCR0_X87 | XCR0_SSE | (XCR0_AVX if any(avx) else 0)
    pack_into("<Q", area, XSTATE_BV, xstate_bv)


@handles(VcpuFile, KVM_GET_FPU)
def get_fpu(vcpu: Vcpu, call: Call) -> int:
    """Copy x87 and SSE registers out; MXCSR is not among them (6.12)."""
    protected.refuse(vcpu)
    area = of(vcpu).area
    data = KVM_FPU.pack()
    data[0:128] = area[ST_SPACE : ST_SPACE + 128]
    pack_into("<HHBxHQQ", data, 128, *unpack_from("<HHBxHQQ", area, 0))
    data[152:408] = area[XMM_SPACE : XMM_SPACE + 256]
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_FPU)
def set_fpu(vcpu: Vcpu, call: Call) -> int:
    """Take x87 and SSE registers over; MXCSR stays."""
    protected.refuse(vcpu)
    data = call.read(KVM_FPU.size_bytes)
    area = of(vcpu).area
    area[ST_SPACE : ST_SPACE + 128] = data[0:128]
    pack_into("<HHBxHQQ", area, 0, *unpack_from("<HHBxHQQ", data, 128))
    area[XMM_SPACE : XMM_SPACE + 256] = data[152:408]
    (xstate_bv,) = unpack_from("<Q", area, XSTATE_BV)
    if not xstate_bv & (XCR0_SSE | XCR0_AVX):
        pack_into("<I", area, 24, MXCSR_RESET)
    pack_into("<Q", area, XSTATE_BV, xstate_bv | XCR0_X87 | XCR0_SSE)
    return 0


@handles(VcpuFile, KVM_GET_XSAVE)
def get_xsave(vcpu: Vcpu, call: Call) -> int:
    """Copy the XSAVE area out: x87, SSE, and what the guest's CPUID shows besides."""
    protected.refuse(vcpu)
    area = bytearray(of(vcpu).area)
    shown = cpuid.guest_xcr0(vcpu) | XCR0_X87 | XCR0_SSE
    (xstate_bv,) = unpack_from("<Q", area, XSTATE_BV)
    pack_into("<Q", area, XSTATE_BV, xstate_bv & shown)
    if not shown & XCR0_AVX:
        area[EXTENDED:] = bytes(len(area) - EXTENDED)
    call.write(area)
    return 0


@handles(VcpuFile, KVM_GET_XSAVE2)
def get_xsave2(vcpu: Vcpu, call: Call) -> int:
    """Copy the XSAVE area out, all of KVM_CAP_XSAVE2 bytes."""
    return get_xsave(vcpu, call)


@handles(VcpuFile, KVM_SET_XSAVE)
def set_xsave(vcpu: Vcpu, call: Call) -> int:
    """Take an XSAVE area over; only components the host has, and no compacted format."""
    protected.refuse(vcpu)
    data = bytearray(call.read(KVM_XSAVE.size_bytes))
    xstate_bv, xcomp_bv = unpack_from("<QQ", data, XSTATE_BV)
    (mxcsr,) = unpack_from("<I", data, 24)
    if xstate_bv & ~cpuid.supported_xcr0(vcpu.vm.machine) or xcomp_bv or any(data[HEADER_RESERVED]):
        raise KvmError(EINVAL, f"XSAVE header {xstate_bv:#x}, {xcomp_bv:#x}")
    if xstate_bv & (XCR0_SSE | XCR0_AVX) and mxcsr & ~MXCSR_MASK:
        raise KvmError(EINVAL, f"MXCSR {mxcsr:#x}")
    of(vcpu).area = data
    return 0


@handles(VcpuFile, KVM_GET_XCRS)
def get_xcrs(vcpu: Vcpu, call: Call) -> int:
    """Copy XCR0 out; there is no other."""
    protected.refuse(vcpu)
    data = KVM_XCRS.pack(nr_xcrs=1)
    KVM_XCRS.put(data, "xcrs", of(vcpu).xcr0, 1)
    call.write(data)
    return 0


@handles(VcpuFile, KVM_SET_XCRS)
def set_xcrs(vcpu: Vcpu, call: Call) -> int:
    """Take XCR0 over; the first entry that names it counts."""
    protected.refuse(vcpu)
    data = call.read(KVM_XCRS.size_bytes)
    count = KVM_XCRS.get(data, "nr_xcrs")
    if count > KVM_MAX_XCRS or KVM_XCRS.get(data, "flags"):
        raise KvmError(EINVAL, f"{count} XCRs, or flags")
    for index in range(count):
        if KVM_XCRS.get(data, "xcrs", 2 * index) & 0xFFFF_FFFF == 0:
            _set_xcr0(vcpu, KVM_XCRS.get(data, "xcrs", 2 * index + 1))
            break
    return 0


def _set_xcr0(vcpu: Vcpu, value: int) -> None:
    """Linux 6.12 ``__kvm_set_xcr``: x87 always, AVX only with SSE, nothing the guest lacks."""
    valid = cpuid.guest_xcr0(vcpu) | XCR0_X87
    if not value & XCR0_X87 or (value & XCR0_AVX and not value & XCR0_SSE) or value & ~valid:
        raise KvmError(EINVAL, f"XCR0 {value:#x}")
    of(vcpu).xcr0 = value
