"""Execution instruction by instruction.

It is needed for a debugger in user space that steps, for breakpoints on data, for the instruction
at which the guest returns with RF set while there are breakpoints on code, for alignment checks
(CR0.AM, EFLAGS.AC, CPL 3), and on the way to an instruction the emulator cannot translate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import breakpoints, decode, exits, stepping
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.backend import ACCESS_FETCHES
from kvmsim.engine.x86.delivery import AC, DB, Event
from kvmsim.engine.x86.stepping import EXCEPTION_IS_INT, LOADS_FLAGS
from kvmsim.engine.x86.watch import Why

if TYPE_CHECKING:
    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.vm import X86Vm

#: What one instruction costs here, in bytes of code.
STEP_BYTES = 400
PUSHF = 0x9C


def is_needed(cpu: Cpu) -> bool:
    """Whether a vCPU is to be executed instruction by instruction."""
    if cpu.creeps or cpu.cautious or cpu.steps or cpu.registers.checks_alignment:
        return True
    if not breakpoints.armed(cpu):
        return False
    return bool(cpu.registers.flags & r.FLAG_RF) or breakpoints.watches_data(cpu)


def step(vm: X86Vm, cpu: Cpu) -> Stop | None:
    """Execute one instruction; None: the guest goes on."""
    watch, registers = vm.watch, cpu.registers
    vm.meter.charge(STEP_BYTES)
    at = registers.linear_rip
    if breakpoints.armed(cpu) and not registers.flags & r.FLAG_RF:
        payload = breakpoints.code_payload(cpu, at)
        if payload:
            return breakpoints.raise_db(cpu, payload, fault=True)
    aligned = registers.checks_alignment
    vm.accesses.watch(breakpoints.places(cpu), aligned=aligned)
    found = decode.decode(watch.read_code(at, decode.MAX_LENGTH), 0, registers.mode)
    opcode = 0 if found is None else found.opcode
    before = bytes(registers.env)
    why = _execute(vm, cpu, opcode)
    if vm.accesses.misaligned or (aligned and why is Why.ACCESS and _is_misaligned(vm)):
        registers.env[:] = before
        vm.accesses.undo()
        watch.take(cpu)
        cpu.queue(Event(AC))
        return None
    taken = watch.take(cpu)
    if why is Why.NOTHING and taken is None and vm.unicorn.gave_up():
        return exits.gave_up(vm, cpu)
    cpu.creeps = max(0, cpu.creeps - 1)
    if why is Why.INTERRUPT and watch.vector == DB and not registers.d[EXCEPTION_IS_INT]:
        exits.completed(cpu, vm.accesses.hits, stepped=bool(before_flags(before) & r.FLAG_TF))
        cpu.cautious = False
        return taken
    if taken is not None or why in {Why.NEW_SITES, Why.NOTHING}:
        return taken
    stop = exits.handle(vm, cpu, why)
    cpu.cautious = False
    return stop


def _is_misaligned(vm: X86Vm) -> bool:
    """Whether the access to no memory that stopped the emulator was not aligned."""
    assert vm.watch.access is not None
    kind, gpa, size, _value = vm.watch.access
    return kind not in ACCESS_FETCHES and bool(gpa & (size - 1))


def before_flags(env: bytes) -> int:
    """EFLAGS of a saved state, TF among them."""
    return int.from_bytes(env[136:144], "little")


def _execute(vm: X86Vm, cpu: Cpu, opcode: int) -> Why:
    """Let the emulator execute one instruction with TF set, unseen by the guest."""
    registers = cpu.registers
    guests, status = registers.flags & r.FLAG_TF, registers.debug(6)
    registers.flags |= r.FLAG_TF
    why = stepping.execute(vm, cpu)
    registers.set_debug(6, status)
    done = why is Why.INTERRUPT and vm.watch.vector == DB
    if not done or opcode not in LOADS_FLAGS:
        registers.flags = registers.flags & ~r.FLAG_TF | guests
    if done and opcode == PUSHF and not guests:
        _hide_trap_flag(cpu)
    return why


def _hide_trap_flag(cpu: Cpu) -> None:
    """PUSHF stored a TF that is not the guest's."""
    registers = cpu.registers
    wide = registers.mode == 64 or registers.segment(r.SS).rights & r.RIGHTS_DB
    pointer = registers.q[r.RSP] & (r.U64 if registers.mode == 64 else r.U32 if wide else 0xFFFF)
    at = cpu.linear_address(r.SS, pointer) + 1
    cpu.linear.write(at, bytes([cpu.linear.read(at, 1)[0] & ~1]), user=registers.cpl == 3)
