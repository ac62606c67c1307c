"""One vCPU of a guest of real code: its state, what waits for it, and what it owes user space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.base import BusLock
from kvmsim.engine.x86 import fpu
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import Linear
from kvmsim.engine.x86.paging import PAT_RESET, Mtrrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.breakpoints import Debugger
    from kvmsim.engine.x86.delivery import Event
    from kvmsim.engine.x86.lbr import LastBranches
    from kvmsim.engine.x86.memory import Memory
    from kvmsim.engine.x86.policy import Policy
    from kvmsim.engine.x86.vm import X86Vm
    from kvmsim.engine.x86.watch import Why

_UNUSUAL_FLAGS = r.FLAG_RF | r.FLAG_AC
_DR7, _DR7_ENABLED, _EFLAGS = r.DR7 // 8, r.DR7_ENABLED, r.EFLAGS // 8
CR0_RESET = 0x6000_0010
DR6_RESET, DR7_RESET = 0xFFFF_0FF0, 0x400
_CODE_RESET = r.RIGHTS_P | r.RIGHTS_S | 0xB << 8
_DATA_RESET = r.RIGHTS_P | r.RIGHTS_S | 3 << 8


class Cpu:
    """One vCPU.

    Args:
        vm: its VM.
        blank: state of the emulator's CPU before anything ran.

    Attributes:
        vm: its VM.
        policy: of its VM.
        memory: guest-physical memory.
        registers: its registers, wherever they are. After changing what address translation uses,
            call :meth:`changed`.
        mtrrs: memory types by address.
        cr8: task priority.
        xcr0: enabled extended state.
        admitted: linear address of a locked instruction that may take its bus lock; -1: none. It
            holds for the next execution of that instruction (fault-like stops).
        debugger: what a debugger in user space wants; None: there is none.
        traps: payload of the #DB that is due before the next instruction; 0: none.
        completion: what :meth:`complete` has to do; None: the last stop waits for nothing.
        cautious: its next instruction is executed alone, for what follows cannot be read.
        stepped: an instruction was executed for a debugger that single-steps and has not heard yet.
        nmi_masked: an NMI was delivered, and no IRET executed since.
        interrupt: vector of an external interrupt that comes as soon as the guest takes it.
        acknowledge: asked for the vector when it does; None: it is ``interrupt`` itself. A more
            urgent one may have come meanwhile, or it may be gone. Called in KVM's thread only.
        tpr_threshold: stop when the guest sets ``cr8`` below this.
        shows_tpr: stop whenever the guest lowers ``cr8``.
        wants_window: stop when the guest can take an interrupt.
        guest_ns: guest time it has executed.
        stopped_ns: ``guest_ns`` at its last stop.
        left: an end of execution in another thread that waits to be acted on: why, and the
            emulator's error number.
        kicked: it is to stop executing in another thread.
        astray: where the emulator last ended for no known reason, and how often it did there.
        creeps: so many instructions ahead are to be executed one by one.
        yields: it waits for another vCPU of its VM.
        worked: it has executed there since it was handed out.
        bus_lock: the stop for a bus lock and nothing else; one is enough.
        bus_locks: bus locks its guest has taken.
        detects_splits: whether split locks stop the guest at this moment (``SplitLockAc``); None:
            never. Called in whatever thread executes.
        lbr: last-branch records, fed while they are enabled; None: the vCPU has none.
    """

    def __init__(self, vm: X86Vm, blank: bytes) -> None:
        self.vm = vm
        self.policy: Policy = vm.policy
        self.memory: Memory = vm.memory
        self.saved = bytearray(blank)
        self.registers = r.Registers(memoryview(self.saved))
        self.linear = Linear(self.registers, self.memory)
        self.mtrrs = Mtrrs.reset()
        self.cr8 = 0
        self.xcr0 = 1
        self.events: list[Event] = []
        self.admitted = -1
        self.debugger: Debugger | None = None
        self.traps = 0
        self.stepped = self.cautious = False
        self.nmi_masked = False
        self._owed_traps = 0
        self.interrupt: int | None = None
        self.acknowledge: Callable[[], int | None] | None = None
        self.tpr_threshold = 0
        self.shows_tpr = False
        self.wants_window = False
        self.guest_ns = self.stopped_ns = 0
        self.left: tuple[Why, int] | None = None
        self.kicked = self.worked = False
        self.astray = (-1, 0)
        self.creeps = 0
        self.yields = False
        self.bus_lock = BusLock()
        self.bus_locks = 0
        self.detects_splits: Callable[[], bool] | None = None
        self.lbr: LastBranches | None = None
        self.stops: list[Stop] = []
        self._tsc_offset = 0
        self.completion: Callable[[bytes], None] | None = None
        self._executes = False
        self.reset()

    def use(self, env: memoryview) -> None:
        """Its state is elsewhere from now on: in the emulator, or saved.

        ``registers`` stays the same object: an instruction that waits for user space keeps it.
        """
        self.registers.look_at(env)

    def use_saved(self) -> None:
        """Its state is the saved copy."""
        self.use(memoryview(self.saved))

    def reset(self) -> None:
        """Power-on state (SDM volume 3, table 10-1), as KVM has it."""
        registers = self.registers
        for number in range(16):
            registers.q[number] = 0
        registers.q[r.RDX] = 0x600
        registers.rip = 0xFFF0
        registers.efer = 0
        registers.cr2 = registers.cr3 = registers.cr4 = 0
        registers.cr0 = CR0_RESET
        registers.flags = 2
        registers.set_segment(r.CS, r.Segment(0xF000, 0xFFFF_0000, 0xFFFF, _CODE_RESET))
        for number in (r.ES, r.SS, r.DS, r.FS, r.GS):
            registers.set_segment(number, r.Segment(0, 0, 0xFFFF, _DATA_RESET))
        registers.set_segment(r.LDTR, r.Segment(0, 0, 0xFFFF, r.RIGHTS_P | 2 << 8))
        registers.set_segment(r.TR, r.Segment(0, 0, 0xFFFF, r.RIGHTS_P | 0xB << 8))
        registers.set_segment(r.GDTR, r.Segment())
        registers.set_segment(r.IDTR, r.Segment())
        for number in range(4):
            registers.set_debug(number, 0)
        registers.set_debug(6, DR6_RESET)
        registers.set_debug(7, DR7_RESET)
        registers.set_msr(0x277, PAT_RESET)
        fpu.reset(registers)
        registers.shadow = False
        self.changed()

    # -- events --------------------------------------------------------------------------------

    @property
    def steps(self) -> bool:
        """Whether a debugger single-steps it."""
        return self.debugger is not None and self.debugger.single_step

    def is_plain(self) -> bool:
        """Whether nothing makes the engine look at single instructions or at breakpoints."""
        q = self.registers.q
        unusual = q[_DR7] & _DR7_ENABLED or q[_EFLAGS] & _UNUSUAL_FLAGS
        return self.debugger is None and not (unusual or self.creeps or self.cautious)

    def owe_trap(self, payload: int) -> None:
        """A #DB is due when the instruction that waits for user space is completed."""
        self._owed_traps |= payload

    def queue(self, event: Event) -> None:
        """Deliver an event at the next entry, before anything else is executed.

        Not for external interrupts, which may have to wait: see :attr:`interrupt`.
        """
        self.events.append(event)

    @property
    def interruptible(self) -> bool:
        """Whether an external interrupt would be taken now."""
        registers = self.registers
        if self.debugger is not None and self.debugger.blocks_interrupts:
            return False
        return bool(registers.flags & r.FLAG_IF) and not registers.shadow and not self.events

    @property
    def is_held_by_shadow(self) -> bool:
        """Whether an external interrupt would be taken but for STI or MOV SS just before."""
        registers = self.registers
        return registers.shadow and bool(registers.flags & r.FLAG_IF)

    # -- completion ----------------------------------------------------------------------------

    @property
    def must_wait(self) -> bool:
        """Whether what :meth:`complete` does has to wait for others that execute."""
        return self._executes and self.vm.must_wait(self)

    @property
    def pending(self) -> bool:
        """Whether the last stop waits for :meth:`complete`."""
        return self.completion is not None

    def on_completion(self, function: Callable[[bytes], None], *, executes: bool = False) -> None:
        """What is to be done when user space has answered.

        Args:
            function: called with the answer.
            executes: it needs the emulator.
        """
        self.completion = function
        self._executes = executes

    def complete(self, data: bytes = b"") -> None:
        """User space has done its part of the last stop: the instruction ends.

        Args:
            data: what an IN or an MMIO read brought.
        """
        function, self.completion = self.completion, None
        if function is not None:
            if self._executes:
                self.vm.load(self)
            function(data)
            if self.completion is None:
                self.traps |= self._owed_traps
                self._owed_traps = 0
                self.stepped = self.steps

    def abandon(self) -> None:
        """User space went elsewhere: the instruction of the last stop is not completed."""
        self.completion = None
        self._owed_traps = 0
        self.stops.clear()

    # -- state -----------------------------------------------------------------------------------

    def changed(self) -> None:
        """Control registers or EFER were set from outside the guest."""
        self.vm.translation_changed()

    def mapping_changed(self) -> None:
        """Memory types changed."""
        self.vm.forget_types()

    @property
    def tsc(self) -> int:
        """Time stamp counter: guest time in cycles, and an offset."""
        return (self.guest_ns * self.policy.tsc_khz // 1_000_000 + self._tsc_offset) & r.U64

    @tsc.setter
    def tsc(self, value: int) -> None:
        self._tsc_offset = value - self.guest_ns * self.policy.tsc_khz // 1_000_000

    def set_general(self, number: int, value: int, size: int) -> None:
        """Write a general register as an instruction of that operand size does."""
        self.set_masked(number, value, size * 8)

    def set_masked(self, number: int, value: int, bits: int) -> None:
        """Write the low bits of a register; 32 bits clear the upper half."""
        q = self.registers.q
        mask = (1 << bits) - 1
        q[number] = value & mask if bits >= 32 else q[number] & ~mask & r.U64 | value & mask

    def linear_address(self, segment: int, offset: int) -> int:
        """Linear address of an offset in a segment."""
        if self.registers.mode == 64:
            base = self.registers.segment(segment).base if segment >= r.FS else 0
            return (base + offset) & r.U64
        return (self.registers.segment(segment).base + offset) & r.U32
