"""The local APIC of a vCPU, where it is in the kernel.

Behaviour: Linux 6.12 lapic.c. Interrupts that arrive wait in IRR; when the vCPU takes one
(:meth:`Lapic.acknowledge`) it moves to ISR, until the guest writes EOI. IRR, ISR and TMR are kept
as numbers of 256 bits, one per vector; the register page is put together when somebody looks.

What time it is comes with every call that the timer could matter to.
"""

from __future__ import annotations

from struct import pack_into, unpack_from
from typing import TYPE_CHECKING, NamedTuple

from kvmsim.abi.regs import KVM_LAPIC_STATE
from kvmsim.kvm import capabilities, clock, cpuid, events, irqchip, vcpu_events
from kvmsim.kvm.apic_timer import DEADLINE, ApicTimer, divide_of
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

# Offsets of registers.
ID, LVR, TASKPRI, ARBPRI, PROCPRI, EOI = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0
LDR, DFR, SPIV, ISR, TMR, IRR = 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200
ESR, LVTCMCI, ICR, ICR2 = 0x280, 0x2F0, 0x300, 0x310
LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TMICT, TMCCT, TDCR, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

APIC_ENABLE = 1 << 11
X2APIC_ENABLE = 1 << 10
SPIV_ENABLED = 1 << 8
SPIV_DIRECTED_EOI = 1 << 12
LVT_MASKED = 1 << 16
LVT_LEVEL = 1 << 15
#: Version 0x14 with six entries in the local vector table.
VERSION = 0x00050014
VERSION_DIRECTED_EOI = 1 << 24
MODE_MASK = 0x700
FIXED, LOWEST, SMI, REMOTE_READ, NMI, INIT, STARTUP, EXTINT = range(0, 0x800, 0x100)
ICR_BUSY = 1 << 12
ICR_SELF = 1 << 18
#: Linux 6.12 lapic.c X2APIC_ICR_RESERVED_BITS.
X2APIC_ICR_RESERVED = 0xFFF0_0000 | 3 << 16 | 1 << 13
U32 = 0xFFFF_FFFF

_PLAIN = LVT_MASKED | ICR_BUSY | 0xFF
_LINT = _PLAIN | MODE_MASK | 1 << 13 | 1 << 14 | LVT_LEVEL
#: Entry of the local vector table -> bits the guest can set; the timer's mode comes on top.
LVT_BITS = {
    LVTT: _PLAIN,
    LVTTHMR: _PLAIN | MODE_MASK,
    LVTPC: _PLAIN | MODE_MASK,
    LVT0: _LINT,
    LVT1: _LINT,
    LVTERR: _PLAIN,
}
_READABLE = frozenset(
    {
        *(ID, LVR, TASKPRI, PROCPRI, LDR, SPIV, ESR, ICR, *LVT_BITS, TMICT, TMCCT, TDCR),
        *range(ISR, ESR, 0x10),
    }
)
_XAPIC_ONLY = frozenset({ARBPRI, DFR, ICR2})
_VECTORS = {ISR: "isr", TMR: "tmr", IRR: "irr"}


class Message(NamedTuple):
    """An interrupt on its way to local APICs.

    Attributes:
        vector: which, 0 to 255.
        mode: ``FIXED`` and the like.
        destination: APIC id or logical destination.
        logical: the destination is one.
        level: level-triggered.
        asserted: of a level-triggered one, up.
        shorthand: 0, or bits 18 and 19 of ICR: self, all, all but self.
        redirected: may go to any one of its destinations.
    """

    vector: int
    mode: int = FIXED
    destination: int = 0
    logical: bool = False
    level: bool = False
    asserted: bool = True
    shorthand: int = 0
    redirected: bool = False


class Signals:
    """INIT and SIPI on their way to a vCPU; they survive the INIT itself.

    Attributes:
        init: an INIT waits.
        sipi: vector of a SIPI that waits; None: none.
    """

    __slots__ = ("init", "sipi")

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.init = False
        self.sipi: int | None = None


class Lapic:
    """One local APIC.

    Args:
        vcpu: whose.

    Attributes:
        vcpu: as given.
        regs: the register page, first KiB, without IRR, ISR, TMR and the current count.
        irr: vectors requested.
        isr: vectors in service.
        tmr: vectors that are level-triggered.
        timer: its timer.
        base: APIC base as of the last look.
        vapic_addr: guest address of the task priority the VMM shares, 0 without.
        tpr_reporting: accesses to the task priority are exits.
        external: vector a split irqchip's user space has queued; None: none.
        eoi_exit: vector whose end user space is to be told of (split irqchip); None: none.
        nr_lowest: lowest-priority interrupts taken, for fairness.
        unhalted: another vCPU has ended its halt, or the next one (KVM_HC_KICK_CPU).
    """

    __slots__ = (
        *("base", "eoi_exit", "external", "irr", "isr", "nr_lowest", "regs", "timer", "tmr"),
        *("tpr_reporting", "unhalted", "vapic_addr", "vcpu"),
    )

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.vapic_addr = 0
        self.tpr_reporting = False
        self.external: int | None = None
        self.eoi_exit: int | None = None
        self.unhalted = False
        self.timer = ApicTimer()
        # It may be an x2APIC already when somebody looks for the first time.
        self.base = vcpu.apic_base & ~X2APIC_ENABLE
        self.regs = bytearray(KVM_LAPIC_STATE.size_bytes)
        self.put(ID, (vcpu.id & 0xFF) << 24)
        self.reset()

    def reset(self) -> None:
        """Registers after power-on or INIT; LINT0 of the boot CPU takes the PIC's interrupts."""
        kept = {register: self.get(register) for register in ((ID, LDR) if self.x2apic else (ID,))}
        self.regs = bytearray(KVM_LAPIC_STATE.size_bytes)
        for register, value in kept.items():
            self.put(register, value)
        self.irr = self.isr = self.tmr = 0
        self.put(LVR, self.version)
        self.put(DFR, U32)
        self.put(SPIV, 0xFF)
        for register in LVT_BITS:
            self.put(register, LVT_MASKED)
        if self.vcpu.id == irqchip.of(self.vcpu.vm).boot_cpu:
            self.put(LVT0, EXTINT)
        self.timer.reset()
        self.nr_lowest = 0

    # -- registers ---------------------------------------------------------------------------------

    def get(self, register: int) -> int:
        """A register as it is stored, by its offset."""
        group = _VECTORS.get(register & ~0x7F)
        if group is not None:
            vectors: int = getattr(self, group)
            return vectors >> 2 * (register & 0x70) & U32
        value: int = unpack_from("<I", self.regs, register)[0]
        return value

    def put(self, register: int, value: int) -> None:
        """Store a register that is no group of vectors, without any effect."""
        pack_into("<I", self.regs, register, value)

    @property
    def version(self) -> int:
        """The version register: end of interrupt can be kept from a user-space IOAPIC only."""
        if irqchip.of(self.vcpu.vm).full or not cpuid.guest_register(self.vcpu, 1, "ecx") >> 21 & 1:
            return VERSION
        return VERSION | VERSION_DIRECTED_EOI

    @property
    def present(self) -> bool:
        """Whether it is enabled by IA32_APIC_BASE."""
        return bool(self.vcpu.apic_base & APIC_ENABLE)

    @property
    def x2apic(self) -> bool:
        """Whether its registers are MSRs."""
        return self.vcpu.apic_base & (APIC_ENABLE | X2APIC_ENABLE) == APIC_ENABLE | X2APIC_ENABLE

    @property
    def enabled(self) -> bool:
        """Whether the guest switched it on, by software; off after reset."""
        return bool(self.get(SPIV) & SPIV_ENABLED)

    @property
    def tpr(self) -> int:
        """Task priority; CR8 has its upper half."""
        value = self.regs[TASKPRI]
        if value >> 4 != self.vcpu.cr8:
            value = self.vcpu.cr8 << 4
            self.put(TASKPRI, value)
        return value

    @tpr.setter
    def tpr(self, value: int) -> None:
        self.put(TASKPRI, value)
        self.vcpu.cr8 = value >> 4

    @property
    def ppr(self) -> int:
        """Processor priority: of the task, or of what is in service."""
        tpr, serving = self.tpr, highest(self.isr) & 0xF0 if self.isr else 0
        return tpr if tpr & 0xF0 >= serving else serving

    def read(self, register: int, now_ns: int) -> int | None:
        """Read a register as the guest does; None: there is none to read."""
        if register not in _READABLE and (register not in _XAPIC_ONLY or self.x2apic):
            return None
        if register == TMCCT:
            return self.timer.current(now_ns)
        if register == LVR:
            return self.version
        if register == PROCPRI:
            return self.ppr
        if register == TASKPRI:
            return self.tpr
        return self.get(register)

    def page(self, now_ns: int) -> bytearray:
        """The register page as KVM_GET_LAPIC gives it."""
        self.put(LVR, self.version)
        self.put(TASKPRI, self.tpr)
        self.put(PROCPRI, self.ppr)
        data = bytearray(self.regs)
        for register in range(ISR, ESR, 0x10):
            pack_into("<I", data, register, self.get(register))
        pack_into("<I", data, TMCCT, self.timer.current(now_ns))
        if self.x2apic and not capabilities.of(self.vcpu.vm).x2apic_api & 1:
            pack_into("<I", data, ID, self.vcpu.id << 24 & U32)
        return data

    def load(self, data: bytes, now_ns: int) -> None:
        """Take a register page over; what the vCPU's mode fixes stays."""
        page = bytearray(data)
        current = unpack_from("<I", page, TMCCT)[0]
        for offset, name in _VECTORS.items():
            words = (unpack_from("<I", page, offset + 0x10 * n)[0] for n in range(8))
            setattr(self, name, sum(word << 32 * n for n, word in enumerate(words)))
        for register in (*range(ISR, ESR, 0x10), TMCCT):
            pack_into("<I", page, register, 0)
        self.regs = page
        self.put(LVR, self.version)
        if self.x2apic:
            self._become_x2apic()
        self.tpr = page[TASKPRI]
        timer = self.timer
        timer.stop()
        self._follow_timer_mode()
        timer.divide = divide_of(self.get(TDCR))
        if timer.mode != DEADLINE:
            timer.start(self.get(TMICT), current, now_ns)

    # -- where it is -------------------------------------------------------------------------------

    def base_changed(self) -> None:
        """IA32_APIC_BASE is another (lapic.c ``kvm_lapic_set_base``)."""
        base, changed = self.vcpu.apic_base, self.base ^ self.vcpu.apic_base
        self.base = base
        if changed & (APIC_ENABLE | X2APIC_ENABLE) and base & APIC_ENABLE:
            if base & X2APIC_ENABLE:
                self._become_x2apic()
            else:
                self.put(ID, (self.vcpu.id & 0xFF) << 24)

    def _become_x2apic(self) -> None:
        number = self.vcpu.id
        self.put(ID, number)
        self.put(LDR, (number >> 4 << 16 | 1 << (number & 0xF)) & U32)

    # -- interrupts --------------------------------------------------------------------------------

    def request(self, vector: int, *, level: bool = False) -> None:
        """An interrupt arrives."""
        bit = 1 << vector
        self.irr |= bit
        self.tmr = self.tmr | bit if level else self.tmr & ~bit

    def waiting(self) -> int | None:
        """The vector the vCPU would take now; None: nothing above its priority."""
        irr = self.irr
        if not irr or not self.vcpu.apic_base & APIC_ENABLE:
            return None
        vector = highest(irr)
        return vector if vector & 0xF0 > self.ppr else None

    def threshold(self) -> int:
        """Task priorities below this one let something in that waits; 0: no priority does."""
        if not self.irr:
            return 0
        vector = highest(self.irr)
        serving = highest(self.isr) if self.isr else 0
        return vector >> 4 if vector >> 4 > serving >> 4 else 0

    def acknowledge(self, vector: int) -> None:
        """The vCPU takes an interrupt."""
        bit = 1 << vector
        self.irr &= ~bit
        self.isr |= bit

    def takes_pic(self) -> bool:
        """Whether the PIC's interrupts come through."""
        lvt0 = self.get(LVT0)
        return not self.present or lvt0 & (LVT_MASKED | MODE_MASK) == EXTINT

    def accept(self, message: Message, now_ns: int) -> bool:
        """An interrupt for this APIC; whether it was taken (lapic.c ``__apic_accept_irq``)."""
        mode = message.mode
        if mode in {FIXED, LOWEST}:
            if (message.level and not message.asserted) or not (self.present and self.enabled):
                return False
            if mode == LOWEST:
                self.nr_lowest += 1
            self.request(message.vector, level=message.level)
        elif mode == NMI:
            state = events.of(self.vcpu)
            state.nmi_pending += 1
            state.settle_nmis()
            vcpu_events.arm(self.vcpu)
        elif mode == INIT:
            if message.level and not message.asserted:
                return False
            signals = signals_of(self.vcpu)
            signals.init, signals.sipi = True, None
        elif mode == STARTUP:
            signals_of(self.vcpu).sipi = message.vector
        elif mode == REMOTE_READ:
            # Linux 6.12 __apic_accept_irq: never a remote read, always a kick by hypercall.
            self.unhalted = True
        else:
            return False
        self.vcpu.kick(now_ns)
        return True

    def deliver_local(self, register: int, now_ns: int) -> bool:
        """One of its own sources fires."""
        entry = self.get(register)
        if not self.present or entry & LVT_MASKED:
            return False
        level = bool(entry & LVT_LEVEL)
        return self.accept(Message(entry & 0xFF, entry & MODE_MASK, level=level), now_ns)

    def expire(self, now_ns: int) -> None:
        """Bring the timer up to date."""
        due_ns = self.timer.due_ns
        if due_ns is not None and due_ns <= now_ns:
            self.timer.expire(now_ns)
            self.deliver_local(LVTT, now_ns)

    # -- effects of writes -------------------------------------------------------------------------

    def write_lvt(self, register: int, value: int) -> None:
        """Write an entry of the local vector table."""
        if not self.enabled:
            value |= LVT_MASKED
        bits = LVT_BITS[register]
        if register == LVTT:
            bits |= self._timer_modes()
        self.put(register, value & bits)
        if register == LVTT:
            self._follow_timer_mode()

    def write_spiv(self, value: int) -> None:
        """Switch on or off; off masks every entry of the local vector table."""
        directed = SPIV_DIRECTED_EOI if self.version & VERSION_DIRECTED_EOI else 0
        self.put(SPIV, value & (0x3FF | directed))
        if value & SPIV_ENABLED:
            return
        for register in LVT_BITS:
            self.put(register, self.get(register) | LVT_MASKED)
        self._follow_timer_mode()

    def write_initial_count(self, value: int, now_ns: int) -> None:
        """Start the timer."""
        if self.timer.mode != DEADLINE:
            self.put(TMICT, value)
            self.timer.start(value, None, now_ns)

    def write_divide(self, value: int, now_ns: int) -> None:
        """Another speed of the timer."""
        self.put(TDCR, value & 0xB)
        self.timer.set_divide(divide_of(value), self.get(TMICT), now_ns)

    def write_deadline(self, value: int, now_ns: int) -> None:
        """IA32_TSC_DEADLINE; ignored in other modes."""
        if self.present and self.timer.mode == DEADLINE:
            tsc, khz = clock.guest_tsc(self.vcpu, now_ns), clock.of_vcpu(self.vcpu).tsc_khz
            self.timer.start_deadline(value, tsc, khz, now_ns)

    def _timer_modes(self) -> int:
        """TSC-deadline is for guests whose CPUID shows it (cpuid.c, leaf 1 ECX bit 24)."""
        deadline = cpuid.guest_register(self.vcpu, 1, "ecx") >> 24 & 1
        return 3 << 17 if deadline else 1 << 17

    def _follow_timer_mode(self) -> None:
        if self.timer.set_mode(self.get(LVTT) & self._timer_modes()):
            self.put(TMICT, 0)


def highest(vectors: int) -> int:
    """The most urgent of some vectors; -1 for none."""
    return vectors.bit_length() - 1


def of(vcpu: Vcpu) -> Lapic:
    """The local APIC of a vCPU."""
    apic = state_of(vcpu, Lapic)
    if apic.base != vcpu.apic_base:
        apic.base_changed()
    return apic


def signals_of(vcpu: Vcpu) -> Signals:
    """INIT and SIPI that wait for a vCPU."""
    return state_of(vcpu, Signals)
