"""All of a vCPU that the guest can see, taken at a stop and put into the same or another VM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsim.engine.x86.paging import Mtrrs

if TYPE_CHECKING:
    from kvmsim.engine.x86 import registers as r
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.delivery import Event

MSRS = (
    *(0x174, 0x175, 0x176, 0x277, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084),
    *(0xC0000102, 0xC0000103),
)
#: x87 stack, control and status, MXCSR, and what the emulator derives from them.
_FPU_BEGIN, _FPU_END = 604, 824


@dataclass(frozen=True, slots=True)
class CpuState:
    """The state of one vCPU.

    Attributes:
        general: RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
        rip: instruction pointer.
        flags: RFLAGS.
        segments: ES CS SS DS FS GS LDTR TR GDTR IDTR.
        control: CR0, CR2, CR3, CR4, CR8.
        efer: EFER.
        debug: DR0 to DR7.
        xmm: XMM0 to XMM15, 16 bytes each.
        fpu: x87 state and MXCSR, in the emulator's layout.
        msrs: values of ``MSRS``, in that order.
        mtrr_default: MTRR default type.
        mtrr_fixed: fixed-range MTRRs.
        mtrr_variable: (base, mask) pairs.
        xcr0: enabled extended state.
        tsc: time stamp counter.
        shadow: interrupts are held off for one instruction.
        events: what waits for delivery.
        traps: see ``Cpu.traps``.
        nmi_masked: see ``Cpu.nmi_masked``.
        interrupt: see ``Cpu.interrupt``.
        admitted: see ``Cpu.admitted``.
    """

    general: tuple[int, ...]
    rip: int
    flags: int
    segments: tuple[r.Segment, ...]
    control: tuple[int, int, int, int, int]
    efer: int
    debug: tuple[int, ...]
    xmm: tuple[bytes, ...]
    fpu: bytes
    msrs: tuple[int, ...]
    mtrr_default: int
    mtrr_fixed: tuple[int, ...]
    mtrr_variable: tuple[tuple[int, int], ...]
    xcr0: int
    tsc: int
    shadow: bool
    events: tuple[Event, ...]
    traps: int
    nmi_masked: bool
    interrupt: int | None
    admitted: int


def save(cpu: Cpu) -> CpuState:
    """Take the state of a vCPU whose last stop is completed.

    Raises:
        RuntimeError: it is not: half an instruction cannot be moved.
    """
    if cpu.pending or cpu.stops:
        msg = "the last stop was not completed"
        raise RuntimeError(msg)
    registers, mtrrs = cpu.registers, cpu.mtrrs
    return CpuState(
        general=tuple(registers.q[:16]),
        rip=registers.rip,
        flags=registers.flags,
        segments=tuple(registers.segment(number) for number in range(10)),
        control=(registers.cr0, registers.cr2, registers.cr3, registers.cr4, cpu.cr8),
        efer=registers.efer,
        debug=tuple(registers.debug(number) for number in range(8)),
        xmm=tuple(registers.xmm(number) for number in range(16)),
        fpu=bytes(registers.env[_FPU_BEGIN:_FPU_END]),
        msrs=tuple(registers.msr(index) or 0 for index in MSRS),
        mtrr_default=mtrrs.default,
        mtrr_fixed=tuple(mtrrs.fixed),
        mtrr_variable=tuple(mtrrs.variable),
        xcr0=cpu.xcr0,
        tsc=cpu.tsc,
        shadow=registers.shadow,
        events=tuple(cpu.events),
        traps=cpu.traps,
        nmi_masked=cpu.nmi_masked,
        interrupt=cpu.interrupt,
        admitted=cpu.admitted,
    )


def restore(cpu: Cpu, state: CpuState) -> None:
    """Put a state into a vCPU; what it was doing is gone."""
    registers = cpu.registers
    for number, value in enumerate(state.general):
        registers.q[number] = value
    registers.rip = state.rip
    cr0, registers.cr2, registers.cr3, registers.cr4, cpu.cr8 = state.control
    registers.efer = state.efer
    registers.cr0 = cr0
    for number, segment in enumerate(state.segments):
        registers.set_segment(number, segment)
    registers.flags = state.flags
    for number, value in enumerate(state.debug):
        registers.set_debug(number, value)
    for number, content in enumerate(state.xmm):
        registers.set_xmm(number, content)
    registers.env[_FPU_BEGIN:_FPU_END] = state.fpu
    for index, value in zip(MSRS, state.msrs, strict=True):
        registers.set_msr(index, value)
    cpu.mtrrs = Mtrrs(state.mtrr_default, list(state.mtrr_fixed), list(state.mtrr_variable))
    cpu.xcr0 = state.xcr0
    cpu.tsc = state.tsc
    registers.shadow = state.shadow
    cpu.abandon()
    cpu.events[:] = state.events
    cpu.traps, cpu.nmi_masked = state.traps, state.nmi_masked
    cpu.interrupt = state.interrupt
    cpu.admitted = state.admitted
    cpu.changed()
