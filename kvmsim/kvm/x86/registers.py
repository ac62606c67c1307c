"""The registers of a vCPU, in and out of the engine.

Between runs KVM's registers are the ones that count; they are compared with what the engine left,
and only what user space changed goes in. Debug registers and the bus lock #DB are
``kvmsim.kvm.debug``'s: what it says was delivered is injected into the guest at the next entry.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

from kvmsim.abi.structs import KVM_GUESTDBG_BLOCKIRQ
from kvmsim.engine.x86 import fpu as x87_sse
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import BP, DB, NMI, OF, Event
from kvmsim.kvm import (
    clock,
    debug,
    events,
    fpu,
    irqchip,
    lbr,
    msr_rules,
    pvclock,
    sregs,
    steal_time,
)
from kvmsim.kvm.dispatch import state_of
from kvmsim.kvm.page import U8_REQUEST_INTERRUPT_WINDOW
from kvmsim.kvm.x86 import policy, special

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.kvm.debug import GuestDebug
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.x86.policy import VcpuPolicy

#: Numbers of the general registers in the order of ``kvm_regs``; RIP and RFLAGS follow.
_ORDER = (r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RSP, r.RBP, *range(8, 16))
_REGS = struct.Struct("<18Q")
_RIP, _EFLAGS = r.RIP // 8, r.EFLAGS // 8
SHADOW_MOV_SS, SHADOW_STI = 1, 2


class VcpuRegisters:
    """The registers of one vCPU, in and out of the engine.

    While the guest executes the engine has them; between runs KVM has them. Few exits look at more
    than RIP, so what the engine left is fetched when somebody asks (``vcpu.mirror``), and what
    nobody asked for cannot have been changed and need not go back in.

    Args:
        vcpu: the vCPU.

    Attributes:
        regs_ahead: the engine's general registers are newer than KVM's.
        sregs_ahead: so are its segments and control registers.
        fpu_ahead: so are its x87 and SSE registers, and XCR0.
        events_ahead: so is what holds interrupts off, and what it still has to deliver.
    """

    __slots__ = (
        *("_area", "_clock", "_cpu", "_debug_writes", "_delivered", "_dr", "_dr6", "_dr7"),
        *("_events", "_msrs", "_not_ready", "_page", "_pvclock", "_raw_fpu", "_regs", "_rip"),
        *("_running", "_sregs", "_stolen", "_vcpu"),
        *("events_ahead", "fpu_ahead", "regs_ahead", "sregs_ahead"),
        "_windows",
    )

    _cpu: Cpu

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._regs = self._sregs = self._area = self._raw_fpu = b""
        self._dr: list[int] = []
        self._dr6 = self._dr7 = self._debug_writes = -1
        self._delivered = 0
        self._page = vcpu.run.u8
        #: What the page says of a guest that takes no interrupts: an in-kernel PIC is always ready.
        self._not_ready = 1 if vcpu.vm.irqchip else 0
        self._rip = -1
        self._running = False
        self._events = events.of(vcpu)
        self._msrs = state_of(vcpu, msr_rules.Msrs)
        # Where the PICs are in the kernel, nobody else injects interrupts (x86.c 6.12).
        self._windows = not irqchip.of(vcpu.vm).full
        self._pvclock, self._clock = pvclock.of(vcpu), clock.of(vcpu.vm)
        self._stolen = steal_time.of(vcpu)
        self._msrs.changed |= self._msrs.values.keys()
        self.regs_ahead = self.sregs_ahead = self.fpu_ahead = self.events_ahead = False

    def reset(self) -> None:
        """KVM's registers are the ones that count: after INIT, which keeps x87 and SSE."""
        self.regs_ahead = self.sregs_ahead = self.events_ahead = False

    # -- into the engine ---------------------------------------------------------------------------

    def load(self, cpu: Cpu) -> None:
        """See ``RegisterFile``. Most entries find nothing changed."""
        vcpu = self._vcpu
        if self.regs_ahead and self.sregs_ahead and self.fpu_ahead and self.events_ahead:
            if vcpu.rip != self._rip:
                cpu.registers.rip = vcpu.rip
        else:
            self._load_registers(cpu)
        cpu.nmi_masked = self._events.nmi_masked
        if self._msrs.changed:
            policy.share_msrs(vcpu, cpu)
        if self._pvclock.seen != self._clock.changes:
            now_ns = cast("VcpuPolicy", cpu.policy).now_ns(cpu)
            pvclock.enter(vcpu, cpu.memory, now_ns)
        if self._stolen.due:
            steal_time.enter(vcpu, cpu.memory)
        cpu.cr8 = vcpu.cr8
        cpu.shows_tpr = not vcpu.vm.irqchip
        cpu.wants_window = self._windows and self._page[U8_REQUEST_INTERRUPT_WINDOW] != 0
        state = vcpu.debug
        if state is not None:
            cpu.lbr = None if state.lbr is None else lbr.recording(vcpu)
            if state.control or cpu.debugger is not None:
                cpu.debugger = debug.debugger_of(state)
            if state.dr6 != self._dr6 or state.dr7 != self._dr7 or state.dr != self._dr:
                self._load_debug(state, cpu)
            if state.delivered != self._delivered:
                self._delivered = state.delivered
                cpu.queue(Event(DB))
        self._running = True

    def _load_registers(self, cpu: Cpu) -> None:
        vcpu = self._vcpu
        if vcpu.mirror is not self:
            self._cpu, vcpu.mirror = cpu, self
        if not self.sregs_ahead:
            self._load_special()
        if not self.regs_ahead:
            self._load_general()
        elif vcpu.rip != self._rip:
            cpu.registers.rip = vcpu.rip
        if not self.fpu_ahead:
            self._load_fpu()
        if not self.events_ahead:
            cpu.registers.shadow = bool(self._events.shadow)
        self._ahead()

    def _ahead(self) -> None:
        self.regs_ahead = self.sregs_ahead = self.fpu_ahead = self.events_ahead = True

    def _load_general(self) -> None:
        regs = self._vcpu.get_regs()
        if regs == self._regs:
            return
        registers = self._cpu.registers
        *general, rip, flags = _REGS.unpack(regs)
        for number, value in zip(_ORDER, general, strict=True):
            registers.q[number] = value
        registers.rip, registers.flags = rip, flags

    def _load_special(self) -> None:
        state = state_of(self._vcpu, sregs.Sregs)
        if state.data != self._sregs:
            special.load(state, self._cpu)
            self._sregs = bytes(state.data)

    def _load_fpu(self) -> None:
        state = state_of(self._vcpu, fpu.Fpu)
        if state.area != self._area:
            legacy, avx = fpu.in_use(state.area)
            x87_sse.set_legacy_area(self._cpu.registers, legacy)
            x87_sse.set_avx_area(self._cpu.registers, avx)
            self._raw_fpu = b""
        self._cpu.xcr0 = state.xcr0

    def _load_debug(self, state: GuestDebug, cpu: Cpu) -> None:
        self._dr, self._dr6, self._dr7 = list(state.dr), state.dr6, state.dr7
        registers = cpu.registers
        for number, value in enumerate(state.dr):
            registers.set_debug(number, value)
        registers.set_debug(6, state.dr6)
        registers.set_debug(7, state.dr7)
        self._debug_writes = registers.debug_writes

    def deliver(self, cpu: Cpu) -> None:
        """See ``RegisterFile``. A #DB goes by way of the debug state."""
        state = self._events
        exception = state.exception
        if (exception.pending or exception.injected) and exception.vector != DB:
            software = exception.vector in {BP, OF}
            cpu.queue(Event(exception.vector, exception.error_code or 0, software=software))
            state.exception = events.QueuedException()
        # Linux 6.12 x86.c, kvm_check_and_inject_events: what is new waits, NMIs too.
        debugged = self._vcpu.debug
        blocked = debugged is not None and debugged.control & KVM_GUESTDBG_BLOCKIRQ
        held = state.nmi_masked or blocked
        if state.nmi_injected or (state.nmi_pending and not held):
            state.nmi_pending -= 0 if state.nmi_injected else 1
            state.nmi_injected, state.nmi_masked = False, True
            cpu.queue(Event(NMI, external=True))

    # -- out of the engine -------------------------------------------------------------------------

    def store(self, cpu: Cpu) -> None:
        """See ``RegisterFile``."""
        vcpu, registers = self._vcpu, cpu.registers
        q = registers.q
        self._running = False
        self.regs_ahead = self.sregs_ahead = self.fpu_ahead = self.events_ahead = True
        vcpu.rip = self._rip = q[_RIP]
        vcpu.cr8 = cpu.cr8
        self._events.nmi_masked = cpu.nmi_masked
        if q[_EFLAGS] & r.FLAG_IF:
            held = registers.shadow or bool(cpu.events) or self._events.waiting
            vcpu.note_interrupt_flag(True, held=held)
        else:
            vcpu.ready_and_if = self._not_ready
        if registers.debug_writes != self._debug_writes:
            self._debug_writes = registers.debug_writes
            self._store_debug(cpu)

    def _store_debug(self, cpu: Cpu) -> None:
        read = cpu.registers.debug
        state = debug.of(self._vcpu)
        state.dr, state.dr6, state.dr7 = [read(number) for number in range(4)], read(6), read(7)
        self._dr, self._dr6, self._dr7 = list(state.dr), state.dr6, state.dr7

    @property
    def _executes(self) -> bool:
        """Whether the engine goes on, here or in another thread: what is fetched stays its own."""
        return self._running or self._vcpu.in_guest.work is not None

    def fetch_regs(self) -> bytes:
        """The bytes of ``kvm_regs``, as KVM has them from here on."""
        registers = self._cpu.registers
        q = registers.q
        regs = _REGS.pack(*(q[number] for number in _ORDER), registers.rip, registers.flags)
        self.regs_ahead = self._executes
        self._regs = regs
        return regs

    def fetch_sregs(self) -> None:
        """Segments and control registers."""
        state = state_of(self._vcpu, sregs.Sregs)
        special.store(state, self._cpu)
        self.sregs_ahead = self._executes
        self._sregs = bytes(state.data)

    def fetch_fpu(self) -> None:
        """x87 and SSE registers, and XCR0."""
        state = state_of(self._vcpu, fpu.Fpu)
        raw = x87_sse.raw(self._cpu.registers)
        if raw != self._raw_fpu:
            self._raw_fpu = raw
            registers = self._cpu.registers
            fpu.put(state.area, x87_sse.legacy_area(registers), x87_sse.avx_area(registers))
        state.xcr0 = self._cpu.xcr0
        self.fpu_ahead = self._executes
        self._area = bytes(state.area)

    def fetch_events(self) -> None:
        """What holds interrupts off, and exceptions the engine has not delivered yet."""
        state, cpu = self._events, self._cpu
        state.shadow = self._shadow()
        self.events_ahead = self._executes
        if self._executes:
            return
        for event in cpu.events:
            if event.external:
                state.nmi_injected = state.nmi_injected or event.vector == NMI
            elif event.length:
                # The instruction that raises it is executed again.
                self._vcpu.rip -= event.length
            else:
                has_code = event.pushes_code
                state.exception = events.QueuedException(
                    event.vector,
                    injected=True,
                    has_error_code=has_code,
                    error_code=event.code if has_code else 0,
                )
        if cpu.events:
            cpu.events.clear()
            debug.of(self._vcpu).queued = state.waiting

    def fetch_msr(self, index: int) -> int | None:
        """A register the guest changes without KVM."""
        return self._cpu.registers.msr(index)

    def _shadow(self) -> int:
        """Which instruction holds interrupts off: Intel tells, AMD does not (svm.c, 6.12)."""
        if not self._cpu.registers.shadow:
            return 0
        if self._vcpu.vm.machine.preset.vendor == "amd":
            return SHADOW_STI | SHADOW_MOV_SS
        before = self._cpu.vm.watch.read_code(self._cpu.registers.linear_rip - 1, 1)
        return SHADOW_STI if before == b"\xfb" else SHADOW_MOV_SS
