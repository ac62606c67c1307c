"""What each stop of the guest puts into the page, and how the I/O ones end.

Layouts: ``kvmsim.abi.run``. Each function returns the exit reason, or None when KVM handles the
stop and the guest goes on.
"""

from __future__ import annotations

from struct import pack_into
from typing import TYPE_CHECKING

from kvmsim.abi.caps import KVM_MP_STATE_HALTED
from kvmsim.abi.exits import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, Exit
from kvmsim.abi.memory import PAGE_SIZE
from kvmsim.abi.run import PIO_DATA_OFFSET
from kvmsim.engine.base import Debug, InternalError
from kvmsim.engine.x86.breakpoints import dr6_after
from kvmsim.kvm import bus, coalesced, memslots

if TYPE_CHECKING:
    from kvmsim.engine.base import Hlt, Io, IrqWindow, Mmio, Shutdown, StopBase
    from kvmsim.kvm.vcpu import Vcpu

# Looked up once: see kvmsim.kvm.run.
HLT, IO, MMIO = Exit.HLT, Exit.IO, Exit.MMIO

DR6_ACTIVE_LOW = 0xFFFF0FF0
DR6_BUS_LOCK = 1 << 11
BP_VECTOR = 3
READY_AND_IF = 0x0101


def retire(vcpu: Vcpu, stop: StopBase) -> None:
    """The instruction of a stop is done."""
    vcpu.rip += stop.insn_len
    vcpu.stop = None


def hlt(vcpu: Vcpu, stop: Hlt, now_ns: int) -> int | None:
    """HLT: to user space without an in-kernel APIC, else a wait inside KVM."""
    retire(vcpu, stop)
    if not vcpu.vm.irqchip:
        return HLT
    vcpu.mp_state = KVM_MP_STATE_HALTED
    after_ns = stop.wake_after_ns
    vcpu.wake_at_ns = None if after_ns is None else now_ns + after_ns
    return None


def io(vcpu: Vcpu, stop: Io, now_ns: int) -> int | None:
    """IN or OUT. OUTS goes out one element at a time, INS all at once."""
    if stop.data:
        if _all_taken(vcpu, stop, now_ns):
            return None
        element = stop.data[vcpu.io_done : vcpu.io_done + stop.size]
        vcpu.run.memory[PIO_DATA_OFFSET : PIO_DATA_OFFSET + len(element)] = element
        direction, count = KVM_EXIT_IO_OUT, 1
    else:
        if _read_port(vcpu, stop, now_ns):
            return None
        direction, count = KVM_EXIT_IO_IN, stop.count
    fields = (direction, stop.size, stop.port, count, PIO_DATA_OFFSET)
    pack_into("<BBHIQ", vcpu.run.memory, 32, *fields)
    vcpu.pending, vcpu.pending_rip = stop, vcpu.rip
    return IO


def _all_taken(vcpu: Vcpu, stop: Io, now_ns: int) -> bool:
    """Offer what OUT writes to everybody in the kernel, up to the first element nobody takes."""
    vm, data, size = vcpu.vm, stop.data, stop.size
    while vcpu.io_done < len(data):
        element = data[vcpu.io_done : vcpu.io_done + size]
        collects = vm.coalesced_zones and coalesced.collect(vcpu, stop.port, element, pio=True)
        if not collects and not bus.write_port(vm, vcpu, stop.port, element, now_ns):
            return False
        vcpu.io_done += size
    vcpu.io_done = 0
    retire(vcpu, stop)
    return True


def _read_port(vcpu: Vcpu, stop: Io, now_ns: int) -> bool:
    """Read a port that is in the kernel, once for each element; False: none is there."""
    data = b""
    for _ in range(stop.count):
        element = bus.read_port(vcpu.vm, vcpu, stop.port, stop.size, now_ns)
        if element is None:
            return False
        data += element
    vcpu.input = data
    retire(vcpu, stop)
    return True


def complete_io(vcpu: Vcpu, stop: Io) -> None:
    """Take what IN brought; go on to the next element of OUTS."""
    if not stop.data:
        size_bytes = stop.size * stop.count
        vcpu.input = bytes(vcpu.run.memory[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size_bytes])
    else:
        vcpu.io_done += stop.size
        if vcpu.io_done < len(stop.data):
            vcpu.remaining_ns = 0
            return
    vcpu.io_done = 0
    retire(vcpu, stop)


def mmio(vcpu: Vcpu, stop: Mmio, now_ns: int) -> int | None:
    """An access without a memslot."""
    data = stop.data
    if _memory_in_kernel(vcpu, stop, now_ns):
        retire(vcpu, stop)
        return None
    if memslots.of(vcpu.vm).is_torn(stop.gpa):
        return memory_fault(vcpu, stop)
    size = len(data) if data else stop.size
    pack_into("<Q8sIB", vcpu.run.memory, 32, stop.gpa, data, size, bool(data))
    vcpu.pending, vcpu.pending_rip = stop, vcpu.rip
    return MMIO


def memory_fault(vcpu: Vcpu, stop: Mmio) -> int:
    """An access to a slot whose memory the VMM has unmapped: KVM_RUN fails with EFAULT."""
    vcpu.stop = None
    undo = getattr(vcpu.engine, "undo", None)
    if undo is not None:
        undo()
    pack_into("<QQQ", vcpu.run.memory, 32, 0, stop.gpa & -PAGE_SIZE, PAGE_SIZE)
    return Exit.MEMORY_FAULT


def _memory_in_kernel(vcpu: Vcpu, stop: Mmio, now_ns: int) -> bool:
    """Let a device in the kernel answer; False: none is there."""
    vm, gpa, data = vcpu.vm, stop.gpa, stop.data
    if data:
        collects = vm.coalesced_zones and coalesced.collect(vcpu, gpa, data, pio=False)
        return collects or bus.write_memory(vm, vcpu, gpa, data, now_ns)
    answer = bus.read_memory(vm, vcpu, gpa, stop.size, now_ns)
    if answer is None:
        return False
    vcpu.input = answer
    return True


def complete_mmio(vcpu: Vcpu, stop: Mmio) -> None:
    """Take what the read brought."""
    if not stop.data:
        vcpu.input = bytes(vcpu.run.memory[40 : 40 + stop.size])
    retire(vcpu, stop)


def irq_window(vcpu: Vcpu, stop: IrqWindow) -> int | None:
    """The guest can take an interrupt; only a VMM that asked hears of it."""
    retire(vcpu, stop)
    if not vcpu.run.request_interrupt_window:
        return None
    vcpu.ready_and_if = READY_AND_IF
    return Exit.IRQ_WINDOW_OPEN


def ended(vcpu: Vcpu, stop: Shutdown | InternalError | Debug) -> int:
    """The guest cannot go on, or is the VMM's to debug."""
    if isinstance(stop, Debug):
        return debug(vcpu, stop)
    return internal_error(vcpu, stop) if isinstance(stop, InternalError) else shutdown(vcpu)


def shutdown(vcpu: Vcpu) -> int:
    """Triple fault. RIP stays where it was."""
    vcpu.stop = None
    return Exit.SHUTDOWN


def internal_error(vcpu: Vcpu, stop: InternalError) -> int:
    """KVM cannot go on. RIP stays on the instruction."""
    words = stop.data[:16]
    pack_into(f"<II{len(words)}Q", vcpu.run.memory, 32, stop.suberror, len(words), *words)
    vcpu.stop = None
    return Exit.INTERNAL_ERROR


def fail_entry(vcpu: Vcpu, hardware_reason: int) -> int:
    """The processor did not enter the guest."""
    pack_into("<QI", vcpu.run.memory, 32, hardware_reason, 0)
    return Exit.FAIL_ENTRY


def debug(vcpu: Vcpu, stop: Debug) -> int:
    """A debug exception for the VMM; the instruction is done."""
    retire(vcpu, stop)
    return report_debug(vcpu, stop)


def report_debug(vcpu: Vcpu, stop: Debug) -> int:
    """Show a debug exception to the VMM.

    Linux 6.12 vmx.c ``handle_exception_nmi`` ORs the qualification, whose polarity is active high,
    into the active-low reset value: bit 11 always reads as "no bus lock". AMD's processors report
    DR6 itself, which is at its reset value while a debugger uses it (svm.c ``svm_vcpu_run``).
    """
    machine = vcpu.vm.machine
    dr6 = dr6_after(DR6_ACTIVE_LOW, stop.dr6)
    if machine.preset.vendor == "intel":
        dr6 = stop.dr6 | DR6_ACTIVE_LOW
        if stop.dr6 & DR6_BUS_LOCK and not machine.quirks.debug_exit_hides_bus_lock:
            dr6 &= ~DR6_BUS_LOCK
    pc = vcpu.rip if stop.pc is None else stop.pc
    pack_into("<IIQ", vcpu.run.memory, 32, stop.exception, 0, pc)
    if stop.exception != BP_VECTOR:  # a #BP leaves the others as they were
        pack_into("<QQ", vcpu.run.memory, 48, dr6, stop.dr7)
    return Exit.DEBUG
