"""Instructions with a VEX prefix: register moves on kept AVX state; all others do not exist.

The emulator below executes the 128-bit forms of some as the SSE instructions they resemble, which
leaves the upper halves as they are; so none may get there. What guests without AVX still use where
XCR0 has its state are plain moves, to fill registers that XSAVE is then to save. Intel SDM volume
2, 2.3 and MOVDQU, MOVDQA, MOVUPS, MOVAPS, MOVUPD, MOVAPD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import fpu, xsave
from kvmsim.engine.x86.delivery import GP, UD, Fault

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction

_NONE, _66, _F3 = 0, 1, 2
#: Opcode of a load -> prefixes with which it is a move of whole registers; a store is one, or 16,
#: above its load.
_LOADS = {0x10: {_NONE, _66}, 0x28: {_NONE, _66}, 0x6F: {_66, _F3}}
_STORES = {0x11: 0x10, 0x29: 0x28, 0x7F: 0x6F}
_ALIGNED = {(0x28, _NONE), (0x28, _66), (0x6F, _66)}


def is_move(found: Instruction) -> bool:
    """Whether it is one of the moves."""
    if not d.VEX <= found.opcode < d.EVEX or found.opcode >> 8 & 0xFF != 1:
        return False
    low = found.opcode & 0xFF
    return found.opcode >> 16 & 3 in _LOADS.get(_STORES.get(low, low), set())


def execute(cpu: Cpu, found: Instruction) -> None:
    """Execute a move.

    Raises:
        Fault: the guest gets an exception, and nothing has changed.
    """
    registers = cpu.registers
    both = xsave.SSE | xsave.AVX
    if not registers.cr4 & xsave.CR4_OSXSAVE or cpu.xcr0 & both != both or not registers.protected:
        raise Fault(UD)
    if registers.cr0 & xsave.CR0_TS:
        raise Fault(xsave.NM)
    low, size = found.opcode & 0xFF, found.bits // 8
    load = _STORES.get(low, low)
    at = None if found.operand is None else xsave.address(cpu, found)
    if at is not None and at % size and (load, found.opcode >> 16 & 3) in _ALIGNED:
        raise Fault(GP)
    user = registers.cpl == 3
    if low in _STORES:
        data = fpu.ymm(registers, found.reg)[:size]
        if at is not None:
            cpu.linear.write(at, data, user=user)
        else:
            fpu.set_ymm(registers, found.rm, data)
    elif at is not None:
        fpu.set_ymm(registers, found.reg, cpu.linear.read(at, size, user=user))
    else:
        fpu.set_ymm(registers, found.reg, fpu.ymm(registers, found.rm)[:size])
    registers.advance(found.length)
