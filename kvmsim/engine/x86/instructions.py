"""Instructions the engine executes itself, because the emulator below does not stop at them.

Each function gets the vCPU with RIP at the instruction. It returns None when the instruction is
done and RIP past it, or a stop; it raises ``Fault`` for an exception, with nothing changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.base import (
    Hlt,
    Hypercall,
    InKernel,
    Io,
    Rdmsr,
    SystemEvent,
    TprLowered,
    Wrmsr,
)
from kvmsim.engine.x86 import breakpoints, vex, xsave
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.decode import DS, NONE, VEX
from kvmsim.engine.x86.delivery import DB, GP, PF, UD, Event, Fault
from kvmsim.engine.x86.msr import read_msr, write_msr
from kvmsim.engine.x86.paging import PageFault, translate

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction

CR4_TSD, CR4_DE, CR4_PCE, CR4_OSXSAVE = 1 << 2, 1 << 3, 1 << 8, 1 << 18
EFER_SCE = 1
SYSRET_FLAGS = 0x3C_7FD7
#: "Auth", the beginning of AMD's name in leaf 0.
AMD_EBX = 0x6874_7541
IA32_MISC_FEATURES_ENABLES = 0x140
#: IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC's registers.
_LOCAL_APIC = frozenset({0x1B, 0x6E0, *range(0x800, 0x900)})
_FLAT_CODE = r.RIGHTS_G | r.RIGHTS_P | r.RIGHTS_S | 0xB << 8
_FLAT_DATA = r.RIGHTS_G | r.RIGHTS_DB | r.RIGHTS_P | r.RIGHTS_S | 3 << 8
#: Bytes that one exit for INS brings at most, and a page.
READ_AHEAD, PAGE_SIZE = 1024, 4096


def execute(cpu: Cpu, found: Instruction) -> Stop | None:
    """Execute one sensitive instruction.

    Raises:
        Fault: the guest gets an exception.
    """
    opcode = found.opcode
    if opcode >= VEX:
        vex.execute(cpu, found)
        return None
    if opcode == 0x0F01:
        return _EXTENDED[found.modrm](cpu, found)
    return _TABLE[opcode](cpu, found)


def _require_ring_0(cpu: Cpu) -> None:
    if cpu.registers.cpl:
        raise Fault(GP)


# -- ports -------------------------------------------------------------------------------------


def _check_port(cpu: Cpu, port: int, size: int) -> None:
    """I/O privilege and the permission bitmap of the task."""
    registers = cpu.registers
    if not registers.cr0 & 1:
        return
    flags = registers.flags
    level = flags >> r.FLAG_IOPL_SHIFT & 3
    virtual = bool(flags & r.FLAG_VM)
    if registers.cpl <= level and not virtual:
        return
    task = registers.segment(r.TR)
    if not task.rights & 1 << 11 or task.limit < 103:
        raise Fault(GP)
    at = cpu.linear.word(task.base + 102, 2) + port // 8
    if at + 1 > task.limit:
        raise Fault(GP)
    if cpu.linear.word(task.base + at, 2) >> port % 8 & (1 << size) - 1:
        raise Fault(GP)


def _port_size(found: Instruction) -> int:
    if not found.opcode & 1:
        return 1
    return 2 if found.bits == 16 else 4


def _in_out(cpu: Cpu, found: Instruction) -> Stop:
    size = _port_size(found)
    registers = cpu.registers
    port = found.immediate if found.opcode < 0xE8 else registers.q[r.RDX] & 0xFFFF
    _check_port(cpu, port, size)
    if found.opcode & 2:
        data = (registers.q[r.RAX] & (1 << 8 * size) - 1).to_bytes(size, "little")
        cpu.on_completion(lambda _data: registers.advance(found.length))
        return Io(port=port, size=size, data=data)

    def took(data: bytes) -> None:
        cpu.set_general(r.RAX, int.from_bytes(data[:size], "little"), size)
        registers.advance(found.length)

    cpu.on_completion(took)
    return Io(port=port, size=size)


def _string(cpu: Cpu, found: Instruction) -> Stop | None:
    """OUTS, one element at a time, and INS, a batch at a time; RIP moves with the last."""
    registers = cpu.registers
    size = _port_size(found)
    mask = (1 << found.address_bits) - 1
    if found.repeat and not registers.q[r.RCX] & mask:
        registers.advance(found.length)
        return None
    port = registers.q[r.RDX] & 0xFFFF
    _check_port(cpu, port, size)
    outwards = bool(found.opcode & 2)
    index = r.RSI if outwards else r.RDI
    number = r.ES if not outwards else DS if found.segment == NONE else found.segment
    user = registers.cpl == 3

    def place() -> int:
        return cpu.linear_address(number, registers.q[index] & mask)

    def done(elements: int = 1) -> None:
        step = -size if registers.flags & r.FLAG_DF else size * elements
        cpu.set_masked(index, registers.q[index] + step, found.address_bits)
        left = 0
        if found.repeat:
            cpu.set_masked(r.RCX, registers.q[r.RCX] - elements, found.address_bits)
            left = registers.q[r.RCX] & mask
        if not left:
            registers.advance(found.length)

    if outwards:
        data = cpu.linear.read(place(), size, user=user)
        cpu.on_completion(lambda _data: done())
        return Io(port=port, size=size, data=data)
    at = place()
    count = _nr_elements(cpu, found, at, size)
    # Faults come before the port is read: reading may have an effect.
    for page in {at, at + count * size - 1}:
        try:
            translate(registers, cpu.memory, page, write=True, user=user)
        except PageFault as fault:
            raise Fault(PF, fault.code, fault.address) from None

    def took(data: bytes) -> None:
        # User space may have changed the registers: what they ask for is what is stored.
        elements = _nr_elements(cpu, found, place(), size)
        cpu.linear.write(place(), data[: elements * size].ljust(elements * size, b"\0"), user=user)
        done(elements)

    cpu.on_completion(took)
    return Io(port=port, size=size, count=count)


def _nr_elements(cpu: Cpu, found: Instruction, at: int, size: int) -> int:
    """How many elements of INS one exit asks for: KVM reads ahead within a page.

    Linux 6.12 arch/x86/kvm/emulate.c pio_in_emulated; backwards it does not.
    """
    registers = cpu.registers
    if not found.repeat or registers.flags & r.FLAG_DF:
        return 1
    asked = registers.q[r.RCX] & (1 << found.address_bits) - 1
    return max(1, min(asked, READ_AHEAD // size, (PAGE_SIZE - at % PAGE_SIZE) // size))


# -- the rest --------------------------------------------------------------------------------------


def _hlt(cpu: Cpu, found: Instruction) -> Stop:
    _require_ring_0(cpu)
    cpu.registers.advance(found.length)
    return Hlt()


def _pause(cpu: Cpu, found: Instruction) -> Stop:
    """The guest waits for another vCPU (SDM volume 3, pause-loop exiting)."""
    cpu.registers.advance(found.length)
    cpu.yields = True
    return InKernel()


def _int1(cpu: Cpu, found: Instruction) -> Stop | None:
    cpu.registers.advance(found.length)
    return breakpoints.raise_db(cpu, 0)


def _cpuid(cpu: Cpu, found: Instruction) -> None:
    q = cpu.registers.q
    if cpu.registers.cpl and _cpuid_faults(cpu):
        raise Fault(GP)
    answer = cpu.policy.cpuid(cpu, q[r.RAX] & r.U32, q[r.RCX] & r.U32)
    for number, value in zip((r.RAX, r.RBX, r.RCX, r.RDX), answer, strict=True):
        q[number] = value & r.U32
    cpu.registers.advance(found.length)


def _cpuid_faults(cpu: Cpu) -> bool:
    value = cpu.policy.rdmsr(cpu, IA32_MISC_FEATURES_ENABLES)
    return isinstance(value, int) and bool(value & 1)


def _wide(cpu: Cpu, value: int) -> None:
    """EDX:EAX."""
    cpu.registers.q[r.RAX] = value & r.U32
    cpu.registers.q[r.RDX] = value >> 32 & r.U32


def _edx_eax(cpu: Cpu) -> int:
    q = cpu.registers.q
    return q[r.RAX] & r.U32 | (q[r.RDX] & r.U32) << 32


def _rdtsc(cpu: Cpu, found: Instruction) -> None:
    if cpu.registers.cr4 & CR4_TSD and cpu.registers.cpl:
        raise Fault(GP)
    _wide(cpu, cpu.policy.tsc(cpu))
    if found.opcode == 0x0F01:  # RDTSCP
        cpu.registers.q[r.RCX] = (cpu.registers.msr(0xC0000103) or 0) & r.U32
    cpu.registers.advance(found.length)


def _rdpmc(cpu: Cpu, found: Instruction) -> None:
    registers = cpu.registers
    if registers.cpl and not registers.cr4 & CR4_PCE:
        raise Fault(GP)
    value = cpu.policy.rdpmc(cpu, registers.q[r.RCX] & r.U32)
    if value is None:
        raise Fault(GP)
    _wide(cpu, value)
    registers.advance(found.length)


def _rdmsr(cpu: Cpu, found: Instruction) -> Stop | None:
    _require_ring_0(cpu)
    value = read_msr(cpu, cpu.registers.q[r.RCX] & r.U32)
    if value is None:
        raise Fault(GP)
    if isinstance(value, Rdmsr):
        cpu.on_completion(lambda data: _accessed(cpu, found, data))
        return value
    _wide(cpu, value)
    cpu.registers.advance(found.length)
    return None


def _wrmsr(cpu: Cpu, found: Instruction) -> Stop | None:
    _require_ring_0(cpu)
    index = cpu.registers.q[r.RCX] & r.U32
    written = write_msr(cpu, index, _edx_eax(cpu))
    if isinstance(written, Wrmsr):
        cpu.on_completion(lambda data: _accessed(cpu, found, data[:1]))
        return written
    if not written:
        raise Fault(GP)
    cpu.registers.advance(found.length)
    # Interrupts and timers may be others now: KVM looks before the guest goes on.
    return InKernel() if index in _LOCAL_APIC else None


def _accessed(cpu: Cpu, found: Instruction, data: bytes) -> None:
    """User space has carried out RDMSR or WRMSR: an error byte, then what was read."""
    if data[:1] != b"\0":
        cpu.queue(Event(GP))
        return
    if len(data) > 1:
        _wide(cpu, int.from_bytes(data[1:9], "little"))
    cpu.registers.advance(found.length)


def _nothing_in_ring_0(cpu: Cpu, found: Instruction) -> None:
    """INVD, WBINVD: there is no cache."""
    _require_ring_0(cpu)
    cpu.registers.advance(found.length)


def _monitor(cpu: Cpu, found: Instruction) -> None:
    """MONITOR, MWAIT: nothing, as in KVM."""
    if cpu.registers.cpl:
        raise Fault(UD)
    cpu.registers.advance(found.length)


def _hypercall(cpu: Cpu, found: Instruction) -> Stop | None:
    """VMCALL, VMMCALL: the policy's."""
    stop = cpu.policy.hypercall(cpu, found)
    if isinstance(stop, Hypercall):
        cpu.on_completion(lambda data: _called(cpu, found, data))
    elif stop is None or isinstance(stop, SystemEvent):
        cpu.registers.advance(found.length)
    return stop


def _called(cpu: Cpu, found: Instruction, data: bytes) -> None:
    """User space has carried out a hypercall."""
    wide = cpu.registers.mode == 64
    cpu.registers.q[r.RAX] = int.from_bytes(data[:8], "little") & (r.U64 if wide else r.U32)
    cpu.registers.advance(found.length)


def _xgetbv(cpu: Cpu, found: Instruction) -> None:
    if not cpu.registers.cr4 & CR4_OSXSAVE:
        raise Fault(UD)
    if cpu.registers.q[r.RCX] & r.U32:
        raise Fault(GP)
    _wide(cpu, cpu.xcr0)
    cpu.registers.advance(found.length)


def _xsetbv(cpu: Cpu, found: Instruction) -> None:
    if not cpu.registers.cr4 & CR4_OSXSAVE:
        raise Fault(UD)
    _require_ring_0(cpu)
    value = _edx_eax(cpu)
    bad = value & ~cpu.policy.xcr0(cpu) or not value & 1 or value & 6 == 4
    if cpu.registers.q[r.RCX] & r.U32 or bad:
        raise Fault(GP)
    cpu.xcr0 = value
    cpu.registers.advance(found.length)


def _mov_dr(cpu: Cpu, found: Instruction) -> None:
    registers = cpu.registers
    number = found.reg
    if number > 7 or (number in {4, 5} and registers.cr4 & CR4_DE):
        raise Fault(UD)
    _require_ring_0(cpu)
    if breakpoints.registers_of(cpu)[4] & breakpoints.DR7_GD:
        raise Fault(DB, breakpoints.DR6_BD)
    number += 2 if number in {4, 5} else 0
    mask = r.U64 if registers.mode == 64 else r.U32
    if found.opcode == 0x0F21:
        registers.q[found.rm] = registers.debug(number) & mask
    else:
        value = registers.q[found.rm] & mask
        if number >= 6 and value > r.U32:
            raise Fault(GP)
        if number == 6:
            value = cpu.policy.dr6_written(cpu, value)
        elif number == 7:
            value = value & 0xFFFF_2FFF | 1 << 10
        registers.set_debug(number, value)
    registers.advance(found.length)


def _mov_cr8(cpu: Cpu, found: Instruction) -> Stop | None:
    _require_ring_0(cpu)
    if found.opcode == 0x0F20:
        cpu.registers.q[found.rm] = cpu.cr8
        cpu.registers.advance(found.length)
        return None
    value = cpu.registers.q[found.rm]
    if value > 15:
        raise Fault(GP)
    before, cpu.cr8 = cpu.cr8, value
    cpu.registers.advance(found.length)
    if value < before and cpu.shows_tpr:
        return TprLowered()
    return InKernel() if value < cpu.tpr_threshold else None


def _syscall(cpu: Cpu, found: Instruction) -> None:
    """SYSCALL in long mode; in its 32-bit code Intel's processors have none, nor elsewhere."""
    registers = cpu.registers
    wide = registers.mode == 64
    if not registers.efer & EFER_SCE or not registers.long_mode:
        raise Fault(UD)
    if not wide and cpu.policy.cpuid(cpu, 0, 0)[1] != AMD_EBX:
        raise Fault(UD)
    star = registers.msr(0xC0000081) or 0
    flags = registers.flags
    registers.advance(found.length)
    registers.q[r.RCX] = registers.rip
    registers.q[11] = flags & ~r.FLAG_RF
    registers.rip = registers.msr(0xC0000082 if wide else 0xC0000083) or 0
    registers.flags = flags & ~(registers.msr(0xC0000084) or 0) & ~r.FLAG_RF | 2
    selector = star >> 32 & 0xFFFC
    registers.set_segment(r.CS, r.Segment(selector, 0, r.U32, _FLAT_CODE | r.RIGHTS_L))
    registers.set_segment(r.SS, r.Segment(selector + 8, 0, r.U32, _FLAT_DATA))


def _sysret(cpu: Cpu, found: Instruction) -> None:
    """SYSRET, out of 64-bit code only."""
    registers = cpu.registers
    if not registers.efer & EFER_SCE or registers.mode != 64:
        raise Fault(UD)
    _require_ring_0(cpu)
    wide, target = found.bits == 64, registers.q[r.RCX]
    if wide and target >> 47 not in {0, (1 << 17) - 1}:
        raise Fault(GP)
    base = (registers.msr(0xC0000081) or 0) >> 48
    user = 3 << 13
    code = _FLAT_CODE | user | (r.RIGHTS_L if wide else r.RIGHTS_DB)
    selector = (base + 16 if wide else base) | 3
    registers.set_segment(r.CS, r.Segment(selector & 0xFFFF, 0, r.U32, code))
    stack = r.Segment((base + 8 | 3) & 0xFFFF, 0, r.U32, _FLAT_DATA | user)
    registers.set_segment(r.SS, stack)
    registers.flags = registers.q[11] & SYSRET_FLAGS | 2
    registers.rip = target if wide else target & r.U32
    registers.shadow = False


def _sysenter(cpu: Cpu, found: Instruction) -> None:
    del found
    registers = cpu.registers
    selector = (registers.msr(0x174) or 0) & 0xFFFC
    if not registers.cr0 & 1 or not selector:
        raise Fault(GP)
    wide = registers.long_mode
    mask = r.U64 if wide else r.U32
    registers.flags &= ~(r.FLAG_IF | r.FLAG_VM | r.FLAG_RF)
    rights = _FLAT_CODE | (r.RIGHTS_L if wide else r.RIGHTS_DB)
    registers.set_segment(r.CS, r.Segment(selector, 0, r.U32, rights))
    registers.set_segment(r.SS, r.Segment(selector + 8, 0, r.U32, _FLAT_DATA))
    registers.q[r.RSP] = (registers.msr(0x175) or 0) & mask
    registers.rip = (registers.msr(0x176) or 0) & mask
    registers.shadow = False


_TABLE: dict[int, Callable[[Cpu, Instruction], Stop | None]] = {
    **dict.fromkeys((0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF), _in_out),
    **dict.fromkeys((0x6C, 0x6D, 0x6E, 0x6F), _string),
    0x90: _pause,
    0xF1: _int1,
    0xF4: _hlt,
    0x0F05: _syscall,
    0x0F07: _sysret,
    0x0F34: _sysenter,
    0x0F08: _nothing_in_ring_0,
    0x0F09: _nothing_in_ring_0,
    0x0F20: _mov_cr8,
    0x0F21: _mov_dr,
    0x0F22: _mov_cr8,
    0x0F23: _mov_dr,
    0x0F30: _wrmsr,
    0x0F31: _rdtsc,
    0x0F32: _rdmsr,
    0x0F33: _rdpmc,
    0x0FA2: _cpuid,
    xsave.OPCODE: xsave.execute,
}
_EXTENDED: dict[int, Callable[[Cpu, Instruction], Stop | None]] = {
    0xC1: _hypercall,
    0xC8: _monitor,
    0xC9: _monitor,
    0xD0: _xgetbv,
    0xD1: _xsetbv,
    0xD9: _hypercall,
    0xF9: _rdtsc,
}
