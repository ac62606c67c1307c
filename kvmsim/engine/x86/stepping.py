"""One instruction at a time, by the trap flag: it leaves translated code as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.breakpoints import DR6_BS
from kvmsim.engine.x86.delivery import DB
from kvmsim.engine.x86.watch import Why

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.vm import X86Vm

#: Whether the last exception came of an INT instruction; a 32-bit word of the emulator's state.
EXCEPTION_IS_INT = 5388 // 4
STI = b"\xfb"
#: POPF and IRET.
LOADS_FLAGS = frozenset({0x9D, 0xCF})
#: More code than one instruction is charged for.
_ALLOWANCE_BYTES = 1 << 30


def trap(cpu: Cpu) -> None:
    """A single step of the guest's own is over."""
    if not _is_behind_load_of_ss(cpu):
        cpu.traps |= DR6_BS


def _is_behind_load_of_ss(cpu: Cpu) -> bool:
    """Whether MOV SS or POP SS holds off the trap for one instruction (SDM volume 3, 6.8.3).

    STI casts a shadow too, but none on traps; it is told by its byte.
    """
    registers = cpu.registers
    return registers.shadow and cpu.vm.watch.read_code(registers.linear_rip - 1, 1) != STI


def execute(vm: X86Vm, cpu: Cpu) -> Why:
    """Let the emulator execute what comes next, however little the vCPU may; why it stopped."""
    why, _status = vm.watch.execute(cpu)
    lent_bytes = 0
    while why is Why.NOTHING and vm.meter.expired():
        vm.meter.lend(_ALLOWANCE_BYTES)
        lent_bytes += _ALLOWANCE_BYTES
        why, _status = vm.watch.execute(cpu)
    if lent_bytes:
        vm.meter.lend(-lent_bytes)
    return why


def single(vm: X86Vm, cpu: Cpu, *, restores_flags: bool = False) -> Why:
    """Execute one instruction, unseen by the sites, however little the vCPU may execute.

    Args:
        vm: the VM.
        cpu: whose.
        restores_flags: the instruction loads the flags itself.

    Returns:
        Why the emulator stopped before the instruction ended; NOTHING: it is done.
    """
    watch, registers = vm.watch, cpu.registers
    guests, before = registers.flags & r.FLAG_TF, registers.debug(6)
    why = Why.NEW_SITES
    while why is Why.NEW_SITES:
        registers.flags |= r.FLAG_TF
        watch.stepping = True
        try:
            why = execute(vm, cpu)
        finally:
            watch.stepping = False
        if not restores_flags or why is not Why.INTERRUPT:
            registers.flags &= ~r.FLAG_TF | guests
    # The emulator derives from flags set from outside what an instruction that loads them leaves.
    registers.flags = registers.flags
    software = registers.d[EXCEPTION_IS_INT]
    if why is Why.INTERRUPT and watch.vector == DB and not software:
        registers.set_debug(6, before)
        if guests:
            trap(cpu)
        cpu.stepped = cpu.steps
        return Why.NOTHING
    return why
