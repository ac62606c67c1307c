"""The registers of a vCPU, in and out of the engine.

Between runs KVM's registers are the ones that count; they are compared with what the engine left,
and only what user space changed goes in. Debug registers and the bus lock #DB are
``kvmsim.kvm.debug``'s: what it says was delivered is injected into the guest at the next entry.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import BP, DB, NMI, OF, Event
from kvmsim.kvm import debug, events, lbr, sregs

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.kvm.sregs import Sregs
    from kvmsim.kvm.vcpu import Vcpu

#: Numbers of the general registers in the order of ``kvm_regs``; RIP and RFLAGS follow.
_ORDER = (r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RSP, r.RBP, *range(8, 16))
_REGS = struct.Struct("<18Q")
_SEGMENTS = {
    "es": r.ES,
    "cs": r.CS,
    "ss": r.SS,
    "ds": r.DS,
    "fs": r.FS,
    "gs": r.GS,
    "tr": r.TR,
    "ldt": r.LDTR,
}
_TABLES = {"gdt": r.GDTR, "idt": r.IDTR}
#: Where the parts of ``kvm_segment`` are in the access rights: name, shift, bits.
_RIGHTS = (
    *(("type", 8, 4), ("s", 12, 1), ("dpl", 13, 2), ("present", 15, 1)),
    *(("avl", 20, 1), ("l", 21, 1), ("db", 22, 1), ("g", 23, 1)),
)
#: Segments, tables and control registers in the engine's state.
_SYSTEM_BEGIN, _SYSTEM_END = r.SEGMENTS, 608


class VcpuRegisters:
    """The registers of one vCPU, in and out of the engine.

    Args:
        vcpu: the vCPU.
    """

    __slots__ = ("_debug", "_delivered", "_regs", "_sregs", "_system", "_vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._regs = self._sregs = self._system = b""
        self._debug: tuple[int, ...] = ()
        self._delivered = 0

    def load(self, cpu: Cpu) -> None:
        """See ``RegisterFile``."""
        vcpu, registers = self._vcpu, cpu.registers
        special = sregs.of(vcpu)
        if bytes(special.data) != self._sregs:
            _load_special(special, cpu)
            self._sregs = bytes(special.data)
        regs = vcpu.get_regs()
        if regs != self._regs:
            *general, rip, flags = _REGS.unpack(regs)
            for number, value in zip(_ORDER, general, strict=True):
                registers.q[number] = value
            registers.rip, registers.flags = rip, flags
        cpu.lbr = lbr.recording(vcpu)
        cpu.cr8 = vcpu.cr8
        cpu.wants_window = bool(vcpu.run.request_interrupt_window)
        self._load_debug(cpu)

    def _load_debug(self, cpu: Cpu) -> None:
        state = self._vcpu.debug
        if state is None:
            return
        values = (*state.dr, state.dr6, state.dr7)
        if values != self._debug:
            for number, value in zip((0, 1, 2, 3, 6, 7), values, strict=True):
                cpu.registers.set_debug(number, value)
        if state.delivered != self._delivered:
            self._delivered = state.delivered
            cpu.queue(Event(DB))

    def deliver(self, cpu: Cpu) -> None:
        """See ``RegisterFile``. A #DB goes by way of the debug state."""
        state = events.of(self._vcpu)
        exception = state.exception
        if (exception.pending or exception.injected) and exception.vector != DB:
            software = exception.vector in {BP, OF}
            cpu.queue(Event(exception.vector, exception.error_code or 0, software=software))
        if state.nmi_injected or state.nmi_pending:
            cpu.queue(Event(NMI, external=True))
        if state.interrupt is not None:
            cpu.interrupt = state.interrupt

    def store(self, cpu: Cpu) -> None:
        """See ``RegisterFile``."""
        vcpu, registers = self._vcpu, cpu.registers
        q = registers.q
        self._regs = _REGS.pack(*(q[n] for n in _ORDER), registers.rip, registers.flags)
        vcpu.set_regs(self._regs)
        vcpu.cr8 = cpu.cr8
        system = bytes(registers.env[_SYSTEM_BEGIN:_SYSTEM_END])
        if system != self._system:
            self._system = system
            special = sregs.of(vcpu)
            _store_special(special, cpu)
            self._sregs = bytes(special.data)
        state = vcpu.debug
        values = tuple(registers.debug(number) for number in (0, 1, 2, 3, 6, 7))
        if values != self._debug:
            self._debug = values
            state = debug.of(vcpu) if state is None else state
            state.dr, state.dr6, state.dr7 = list(values[:4]), values[4], values[5]


def _load_special(special: Sregs, cpu: Cpu) -> None:
    registers, get = cpu.registers, special.get
    for name, number in _SEGMENTS.items():
        rights = sum(get(f"{name}.{part}") << shift for part, shift, _ in _RIGHTS)
        rights = 0 if get(f"{name}.unusable") else rights
        selector, base, limit = (get(f"{name}.{part}") for part in ("selector", "base", "limit"))
        registers.set_segment(number, r.Segment(selector, base, limit, rights))
    for name, number in _TABLES.items():
        registers.set_segment(number, r.Segment(0, get(f"{name}.base"), get(f"{name}.limit")))
    registers.cr2, registers.cr3 = get("cr2"), get("cr3")
    registers.cr4, registers.efer, registers.cr0 = get("cr4"), get("efer"), get("cr0")
    cpu.changed()


def _store_special(special: Sregs, cpu: Cpu) -> None:
    registers, put = cpu.registers, special.put
    for name, number in _SEGMENTS.items():
        segment = registers.segment(number)
        put(f"{name}.selector", segment.selector)
        put(f"{name}.base", segment.base)
        put(f"{name}.limit", segment.limit)
        for part, shift, bits in _RIGHTS:
            put(f"{name}.{part}", segment.rights >> shift & (1 << bits) - 1)
        put(f"{name}.unusable", int(not segment.rights & r.RIGHTS_P))
    for name, number in _TABLES.items():
        table = registers.segment(number)
        put(f"{name}.base", table.base)
        put(f"{name}.limit", table.limit)
    for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
        put(name, getattr(registers, name))
