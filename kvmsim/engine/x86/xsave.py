"""XSAVE, XSAVEOPT and XRSTOR, in the standard format: x87, SSE, and AVX state as mere storage.

The emulator below has none of AVX and its own idea of XCR0, so the engine executes them. SDM volume
1, 13.7 to 13.9; only the compacted format is missing, which CPUID does not show.
"""

from __future__ import annotations

from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import fpu
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import GP, UD, Fault

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction

OPCODE = 0x0FAE
XSAVE, XRSTOR, XSAVEOPT = 4, 5, 6
NM = 7
X87, SSE, AVX = 1, 2, 4
CR0_TS, CR4_OSXSAVE = 1 << 3, 1 << 18
HEADER, HEADER_BYTES, EXTENDED = 512, 64, 576
ALIGNMENT = 64
FCW_RESET, MXCSR_RESET = 0x037F, 0x1F80
_POINTERS = slice(0, 24)
_MXCSR = slice(24, 32)
_ST = slice(32, 160)
_XMM = slice(160, 416)


def is_one(found: Instruction) -> bool:
    """Whether it is one of these instructions."""
    if found.opcode != OPCODE or found.operand is None or found.repeat:
        return False
    which = found.modrm >> 3 & 7
    # With an operand-size prefix /6 is CLWB.
    narrow = b"\x66" in found.code[: found.code.index(b"\x0f")]
    return which in {XSAVE, XRSTOR} or (which == XSAVEOPT and not narrow)


def execute(cpu: Cpu, found: Instruction) -> None:
    """Execute one of them.

    Raises:
        Fault: the guest gets an exception, and nothing has changed.
    """
    registers = cpu.registers
    if not registers.cr4 & CR4_OSXSAVE:
        raise Fault(UD)
    if registers.cr0 & CR0_TS:
        raise Fault(NM)
    at = address(cpu, found)
    if at % ALIGNMENT:
        raise Fault(GP)
    q = registers.q
    wanted = cpu.xcr0 & (q[r.RAX] & r.U32 | (q[r.RDX] & r.U32) << 32)
    which = found.modrm >> 3 & 7
    if which == XRSTOR:
        _restore(cpu, at, wanted)
    else:
        _save(cpu, at, wanted, wide=bool(found.rex & 8), optimised=which == XSAVEOPT)
    registers.advance(found.length)


def address(cpu: Cpu, found: Instruction) -> int:
    """Linear address of the operand in memory."""
    operand, q = found.operand, cpu.registers.q
    assert operand is not None
    offset = operand.disp
    if operand.base == d.RIP:
        offset += cpu.registers.rip + found.length
    elif operand.base != d.NONE:
        offset += q[operand.base]
    if operand.index != d.NONE:
        offset += q[operand.index] * operand.scale
    return cpu.linear_address(operand.segment, offset & (1 << operand.address_bits) - 1)


def _in_use(legacy: bytearray, avx: bytes) -> int:
    """Components that are not as after reset (XINUSE)."""
    used = 0
    (mxcsr,) = unpack_from("<I", legacy, 24)
    if legacy[_POINTERS] != FCW_RESET.to_bytes(24, "little") or any(legacy[_ST]):
        used |= X87
    if mxcsr != MXCSR_RESET or any(legacy[_XMM]):
        used |= SSE
    return used | (AVX if any(avx) else 0)


def _save(cpu: Cpu, at: int, wanted: int, *, wide: bool, optimised: bool) -> None:
    user = cpu.registers.cpl == 3
    legacy, avx = fpu.legacy_area(cpu.registers), fpu.avx_area(cpu.registers)
    used = _in_use(legacy, avx)
    if not wide:
        # Pointers of 32 bits, and no selectors: these processors do not keep them.
        ip, dp = unpack_from("<QQ", legacy, 8)
        pack_into("<QQ", legacy, 8, ip & r.U32, dp & r.U32)
    written = wanted & used if optimised else wanted
    area = bytearray(cpu.linear.read(at, EXTENDED, user=user))
    parts = [_POINTERS, _ST] if written & X87 else []
    parts += [_XMM] if written & SSE else []
    parts += [_MXCSR] if wanted & (SSE | AVX) else []
    for part in parts:
        area[part] = legacy[part]
    (before,) = unpack_from("<Q", area, HEADER)
    pack_into("<Q", area, HEADER, before & ~wanted | used & wanted)
    data = bytes(area) + (avx if written & AVX else b"")
    cpu.linear.write(at, data, user=user)


def _restore(cpu: Cpu, at: int, wanted: int) -> None:
    user, registers = cpu.registers.cpl == 3, cpu.registers
    area = cpu.linear.read(at, EXTENDED, user=user)
    (present,) = unpack_from("<Q", area, HEADER)
    (mxcsr,) = unpack_from("<I", area, 24)
    bad_header = present & ~cpu.xcr0 or any(area[HEADER + 8 : HEADER + 24])
    if bad_header or (wanted & (SSE | AVX) and mxcsr & ~fpu.MXCSR_MASK):
        raise Fault(GP)
    # Read before anything changes: it may fault.
    avx = bytes(fpu.AVX_BYTES)
    if wanted & present & AVX:
        avx = cpu.linear.read(at + EXTENDED, fpu.AVX_BYTES, user=user)
    legacy = fpu.legacy_area(registers)
    initial = pack("<H", FCW_RESET) + bytes(fpu.LEGACY_BYTES - 2)
    for component, parts in ((X87, (_POINTERS, _ST)), (SSE, (_XMM,))):
        for part in parts if wanted & component else ():
            legacy[part] = (area if present & component else initial)[part]
    if wanted & (SSE | AVX):
        pack_into("<I", legacy, 24, mxcsr)
    fpu.set_legacy_area(registers, legacy)
    if wanted & AVX:
        fpu.set_avx_area(registers, avx)
