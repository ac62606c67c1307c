"""Guest debugging: single steps that user space asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.base import Debug
from kvmsim.engine.x86 import exits
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import DB
from kvmsim.engine.x86.stepping import DR6_BS
from kvmsim.engine.x86.watch import Why

if TYPE_CHECKING:
    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.vm import X86Vm


def step(vm: X86Vm, cpu: Cpu) -> Stop | None:
    """Execute one instruction for a debugger in user space: it gets the #DB, not the guest."""
    watch, registers = vm.watch, cpu.registers
    before, guests = registers.debug(6), registers.flags & r.FLAG_TF
    registers.flags |= r.FLAG_TF
    why, _status = watch.execute(cpu)
    registers.flags &= ~r.FLAG_TF | guests
    taken = watch.take(cpu)
    over = Debug(exception=DB, dr6=DR6_BS, dr7=registers.debug(7))
    if why is Why.INTERRUPT and watch.vector == DB:
        registers.set_debug(6, before)
        if taken is not None:
            cpu.stops.append(over)
        return taken or over
    if taken is not None or why in {Why.NEW_SITES, Why.NOTHING}:
        return taken
    at = registers.rip
    stop = exits.handle(vm, cpu, why)
    return over if stop is None and why is Why.SITE and registers.rip != at else stop
