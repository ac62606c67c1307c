"""A guest of real x86 code: one emulator, and the loop from stop to stop.

One emulator serves all vCPUs of a VM, one at a time: two of them would not be atomic towards each
other, and this way they share translated code. A vCPU's registers are either in the emulator or in
its saved copy; :meth:`X86Vm.load` moves them.

Execution has two halves. The emulator runs, with callbacks that take notes (``watch``), and what
the notes mean is done afterwards (``exits``). By default both happen in :meth:`X86Vm.run`. With
``inline_bytes`` the first half goes on in another thread, in :meth:`X86Vm.work`, when a vCPU does
not stop soon; what touches KVM's model is always done in the thread that calls ``run``. A vCPU that
asks while another one's turn may be under way waits for its own turn, in which ``work`` has
nothing to do.

Guest time is counted in bytes of code of the blocks entered, four of which stand for one
instruction and one cycle; exceptions and bus locks take more. Counting is exact from run to run,
not towards any real processor.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvmsim.engine.base import BusLock, Executing, InKernel, InternalError, IrqWindow, Shutdown
from kvmsim.engine.x86 import breakpoints, debugger, delivery, exits
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.accesses import Accesses
from kvmsim.engine.x86.backend import CODE_BYTES, MOST_CODE_BYTES, Unicorn
from kvmsim.engine.x86.branches import BranchFeed
from kvmsim.engine.x86.cpu import Cpu
from kvmsim.engine.x86.delivery import Event, TripleFault, Unsupported
from kvmsim.engine.x86.dirty_pages import DirtyPages
from kvmsim.engine.x86.memory import Memory
from kvmsim.engine.x86.meter import Meter
from kvmsim.engine.x86.operands import Operands
from kvmsim.engine.x86.watch import Watch, Why

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.memory import Slot
    from kvmsim.engine.x86.policy import Policy

SLICE_BYTES = 12_000_000
BYTES_PER_NS = 12
BUS_LOCK_NS = 333
#: After so many turns in which no vCPU went out to user space, other threads of it may have changed
#: code all the same.
TURNS_UNCHECKED = 16
#: Single steps that one run() executes, however little code it may execute inline besides.
STEPS_INLINE = 50
_HFLAGS = r.HFLAGS // 4
#: Ends of execution that concern nothing of KVM's: ``work`` goes on after them.
#: That nobody noted why can only be told here: whether somebody kicked is forgotten afterwards.
_OWN_BUSINESS = frozenset({Why.NOTHING, Why.NEW_SITES, Why.INVALID, Why.LOCK, Why.LOCKED})
_KVMS_EXCEPTIONS = frozenset({delivery.DB, delivery.BP})


class Awake:
    """The VMs of this process that have an emulator, at most so many.

    An emulator takes a megabyte. The VM that ran longest ago loses its own, and gets another when
    it runs again.

    Args:
        limit: how many; more only if all of them execute.

    Attributes:
        last: the one that ran last.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._vms: OrderedDict[X86Vm, None] = OrderedDict()
        self.last: X86Vm | None = None

    def add(self, vm: X86Vm) -> None:
        """A VM has got an emulator."""
        self._vms[vm] = None
        idle = [other for other in self._vms if other is not vm and not other.busy]
        for other in idle[: max(0, len(self._vms) - self.limit)]:
            other.close()

    def used(self, vm: X86Vm) -> None:
        """A VM runs."""
        if vm.awake:
            self.last = vm
            self._vms.move_to_end(vm)

    def discard(self, vm: X86Vm) -> None:
        """A VM has none any more."""
        self._vms.pop(vm, None)
        self.last = None


AWAKE = Awake(256)


def _room_for_code(slots: list[Slot]) -> int:
    """A quarter of a guest's memory, within bounds."""
    memory_bytes = sum(len(slot.memory) for slot in slots)
    return min(max(CODE_BYTES, memory_bytes // 4 & -CODE_BYTES), MOST_CODE_BYTES)


class X86Vm:
    """One VM.

    Args:
        slots: its memory.
        policy: what its processors are like.
        slice_bytes: bytes of code a vCPU executes at most before it stops for no other reason. It
            must be more than any block of the guest's has, or the guest gets nowhere; a page is
            enough.
        inline_bytes: bytes of code after which :meth:`run` leaves the rest to :meth:`work`; 0: at
            once; None: it never does.
        paced: stops say how much guest time passed. Otherwise time passes by itself, and a guest
            executes without an end to its slices unless ``inline_bytes`` makes it count.
        code_bytes: room for translated code, see ``Unicorn``; None: what suits the memory. When a
            kernel's code does not fit, all of it is translated over and over.

    Attributes:
        awake: it has an emulator.
        memory: guest-physical memory.
        policy: see above.
        live: registers of the vCPU that is in the emulator.
        busy: vCPUs whose turn to execute in :meth:`work` is not over.

    Raises:
        ConfigError: Unicorn is not there, or another release.
    """

    def __init__(
        self,
        slots: list[Slot],
        policy: Policy,
        *,
        slice_bytes: int = SLICE_BYTES,
        inline_bytes: int | None = None,
        paced: bool = True,
        code_bytes: int | None = None,
    ) -> None:
        self.policy = policy
        self.memory = Memory([])
        self.slice_bytes = slice_bytes
        self.inline_bytes = inline_bytes
        self.paced = paced
        self._code_bytes = code_bytes or _room_for_code(slots)
        self._current: Cpu | None = None
        self._stale_translations = False
        self.busy: set[Cpu] = set()
        self._working: Cpu | None = None
        #: User space may have changed code since that was looked at last.
        self._outside = True
        self._turns = 0
        self._wake()
        self._blank = bytes(self.unicorn.env)
        try:
            self.set_slots(slots)
        except BaseException:
            self.close()
            raise

    def _wake(self) -> None:
        """Make an emulator, without memory."""
        self.awake = True
        self.unicorn = Unicorn(self._code_bytes)
        self.live = r.Registers(self.unicorn.env)
        # Without a pace and without an end to what is executed inline, only kicks stop a guest.
        self.meter = Meter(self.unicorn, counts=self.paced or bool(self.inline_bytes))
        self._operands = Operands(self.live, self.memory)
        self.branches = BranchFeed(self)
        self.watch = Watch(self, self._operands)
        self.accesses = Accesses(self.unicorn, self.memory)
        self._on_access = self.unicorn.memory_callback(self.watch.on_access)
        self.dirty_pages = DirtyPages(self.unicorn)
        self._access_hooks: dict[tuple[int, int], int] = {}
        AWAKE.add(self)

    def add_cpu(self) -> Cpu:
        """Make a vCPU, in its state after power-on."""
        return Cpu(self, self._blank)

    def close(self) -> None:
        """Free the emulator; vCPUs keep their state, and execute again if they are asked to."""
        if not self.awake:
            return
        if self._current is not None:
            self._save()
        self.awake = False
        AWAKE.discard(self)
        self.live = r.Registers(memoryview(bytearray(self._blank)))
        self.watch.close()
        self.unicorn.close()

    # -- memory ----------------------------------------------------------------------------------

    def set_slots(self, slots: list[Slot]) -> None:
        """Have other memory from here on. Not while a vCPU executes.

        Args:
            slots: all of it. A slot that is what one of the present ones is stays as it is.
        """
        known = {slot.key: slot for slot in self.memory.slots}
        slots = [known.get(slot.key, slot) for slot in slots]
        kept = {slot.key for slot in slots}
        gone = [slot for slot in self.memory.slots if slot.key not in kept]
        added = [slot for slot in slots if slot.key not in known]
        if not gone and not added:
            return
        if not self.awake:
            self.memory.replace(slots)
            return
        for slot in gone:
            self.unicorn.unmap(slot.gpa, len(slot.memory))
        self.memory.replace(slots)
        self._show(added)

    def _show(self, added: list[Slot]) -> None:
        """Show slots to the emulator."""
        for slot in added:
            self.unicorn.map(slot.gpa, len(slot.memory), slot.address, writable=not slot.read_only)
        self._hook_accesses()
        self.dirty_pages.watch(self.memory.slots)
        self.watch.forget_code()
        self.translation_changed()

    def _hook_accesses(self) -> None:
        """Be told of accesses to where there is no memory, and of writes to read-only memory.

        Bounded to those: a hook over memory makes every store there slow.
        """
        read_only = [(slot.gpa, slot.end - 1) for slot in self.memory.slots if slot.read_only]
        wanted = {*self.memory.holes(), *read_only}
        for bounds in self._access_hooks.keys() - wanted:
            self.unicorn.unhook(self._access_hooks.pop(bounds))
        for bounds in wanted - self._access_hooks.keys():
            self._access_hooks[bounds] = self.unicorn.hook_memory(self._on_access, *bounds)

    # -- whose registers are where ---------------------------------------------------------------

    def load(self, cpu: Cpu) -> None:
        """Put a vCPU's registers into the emulator."""
        if not self.awake:
            self._wake()
            self._show(self.memory.slots)
        if self._current is not cpu:
            if self._current is not None:
                self._save()
            self.unicorn.env[:] = cpu.saved
            cpu.use(self.unicorn.env)
            self._current = cpu
            self.translation_changed()
        if self._stale_translations:
            self.unicorn.flush_tlb()
            self._stale_translations = False

    def _save(self) -> None:
        cpu = self._current
        assert cpu is not None
        cpu.saved[:] = self.unicorn.env
        cpu.use_saved()
        self._current = None

    @property
    def mode(self) -> int:
        """Bits of the code segment of the vCPU that executes."""
        return self.live.mode

    @property
    def linear_rip(self) -> int:
        """Linear address of that vCPU's next instruction."""
        return self.live.linear_rip

    def translation_changed(self) -> None:
        """Address translation is another from now on."""
        self._stale_translations = True
        self.forget_types()

    def forget_types(self) -> None:
        """Memory types are others from now on."""
        self._operands.forget()

    # -- running -----------------------------------------------------------------------------------

    def run(self, cpu: Cpu, allowance_ns: int | None = None) -> Stop:
        """Execute a vCPU until something stops it.

        Args:
            cpu: the vCPU.
            allowance_ns: guest time after which it stops in any case.

        Returns:
            The stop. RIP is where the stop says: at the instruction for ports, MMIO and fault-like
            bus locks, behind it for HLT and trap-like ones. ``after_ns`` is guest time since the
            last stop; ``insn_len`` is always 0, for RIP is right already.
        """
        if self.busy and self.must_wait(cpu):
            return self._hand_out(cpu, self._no_work)
        if cpu.completion is not None and not cpu.stops and cpu.left is None:
            msg = "the last stop was not completed"
            raise RuntimeError(msg)
        self.busy.discard(cpu)
        if AWAKE.last is not self:
            AWAKE.used(self)
        if self._current is not cpu or self._stale_translations:
            self.load(cpu)
        self._turns += 1
        if self._outside or not self._turns % TURNS_UNCHECKED:
            self._outside = False
            self.watch.check_code()
        if cpu.lbr is not None or self.branches.active:
            self.branches.watch(cpu)
        stop = self._run(cpu, allowance_ns)
        alone = type(stop) is BusLock
        if alone or stop.bus_lock:
            cpu.guest_ns += BUS_LOCK_NS
        stop.cpl = cpu.registers.d[_HFLAGS] & 3
        stop.after_ns = cpu.guest_ns - cpu.stopped_ns if self.paced else 0
        cpu.stopped_ns = cpu.guest_ns
        # Where all is inline, a stop of KVM's own may become one for user space (a signal).
        if alone or self.inline_bytes is None or not isinstance(stop, InKernel):
            self._outside = True
        if self.busy and self.busy - {cpu}:
            # KVM may look at it while another one executes.
            self._save()
        return stop

    def _run(self, cpu: Cpu, allowance_ns: int | None) -> Stop:
        given = self.slice_bytes
        if allowance_ns is not None:
            given = min(given, allowance_ns * BYTES_PER_NS)
        inline = given if self.inline_bytes is None else min(given, self.inline_bytes)
        meter = self.meter
        meter.start(inline)
        try:
            stop = self._until_stop(cpu, may_execute=inline > 0)
        finally:
            cpu.guest_ns += meter.used() // BYTES_PER_NS
        if stop is not None:
            return stop
        return InKernel() if inline == given else self._hand_out(cpu, self.work)

    def _until_stop(self, cpu: Cpu, *, may_execute: bool) -> Stop | None:
        """The next stop; None: the allowance is used up before."""
        stop: Stop | None = None
        if cpu.left is not None and not cpu.stops:
            (why, status), cpu.left = cpu.left, None
            stop = exits.ended(self, cpu, why, status)
        expired, steps = not may_execute, STEPS_INLINE
        while stop is None:
            if cpu.stops:
                return cpu.stops.pop(0)
            # work() leaves single steps to this thread.
            if expired and not (steps and debugger.is_needed(cpu)):
                if self._asks_kvm(cpu):
                    self._take_interrupt(cpu)
                return None
            steps -= expired
            stop = self._deliver(cpu) or self._step(cpu)
            expired = stop is None and (not may_execute or self.meter.expired())
        return stop

    def _deliver(self, cpu: Cpu) -> Stop | None:
        """Deliver what is queued; the stop of a VMM that waits for a window."""
        if (cpu.traps or cpu.stepped) and (stop := breakpoints.deliver(cpu)) is not None:
            return stop
        if cpu.interrupt is not None and cpu.interruptible:
            self._take_interrupt(cpu)
        if cpu.events:
            try:
                self._inject(cpu)
            except TripleFault:
                return Shutdown()
            except Unsupported:
                return InternalError(suberror=3)
        if cpu.wants_window and cpu.interruptible:
            cpu.wants_window = False
            return IrqWindow()
        if (cpu.interrupt is not None or cpu.wants_window) and cpu.is_held_by_shadow:
            cpu.creeps = max(cpu.creeps, 1)
        return None

    def _asks_kvm(self, cpu: Cpu) -> bool:
        """Whether it takes an interrupt now whose vector KVM has to say, in its own thread."""
        return cpu.interrupt is not None and cpu.acknowledge is not None and cpu.interruptible

    def _take_interrupt(self, cpu: Cpu) -> None:
        vector, cpu.interrupt = cpu.interrupt, None
        if cpu.acknowledge is not None:
            vector = cpu.acknowledge()
        if vector is not None:
            cpu.queue(Event(vector, external=True))

    def _inject(self, cpu: Cpu) -> None:
        while cpu.events:
            event = cpu.events.pop(0)
            registers, tables = cpu.registers, cpu.registers.cr3
            source = registers.linear_rip - event.length
            delivery.inject(registers, self.memory, event)
            if registers.cr3 != tables:  # by a task gate
                self.translation_changed()
                self.load(cpu)
            self.branches.far(source, cpu.registers.linear_rip)

    def _step(self, cpu: Cpu) -> Stop | None:
        """Execute until the emulator stops; None: it goes on."""
        watch = self.watch
        if watch.armed or self.accesses.active or not cpu.is_plain():
            if debugger.is_needed(cpu):
                return debugger.step(self, cpu)
            watch.arm(cpu)
        why, status = watch.execute(cpu)
        return exits.ended(self, cpu, why, status)

    # -- running in another thread -----------------------------------------------------------------

    def must_wait(self, cpu: Cpu) -> bool:
        """Whether a vCPU has to wait for its turn: others' turns may be under way."""
        return bool(self.busy) and cpu not in self.busy

    def _hand_out(self, cpu: Cpu, work: Callable[[Cpu], None]) -> Executing:
        cpu.kicked = cpu.worked = False
        self.busy.add(cpu)
        yields, cpu.yields = cpu.yields, False
        return Executing(work=lambda: work(cpu), kick=lambda: self.kick(cpu), yields=yields)

    def _no_work(self, cpu: Cpu) -> None:
        """It was the turn of others when this vCPU asked; now :meth:`run` executes it."""

    def work(self, cpu: Cpu) -> None:
        """Execute a vCPU, in any thread, until KVM is wanted; :meth:`run` then goes on with it."""
        cpu.worked = True
        others = self._current is not cpu
        self.load(cpu)
        if others:  # had their turns since run() was here
            self.branches.watch(cpu)
        self.meter.start(self.slice_bytes)
        self._working = cpu
        # Looked at behind the line above, kicks being lost otherwise: see kick().
        while not cpu.kicked and not cpu.stops and cpu.left is None and not self.meter.expired():
            if self._asks_kvm(cpu):
                break
            stop = self._deliver(cpu)
            if stop is not None:
                cpu.stops.append(stop)
            elif debugger.is_needed(cpu):
                break
            else:
                self._execute_aside(cpu)
        self._working = None
        cpu.guest_ns += self.meter.used() // BYTES_PER_NS

    def _execute_aside(self, cpu: Cpu) -> None:
        self.watch.arm(cpu)
        why, status = self.watch.execute(cpu)
        exception = why is Why.INTERRUPT and self.watch.vector not in _KVMS_EXCEPTIONS
        alone = why is Why.SITE and exits.needs_nobody(self.watch.site)
        if exception or alone or why in _OWN_BUSINESS:
            stop = exits.ended(self, cpu, why, status)
            if stop is not None:
                cpu.stops.append(stop)
        else:
            cpu.left = (why, status)

    def kick(self, cpu: Cpu) -> None:
        """Make :meth:`work` end soon, or as soon as it begins; from any thread."""
        cpu.kicked = True
        if self._working is cpu:
            self.meter.kick()

    def withdraw(self, cpu: Cpu) -> bool:
        """A vCPU leaves the guest for other reasons; what :meth:`work` came to is kept.

        Returns:
            Whether it has executed since it was handed out. If not, others may be executing, and
            nothing of the emulator may be touched.
        """
        self.busy.discard(cpu)
        self._outside = True
        if not cpu.worked:
            return False
        left, cpu.left = cpu.left, None
        if left is not None and (left[0] is Why.INTERRUPT or self.watch.expects_lock):
            stop = exits.ended(self, cpu, *left)
            if stop is not None:
                cpu.stops.append(stop)
        # Everything else is met again: RIP is at the instruction, which did nothing yet.
        if self.busy and self._current is cpu:
            self._save()
        return True
