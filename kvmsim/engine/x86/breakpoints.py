"""Hardware breakpoints: the guest's own debug registers, or a debugger's in their place.

A breakpoint on code is a hook at its address and costs nothing elsewhere. One on data makes the
vCPU execute instruction by instruction (``debugger``) while a hook over the physical memory behind
it takes notes: the emulator cannot stop behind an access by itself. A hook knows physical addresses
only, so that an access through another mapping of the same memory hits too.

A #DB that is a trap waits in ``Cpu.traps`` as its payload, every bit active high, and is delivered
before the next instruction.

Sources: Intel SDM volume 3, 17.2 (DR7, DR6) and 17.3.1 (which are faults, which traps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsim.engine.base import Debug
from kvmsim.engine.x86.delivery import DB, Event
from kvmsim.engine.x86.paging import PageFault, locate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu

CODE, WRITE, PORT, ACCESS = range(4)
CR4_DE = 1 << 3
DR7_ENABLED = 0xFF
DR7_GD = 1 << 13
DR6_BD, DR6_BS = 1 << 13, 1 << 14
PAGE = 4096
_SIZES = (1, 2, 8, 4)

_ACTIVE_LOW, _FIXED_1, _RTM = 0xFFFF_0FF0, 0xFFFE_07F0, 1 << 16


def dr6_after(dr6: int, payload: int) -> int:
    """What DR6 holds after a #DB with this payload was delivered (kvm.md B.1).

    Args:
        dr6: before.
        payload: the cause, every bit active high.
    """
    dr6 = (dr6 & ~0xF) | _RTM
    dr6 &= ~(payload & _ACTIVE_LOW)
    dr6 |= payload & ~_ACTIVE_LOW
    return (dr6 & ~(1 << 12)) | _FIXED_1


@dataclass(frozen=True, slots=True)
class Debugger:
    """What a debugger in user space wants of a vCPU (KVM_SET_GUEST_DEBUG).

    Attributes:
        single_step: a #DB behind every instruction.
        int3: INT3 is its, not the guest's.
        registers: DR0 to DR3 and DR7 that count instead of the guest's; None: the guest's do.
        blocks_interrupts: none is delivered while it watches.
    """

    single_step: bool = False
    int3: bool = False
    registers: tuple[int, int, int, int, int] | None = None
    blocks_interrupts: bool = False

    @property
    def takes_debug_exceptions(self) -> bool:
        """Whether every #DB is its (Linux 6.12 vmx.c, ``handle_exception_nmi``)."""
        return self.single_step or self.registers is not None


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """One enabled breakpoint.

    Attributes:
        bit: its bit in DR6.
        kind: ``CODE``, ``WRITE``, ``PORT`` or ``ACCESS``.
        address: linear, or a port.
        size: bytes.
    """

    bit: int
    kind: int
    address: int
    size: int

    def meets(self, address: int, size: int) -> bool:
        """Whether an access touches it."""
        return address < self.address + self.size and self.address < address + size


def registers_of(cpu: Cpu) -> tuple[int, int, int, int, int]:
    """DR0 to DR3 and DR7 that count at this moment."""
    debugger = cpu.debugger
    if debugger is not None and debugger.registers is not None:
        return debugger.registers
    get = cpu.registers.debug
    return get(0), get(1), get(2), get(3), get(7)


def armed(cpu: Cpu) -> bool:
    """Whether any breakpoint is enabled."""
    debugger = cpu.debugger
    if debugger is not None and debugger.registers is not None:
        return bool(debugger.registers[4] & DR7_ENABLED)
    return bool(cpu.registers.debug(7) & DR7_ENABLED)


def enabled(cpu: Cpu) -> Iterator[Breakpoint]:
    """The breakpoints that are enabled, globally or locally."""
    *addresses, control = registers_of(cpu)
    for number, address in enumerate(addresses):
        if not control >> 2 * number & 3:
            continue
        kind = control >> 16 + 4 * number & 3
        size = _SIZES[control >> 18 + 4 * number & 3]
        if kind == PORT and not cpu.registers.cr4 & CR4_DE:
            continue
        # The processor ignores the low bits of an address that the size does not allow.
        yield Breakpoint(1 << number, kind, address & -size if kind else address, size)


def code_addresses(cpu: Cpu) -> frozenset[int]:
    """Linear addresses of breakpoints on code."""
    return frozenset(point.address for point in enabled(cpu) if point.kind == CODE)


def code_payload(cpu: Cpu, linear: int) -> int:
    """Bits of the code breakpoints at an address."""
    return sum(p.bit for p in enabled(cpu) if p.kind == CODE and p.address == linear)


def port_payload(cpu: Cpu, port: int, size: int) -> int:
    """Bits of the breakpoints on ports that an access touches."""
    return sum(p.bit for p in enabled(cpu) if p.kind == PORT and p.meets(port, size))


def watches_data(cpu: Cpu) -> bool:
    """Whether there is a breakpoint on memory."""
    return any(point.kind in {WRITE, ACCESS} for point in enabled(cpu))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data breakpoint is in guest-physical memory.

    Attributes:
        bit: see ``Breakpoint``.
        gpa: guest-physical address.
        size: bytes.
        reads: reading hits, too.
    """

    bit: int
    gpa: int
    size: int
    reads: bool


def places(cpu: Cpu) -> tuple[Place, ...]:
    """Where the memory behind the data breakpoints is; what is not mapped is left out."""
    found = []
    for point in enabled(cpu):
        if point.kind not in {WRITE, ACCESS}:
            continue
        try:
            gpa = locate(cpu.registers, cpu.memory, point.address)
        except PageFault:
            continue
        found.append(Place(point.bit, gpa, point.size, point.kind == ACCESS))
    return tuple(found)


def take(cpu: Cpu) -> int:
    """Payload of the traps that wait, which do no more; 0: there are none."""
    payload, cpu.traps = cpu.traps, 0
    if cpu.stepped and cpu.steps:
        payload |= DR6_BS
    cpu.stepped = False
    return payload


def deliver(cpu: Cpu) -> Stop | None:
    """The traps that wait arrive."""
    payload = take(cpu)
    return raise_db(cpu, payload) if payload else None


def raise_db(cpu: Cpu, payload: int, *, fault: bool = False) -> Stop | None:
    """A #DB: a stop if it is the debugger's, else an event for the guest.

    Args:
        cpu: whose.
        payload: the cause, active high.
        fault: RIP is at the instruction that caused it, and the guest returns to it with RF set.
    """
    debugger, registers = cpu.debugger, cpu.registers
    # Linux 6.12 vmx.c handle_dr: a mere single-stepper does not get what DR7.GD caught.
    detected = payload & DR6_BD
    takes = debugger is not None and debugger.takes_debug_exceptions
    if detected:
        takes = debugger is not None and debugger.registers is not None
    if takes:
        control = registers_of(cpu)[4]
        return Debug(exception=DB, dr6=payload, dr7=control, pc=registers.linear_rip)
    registers.set_debug(6, dr6_after(registers.debug(6), payload))
    registers.set_debug(7, registers.debug(7) & ~DR7_GD)
    cpu.queue(Event(DB, resumes=fault))
    return None
