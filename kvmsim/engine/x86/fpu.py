"""x87, MMX, SSE and AVX registers: the emulator's and those of an XSAVE area.

The legacy part of the area is what FXSAVE writes in 64-bit mode; the upper halves of YMM registers
are kept although no instruction here uses them.

Layouts: SDM volume 1, 10.5.1 and 13.4; offsets into the emulator's state belong to the release
``backend`` insists on. The emulator keeps the x87 registers by their physical number, the top of
the stack and the empty flags apart, and derives rounding and precision from the control words.
"""

from __future__ import annotations

from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsim.engine.x86.registers import Registers

LEGACY_BYTES = 416
"""Bytes of the legacy part in use; up to 512 follow for software."""
AVX_BYTES = 256
MXCSR_MASK = 0x0002FFFF

#: What is compared to see whether anything changed: x87, MXCSR, XMM0 to XMM15.
_BEGIN, _END = 604, 1848
_TOP, _STATUS, _CONTROL, _EMPTY, _REGISTERS = 604, 608, 610, 612, 624
_OPCODE, _IP, _DP = 752, 760, 768
_X87_STATUS, _SSE_STATUS, _MXCSR, _XMM = 776, 808, 816, 824
_XMM_BYTES = 64
_TOP_MASK = 7 << 11
#: Of a float_status: rounding mode, x87 precision, flush to zero, denormals are zero.
_ROUNDING, _PRECISION, _FLUSH, _DENORMALS = 1, 3, 4, 5
_PRECISION_BITS = (32, 80, 64, 80)
#: In the area.
_ST, _AREA_XMM = 32, 160


def reset(registers: Registers) -> None:
    """The state after reset, which is that of FNINIT and the reset value of MXCSR."""
    area = bytearray(LEGACY_BYTES)
    pack_into("<H", area, 0, 0x037F)
    pack_into("<I", area, 24, 0x1F80)
    set_legacy_area(registers, area)
    set_avx_area(registers, bytes(AVX_BYTES))


def raw(registers: Registers) -> bytes:
    """Everything this module is about, in the emulator's layout: to see whether it changed."""
    return bytes(registers.env[_BEGIN:_END])


def legacy_area(registers: Registers) -> bytearray:
    """The first 416 bytes of an XSAVE area."""
    env = registers.env
    area = bytearray(LEGACY_BYTES)
    top = registers.d[_TOP // 4] & 7
    status, control = unpack_from("<HH", env, _STATUS)
    tags = sum((not env[_EMPTY + number]) << number for number in range(8))
    (opcode,) = unpack_from("<H", env, _OPCODE)
    pointers = unpack_from("<QQ", env, _IP)
    status = status & ~_TOP_MASK | top << 11
    pack_into("<HHBxHQQ", area, 0, control, status, tags, opcode & 0x7FF, *pointers)
    pack_into("<II", area, 24, registers.d[_MXCSR // 4], MXCSR_MASK)
    for number in range(8):
        at = _REGISTERS + 16 * ((top + number) & 7)
        area[_ST + 16 * number : _ST + 16 * number + 10] = env[at : at + 10]
    for number in range(16):
        at = _XMM + _XMM_BYTES * number
        area[_AREA_XMM + 16 * number : _AREA_XMM + 16 * number + 16] = env[at : at + 16]
    return area


def set_legacy_area(registers: Registers, area: bytes | bytearray | memoryview) -> None:
    """Take x87, MXCSR and XMM registers from the first 416 bytes of an XSAVE area."""
    env = registers.env
    control, status, tags, opcode, ip, dp = unpack_from("<HHBxHQQ", area, 0)
    top = status >> 11 & 7
    registers.d[_TOP // 4] = top
    pack_into("<HH", env, _STATUS, status & ~_TOP_MASK, control)
    for number in range(8):
        env[_EMPTY + number] = not tags >> number & 1
        at = _REGISTERS + 16 * ((top + number) & 7)
        env[at : at + 16] = bytes(area[_ST + 16 * number : _ST + 16 * number + 10]) + bytes(6)
    pack_into("<H", env, _OPCODE, opcode)
    pack_into("<QQ", env, _IP, ip, dp)
    env[_X87_STATUS + _ROUNDING] = control >> 10 & 3
    env[_X87_STATUS + _PRECISION] = _PRECISION_BITS[control >> 8 & 3]
    set_mxcsr(registers, unpack_from("<I", area, 24)[0])
    for number in range(16):
        at = _XMM + _XMM_BYTES * number
        env[at : at + 16] = area[_AREA_XMM + 16 * number : _AREA_XMM + 16 * number + 16]


def set_mxcsr(registers: Registers, value: int) -> None:
    """MXCSR, and what the emulator derives from it."""
    registers.d[_MXCSR // 4] = value
    env = registers.env
    env[_SSE_STATUS + _ROUNDING] = value >> 13 & 3
    # The emulator's LDMXCSR puts this one there; it is to be the same after a restore.
    env[_X87_STATUS + _FLUSH] = value >> 15 & 1
    env[_SSE_STATUS + _DENORMALS] = value >> 6 & 1


def avx_area(registers: Registers) -> bytes:
    """Upper halves of YMM0 to YMM15."""
    env = registers.env
    places = (_XMM + _XMM_BYTES * number + 16 for number in range(16))
    return b"".join(bytes(env[at : at + 16]) for at in places)


def set_avx_area(registers: Registers, area: bytes | bytearray | memoryview) -> None:
    """Take the upper halves of YMM0 to YMM15."""
    for number in range(16):
        at = _XMM + _XMM_BYTES * number + 16
        registers.env[at : at + 16] = area[16 * number : 16 * number + 16]


def ymm(registers: Registers, number: int) -> bytes:
    """A YMM register, 32 bytes."""
    at = _XMM + _XMM_BYTES * number
    return bytes(registers.env[at : at + 32])


def set_ymm(registers: Registers, number: int, value: bytes) -> None:
    """Set a YMM register; what a shorter value leaves is zero."""
    at = _XMM + _XMM_BYTES * number
    registers.env[at : at + 32] = value.ljust(32, b"\0")
