"""What the end of an execution means: an exception for the guest, or a stop for KVM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.base import Debug, Hlt, InKernel, InternalError, Io, SplitLockAc
from kvmsim.engine.x86 import (
    breakpoints,
    decode,
    delivery,
    faults,
    instructions,
    mmio,
    sites,
    stepping,
    xsave,
)
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.backend import ACCESS_FETCHES
from kvmsim.engine.x86.delivery import AC, BP, DB, GP, PF, UD, Event, Fault
from kvmsim.engine.x86.sites import Kind
from kvmsim.engine.x86.stepping import EXCEPTION_IS_INT, trap
from kvmsim.engine.x86.watch import INTERRUPT, LOCK, NEW_SITES, NOTHING, Why

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.sites import Site
    from kvmsim.engine.x86.vm import X86Vm

INT1, IRET, STI, SYSCALL, SYSENTER, WRMSR = 0xF1, 0xCF, 0xFB, 0x0F05, 0x0F34, 0x0F30
#: What an exception, or an instruction the engine executes, costs, in bytes of code.
EXIT_BYTES = 400
#: More instructions than the emulator translates at a time.
BLOCK_INSTRUCTIONS = 512
PAGE = 4096
#: Ends without a reason at one instruction, after which there is no sense in trying again.
MOST_ASTRAY = 1000
#: ``kvm_run.emulation_failure``: suberror and flag (kvm.h).
EMULATION_FAILED, HAS_INSTRUCTION_BYTES = 1, 1

#: RDTSC and MOV DR (which only read what KVM has), SYSRET, SYSENTER, INVD, WBINVD, XSAVE and its
#: like; XGETBV and RDTSCP. SYSCALL of 32-bit code is different on each vendor's processors.
_ALONE = frozenset({0x0F31, 0x0F21, 0x0F23, 0x0F07, SYSENTER, 0x0F08, 0x0F09, xsave.OPCODE})
_EFLAGS = r.EFLAGS // 8
# Every exit comes by here, and to look a member up takes Python 3.11 some 50 ns.
SITE, SENSITIVE = Why.SITE, Kind.SENSITIVE
EXTENDED, _ALONE_EXTENDED = 0x0F01, frozenset({0xD0, 0xF9})


def ended(vm: X86Vm, cpu: Cpu, why: Why, status: int) -> Stop | None:
    """What the end of an execution means, bus lock taken or not; None: the guest goes on."""
    taken = vm.watch.take(cpu)
    if taken is not None:
        if why is Why.INTERRUPT and vm.watch.vector == DB:
            trap(cpu)  # it would not come again
        return taken
    if why is NOTHING:
        if vm.meter.expired():
            return None
        if vm.unicorn.gave_up():
            return gave_up(vm, cpu)
        # HLT is a site and never gets here.
        return _astray(cpu, status)
    return handle(vm, cpu, why)


def _astray(cpu: Cpu, status: int) -> InternalError | None:
    """The emulator ended and nobody knows why; the guest goes on if it does so now and then."""
    at = cpu.registers.linear_rip
    last, times = cpu.astray
    times = times + 1 if at == last else 1
    if status or times > MOST_ASTRAY:
        cpu.astray = (-1, 0)
        return InternalError(suberror=EMULATION_FAILED, data=(0, status, at))
    cpu.astray = (at, times)
    return None


def needs_nobody(site: Site | None) -> bool:
    """Whether a site is executed without KVM, so that any thread may."""
    if site is None or site.found is None:
        return False
    if site.kind in {Kind.WINDOW, Kind.UNDEFINED}:
        return True
    found = site.found
    if found.opcode == EXTENDED:
        return found.modrm in _ALONE_EXTENDED
    if found.opcode == SYSCALL:
        return site.mode == 64
    return site.kind is Kind.SENSITIVE and (found.opcode in _ALONE or found.opcode >= decode.VEX)


def gave_up(vm: X86Vm, cpu: Cpu) -> Stop | None:
    """The emulator cannot translate some instruction ahead; get there one by one.

    LOCK before BTS, BTR or BTC of a register is one (Unicorn issue 2358), and the only one that is
    known to be no valid instruction.
    """
    for ahead, kind in enumerate(_kinds_ahead(vm, cpu)):
        if kind is Kind.UNDEFINED and ahead:
            cpu.creeps = ahead
            return None
        if kind is Kind.UNDEFINED:
            cpu.queue(Event(UD))
            return None
    if cpu.creeps:
        cpu.creeps = 0
        return emulation_failed(vm, cpu)
    cpu.creeps = BLOCK_INSTRUCTIONS
    return None


def _kinds_ahead(vm: X86Vm, cpu: Cpu) -> Iterator[Kind | None]:
    """What is of interest in the code ahead, instruction by instruction."""
    registers = cpu.registers
    code = vm.watch.read_code(registers.linear_rip, PAGE)
    at = 0
    while (found := decode.decode(code, at, registers.mode)) is not None:
        yield sites.kind_of(found)
        at += found.length


def emulation_failed(vm: X86Vm, cpu: Cpu) -> InternalError:
    """KVM's report of an instruction it cannot emulate, with its bytes (Linux 6.12 x86.c)."""
    code = vm.watch.read_code(cpu.registers.linear_rip, decode.MAX_LENGTH)
    shown = bytes([len(code)]) + code.ljust(decode.MAX_LENGTH, b"\0")
    words = (int.from_bytes(shown[at : at + 8], "little") for at in (0, 8))
    return InternalError(suberror=EMULATION_FAILED, data=(HAS_INSTRUCTION_BYTES, *words))


def handle(vm: X86Vm, cpu: Cpu, why: Why) -> Stop | None:
    """What an end of execution means; None: the guest goes on."""
    if why is not NEW_SITES:
        vm.meter.charge(EXIT_BYTES)
    if why is LOCK:
        site = vm.watch.site
        assert site is not None
        cpu.admitted = site.address
        stop = cpu.bus_lock
        stop.bus_lock = False
        return stop
    if why is SITE:
        return _at_site(vm, cpu)
    if why is INTERRUPT:
        return _interrupted(vm, cpu)
    if why is Why.BREAKPOINT:
        payload = breakpoints.code_payload(cpu, cpu.registers.linear_rip)
        return breakpoints.raise_db(cpu, payload, fault=True)
    if why is Why.INVALID:
        cpu.queue(Event(UD))
    elif why is Why.ACCESS:
        return _no_memory(vm, cpu)
    return None


def _no_memory(vm: X86Vm, cpu: Cpu) -> Stop | None:
    if not cpu.cautious and _fetched_ahead(vm, cpu):
        cpu.cautious = True
        return None
    stop = mmio.stopped(vm, cpu)
    if vm.watch.fell_short and vm.policy.fault_like:
        vm.watch.admitted(cpu)
    elif vm.watch.fell_short:
        # Locked before it turned out that nothing answers: the lock rides on the exit.
        stop.bus_lock = True
        cpu.bus_locks += 1
    return stop


def _fetched_ahead(vm: X86Vm, cpu: Cpu) -> bool:
    """Whether code was missing further on in a block only: the instruction at RIP is all there."""
    assert vm.watch.access is not None
    if vm.watch.access[0] not in ACCESS_FETCHES:
        return False
    code = vm.watch.read_code(cpu.registers.linear_rip, decode.MAX_LENGTH)
    return decode.decode(code, 0, cpu.registers.mode) is not None


def _at_site(vm: X86Vm, cpu: Cpu) -> Stop | None:
    site = vm.watch.site
    assert site is not None
    assert site.found is not None
    kind = site.kind
    if kind is SENSITIVE:
        return _execute_site(vm, cpu, site)
    return _at_other_site(vm, cpu, site)


def _at_other_site(vm: X86Vm, cpu: Cpu, site: Site) -> Stop | None:
    assert site.found is not None
    kind = site.kind
    if kind is Kind.UNDEFINED:
        cpu.queue(Event(UD))
    elif kind in {Kind.MAPPING, Kind.SYSTEM_STATE}:
        cpu.queue(Event(GP))
    elif kind is Kind.LOCK:
        if not vm.policy.split_lock_ac:
            return SplitLockAc(cpl=cpu.registers.cpl)
        cpu.queue(Event(AC))
    elif kind is Kind.WINDOW:
        why = stepping.single(vm, cpu, restores_flags=site.found.opcode != STI)
        if why is not Why.NOTHING:
            return handle(vm, cpu, why)
        if site.found.opcode == IRET and cpu.nmi_masked:
            cpu.nmi_masked = False
            return InKernel()  # another one may wait in KVM
        return _pass_shadow(vm, cpu)
    else:
        return _execute_site(vm, cpu, site)
    return None


def _pass_shadow(vm: X86Vm, cpu: Cpu) -> Stop | None:
    """Execute the one instruction behind STI, so that an interrupt is looked at right after it.

    Guests keep interrupts on for two instructions at a time: STI, RET and soon CLI. One at which
    the guest stops anyway is left alone.
    """
    registers = cpu.registers
    waits = cpu.interrupt is not None or cpu.wants_window
    if not waits or not registers.shadow or not registers.flags & r.FLAG_IF:
        return None
    if cpu.steps or cpu.stepped or cpu.traps:
        return None
    code = vm.watch.read_code(registers.linear_rip, decode.MAX_LENGTH)
    found = decode.decode(code, 0, registers.mode)
    if found is None or sites.kind_of(found) is not None:
        return None
    why = stepping.single(vm, cpu)
    return None if why is Why.NOTHING else handle(vm, cpu, why)


def _execute_site(vm: X86Vm, cpu: Cpu, site: Site) -> Stop | None:
    assert site.found is not None
    if site.found.locked:
        cpu.queue(Event(UD))
        return None
    registers = cpu.registers
    # INT1 raises its own #DB, which clears TF: none comes behind it (SDM volume 3, 18.3.1.4).
    stepped = bool(registers.q[_EFLAGS] & r.FLAG_TF) and site.found.opcode != INT1
    at = registers.linear_rip
    try:
        stop = instructions.execute(cpu, site.found)
    except Fault as fault:
        return raise_fault(cpu, fault)
    if site.found.opcode in {SYSCALL, SYSENTER}:
        vm.branches.far(at, registers.linear_rip)
    elif site.found.opcode == WRMSR:
        vm.branches.watch(cpu)
    hits = 0
    if isinstance(stop, Io) and breakpoints.armed(cpu):
        hits = breakpoints.port_payload(cpu, stop.port, stop.size)
    completed(cpu, hits, stepped=stepped)
    # Linux 6.12 x86.c kvm_emulate_halt: HLT goes before the exit to a debugger that steps.
    cpu.stepped = cpu.stepped and not isinstance(stop, Hlt)
    return stop


def completed(cpu: Cpu, hits: int, *, stepped: bool) -> None:
    """An instruction is done, or will be when user space has answered: is a #DB due?

    Args:
        cpu: whose.
        hits: bits of the breakpoints it met.
        stepped: TF was set when it began.
    """
    payload = hits | (breakpoints.DR6_BS if stepped else 0)
    if cpu.pending:
        cpu.owe_trap(payload)
    else:
        cpu.traps |= payload
        cpu.stepped = cpu.steps


def raise_fault(cpu: Cpu, fault: Fault) -> Stop | None:
    """Queue the exception of an instruction the engine executed; a stop if it is a debugger's."""
    if fault.vector == DB:
        return breakpoints.raise_db(cpu, fault.code, fault=True)
    if fault.address is not None:
        cpu.registers.cr2 = fault.address
    cpu.queue(Event(fault.vector, fault.code))
    return None


def _interrupted(vm: X86Vm, cpu: Cpu) -> Stop | None:
    """An exception, or INT n with RIP behind it already."""
    vector, registers = vm.watch.vector, cpu.registers
    software = bool(registers.d[EXCEPTION_IS_INT])
    if vector == DB and not software:
        trap(cpu)
        return None
    code = registers.error_code if vector in delivery.WITH_CODE and not software else 0
    length = _int_length(vm, cpu, vector) if software else 0
    if vector in {GP, PF} and not software:
        here = vm.watch.read_code(registers.linear_rip, decode.MAX_LENGTH)
        found = decode.decode(here, 0, registers.mode)
        vector, code = faults.corrected(cpu, vector, code, found)
        if found is not None:
            vm.watch.flags_computed(registers, found)
    if vector == BP and length == 1 and cpu.debugger is not None and cpu.debugger.int3:
        registers.rip -= length
        return Debug(exception=BP, pc=registers.linear_rip)
    cpu.queue(Event(vector, code, software=software, length=length))
    return None


def _int_length(vm: X86Vm, cpu: Cpu, vector: int) -> int:
    """Bytes of the INT3, INTO or INT n just behind which RIP is."""
    last = vm.watch.read_code(cpu.registers.linear_rip - 1, 1)
    return 1 if (last, vector) in {(b"\xcc", delivery.BP), (b"\xce", delivery.OF)} else 2
