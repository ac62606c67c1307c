"""A guest of real x86 code: one emulator, its sites, and the loop from stop to stop.

One emulator serves all vCPUs of a VM, one at a time: two of them would not be atomic towards each
other, and this way they share translated code. A vCPU's registers are either in the emulator or in
its saved copy; :meth:`X86Vm.load` moves them.

How a bus lock is found: a callback before each locked instruction computes the address of its
operand. Where the operand stays within a cache line of memory known to be write-back, that is all.
Else, if the page tables let the access happen, it will be a bus lock:

* trap-like: a callback before the *next* instruction stops the guest, the lock just taken;
* fault-like: the guest stops in front, and passes once the lock is admitted.

A fault of the locked instruction itself leaves RIP on it, which is how a lock that was not taken is
told from one that was. Translated blocks come to know a new callback only by being dropped.

Guest time is counted in bytes of code of the blocks entered, four of which stand for one
instruction and one cycle; exceptions and bus locks take more. Counting is exact from run to run,
not towards any real processor.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from kvmsim.engine.base import BusLock, Debug, InKernel, InternalError, IrqWindow, Shutdown
from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import delivery, instructions, mmio, paging, sites
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.backend import CODE_BYTES, Unicorn
from kvmsim.engine.x86.branches import BranchFeed
from kvmsim.engine.x86.cpu import Cpu
from kvmsim.engine.x86.delivery import AC, DB, UD, Event, Fault, TripleFault, Unsupported
from kvmsim.engine.x86.memory import Memory, NoMemory
from kvmsim.engine.x86.meter import Meter
from kvmsim.engine.x86.operands import Operands
from kvmsim.engine.x86.sites import Kind, Site

if TYPE_CHECKING:
    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.memory import Slot
    from kvmsim.engine.x86.policy import Policy

SLICE_BYTES = 12_000_000
BYTES_PER_NS = 12
BUS_LOCK_NS = 333
PAGE = 4096
DR6_BS = 1 << 14
STI, SYSCALL, SYSENTER, WRMSR = 0xFB, 0x0F05, 0x0F34, 0x0F30
#: Whether the last exception came of an INT instruction; a 32-bit word of the emulator's state.
EXCEPTION_IS_INT = 5388 // 4
#: What an exception, or an instruction the engine executes, costs, in bytes of code.
EXIT_BYTES = 400


class Why(Enum):
    """Why the emulator stopped."""

    NOTHING = auto()
    NEW_SITES = auto()
    SITE = auto()  # an instruction the engine executes or refuses
    LOCK = auto()  # fault-like: in front of a bus lock
    LOCKED = auto()  # trap-like: behind one
    INTERRUPT = auto()
    INVALID = auto()
    ACCESS = auto()  # memory that is not there


class X86Vm:
    """One VM.

    Args:
        slots: its memory.
        policy: what its processors are like.
        slice_bytes: bytes of code a vCPU executes at most before it stops for no other reason. It
            must be more than any block of the guest's has, or the guest gets nowhere; a page is
            enough.
        code_bytes: room for translated code; see ``Unicorn``.

    Raises:
        ConfigError: Unicorn is not there, or another release.
    """

    def __init__(
        self,
        slots: list[Slot],
        policy: Policy,
        *,
        slice_bytes: int = SLICE_BYTES,
        code_bytes: int = CODE_BYTES,
    ) -> None:
        self.policy = policy
        self.memory = Memory(slots)
        self.slice_bytes = slice_bytes
        self.unicorn = Unicorn(code_bytes)
        self._blank = bytes(self.unicorn.env)
        self._live = r.Registers(self.unicorn.env)
        self._q = self._live.q
        self._current: Cpu | None = None
        self._stale_translations = False
        self.meter = Meter(self.unicorn)
        self._sites: dict[int, Site] = {}
        self._operands = Operands(self._live, self.memory)
        self._watched: dict[int, tuple[memoryview, bytes]] = {}
        self._pending: Site | None = None
        self._pending_rip = 0
        self._why = Why.NOTHING
        self._site: Site | None = None
        self._vector = 0
        self._new_code: list[tuple[int, int]] = []
        self._flush_code = False
        self._fell_short = False
        self._branches = BranchFeed(self)
        self.access: tuple[int, int, int, int] | None = None
        self.stepping = False
        self._install()

    def add_cpu(self) -> Cpu:
        """Make a vCPU, in its state after power-on."""
        return Cpu(self, self._blank)

    def close(self) -> None:
        """Free the emulator; vCPUs keep their saved state."""
        if self._current is not None:
            self._save()
        self._live = r.Registers(memoryview(bytearray(self._blank)))
        self._q = self._live.q
        self.unicorn.close()

    def _install(self) -> None:
        unicorn = self.unicorn
        for slot in self.memory.slots:
            unicorn.map(slot.gpa, len(slot.memory), slot.address, writable=not slot.read_only)
        unicorn.hook_interrupts(self._on_interrupt)
        unicorn.hook_invalid(self._on_invalid)
        unicorn.hook_blocks_made(self._on_block_made)
        # Bounded to where there is no memory: a hook over memory makes every store there slow.
        callback = unicorn.memory_callback(self._on_access)
        for begin, end in self.memory.holes():
            unicorn.hook_memory(callback, begin, end)
        for slot in self.memory.slots:
            if slot.read_only:
                unicorn.hook_memory(callback, slot.gpa, slot.end - 1)

    # -- whose registers are where ---------------------------------------------------------------

    def load(self, cpu: Cpu) -> None:
        """Put a vCPU's registers into the emulator."""
        if self._current is not cpu:
            if self._current is not None:
                self._save()
            self.unicorn.env[:] = cpu.saved
            cpu.use(self._live)
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
        return self._live.mode

    @property
    def linear_rip(self) -> int:
        """Linear address of that vCPU's next instruction."""
        return self._live.linear_rip

    def translation_changed(self) -> None:
        """Address translation is another from now on."""
        self._stale_translations = True
        self.forget_types()

    def forget_types(self) -> None:
        """Memory types are others from now on."""
        self._operands.forget()

    # -- callbacks of the emulator; they may only take notes and stop ------------------------------

    def _stop(self, why: Why) -> None:
        self._why = why
        self.unicorn.stop()

    def _hook(self, site: Site) -> None:
        """Have the emulator stop by at a site from now on."""
        watch = site.watch
        if watch is not None:
            site.calm = self._operands.calm
            self.unicorn.hook_code(watch(self._q, site, self._look), site.address)
        elif site.kind is Kind.NEXT:
            self.unicorn.hook_code(lambda: self._behind(site), site.address)
        else:
            self.unicorn.hook_code(lambda: self._look(site), site.address)

    def _behind(self, site: Site) -> None:
        """Execution gets to where a bus lock may just have been taken."""
        if self._pending is not None and not self.stepping:
            self._why = Why.LOCKED
            self.unicorn.stop()
        elif site.kind is not Kind.NEXT:
            self._look(site)

    def _look(self, site: Site) -> None:
        if self.stepping:
            return
        pending = self._pending
        if pending is not None:
            if site.address != pending.address:
                self._stop(Why.LOCKED)
                return
            self._pending = None
        if site.ambiguous:
            found = self._site_now(site.address)
            if found is None:
                return
            site = found
        kind = site.kind
        if kind is Kind.LOCK:
            self._look_at_lock(site)
        elif kind is Kind.MAPPING:
            self.forget_types()
        elif kind is Kind.SENSITIVE or kind is Kind.UNDEFINED or self._window_asked(site):
            self._site = site
            self._stop(Why.SITE)

    def _window_asked(self, site: Site) -> bool:
        cpu = self._current
        if site.kind is not Kind.WINDOW or cpu is None:
            return False
        return cpu.wants_window or cpu.interrupt is not None

    def _look_at_lock(self, site: Site) -> None:
        assert site.locate is not None
        cpu = self._current
        assert cpu is not None
        split, locks = self._operands.classify(cpu.mtrrs, site.locate(self._q), site.size)
        if not locks:
            return
        if split and self.policy.split_lock_ac:
            self._site = site
            self._stop(Why.SITE)
            return
        self._site = site
        if not self.policy.fault_like:
            self._expect(site)
            return
        if cpu.admitted != site.address:
            self._stop(Why.LOCK)
            return
        cpu.admitted = -1
        cpu.bus_locks += 1

    def _expect(self, site: Site) -> None:
        """The instruction is about to take a bus lock; have somebody look behind it."""
        following = self._sites.get(site.following)
        if following is None:
            following = self._sites[site.following] = Site(site.following, Kind.NEXT)
            self._hook(following)
            # Everything goes: the same code may be translated for other address spaces too.
            self._flush_code = True
            self._stop(Why.NEW_SITES)
            return
        following.calm = frozenset()
        self._pending = site
        self._pending_rip = self._live.rip

    def _on_interrupt(self, vector: int) -> None:
        self._vector = vector
        self._stop(Why.INTERRUPT)

    def _on_invalid(self) -> None:
        self._stop(Why.INVALID)

    def _on_access(self, kind: int, gpa: int, size: int, value: int) -> None:
        self.access = (kind, gpa, size, value)
        self._why = Why.ACCESS

    def _on_block_made(self, address: int, size: int) -> None:
        code = self.read_code(address, size)
        self._branches.made(address, code)
        met = any(at in self._sites for at in range(address, address + size))
        if not met and not d.INTERESTING.search(code):
            return
        found = {site.address: site for site in sites.sites_in(code, address, self._live.mode)}
        for at in range(address, address + size):
            known = self._sites.get(at)
            if known is None or (known.kind is Kind.NEXT and at not in found):
                continue
            if known.kind is Kind.NEXT:
                # Its hook stays; what it looks at is the real thing now.
                other = found.pop(at)
                known.kind, known.found, known.mode = other.kind, other.found, other.mode
                known.locate, known.room = other.locate, other.room
            else:
                self._compare(known, found.pop(at, None))
        if not found:
            return
        for at, site in found.items():
            self._sites[at] = site
            self._hook(site)
        self._new_code.append((address, address + size))
        self._stop(Why.NEW_SITES)

    def _compare(self, site: Site, other: Site | None) -> None:
        """One address, met again in a block: is it the same instruction?"""
        same = (
            other is not None
            and other.found is not None
            and site.found is not None
            and (site.found.code, site.mode) == (other.found.code, other.mode)
        )
        if not same:
            # In another address space, or before the code was changed, something else was here.
            site.ambiguous = True
            site.calm = frozenset()

    def read_code(self, address: int, size: int) -> bytes:
        """Code at a linear address; its pages are watched for changes by the host from now on."""
        code = b""
        while len(code) < size:
            at = address + len(code)
            length = min(size - len(code), PAGE - at % PAGE)
            try:
                gpa = paging.translate(self._live, self.memory, at, touch=False).gpa
                code += self.memory.read(gpa, length)
                self._watch(gpa & -PAGE)
            except (paging.PageFault, NoMemory):
                break
        return code

    def _watch(self, page: int) -> None:
        slot = self.memory.find(page)
        if page not in self._watched and slot is not None:
            view = slot.memory[page - slot.gpa : page - slot.gpa + PAGE]
            self._watched[page] = (view, bytes(view))

    def _site_now(self, address: int) -> Site | None:
        """What is at an address at this moment."""
        code = self.read_code(address, d.MAX_LENGTH)
        found = d.decode(code, 0, self._live.mode)
        kind = None if found is None else sites.kind_of(found)
        if found is None or kind is None:
            return None
        site = sites.make(address, kind, found, self._live.mode)
        site.ambiguous = True
        return site

    # -- running -----------------------------------------------------------------------------------

    def run(self, cpu: Cpu) -> Stop:
        """Execute a vCPU until something stops it.

        Returns:
            The stop. RIP is where the stop says: at the instruction for ports, MMIO and fault-like
            bus locks, behind it for HLT and trap-like ones. ``after_ns`` is guest time since the
            last stop; ``insn_len`` is always 0, for RIP is right already.
        """
        if cpu.pending and not cpu.stops:
            msg = "the last stop was not completed"
            raise RuntimeError(msg)
        self.load(cpu)
        self._check_code()
        self._branches.watch(cpu)
        began_ns = cpu.guest_ns
        self.meter.start(self.slice_bytes)
        stop = self._run(cpu)
        cpu.guest_ns += self.meter.used() // BYTES_PER_NS
        if isinstance(stop, BusLock) or stop.bus_lock:
            cpu.guest_ns += BUS_LOCK_NS
        stop.cpl = cpu.registers.cpl
        stop.after_ns = cpu.guest_ns - began_ns
        return stop

    def _run(self, cpu: Cpu) -> Stop:
        while True:
            if cpu.stops:
                return cpu.stops.pop(0)
            if self.meter.expired():
                return InKernel()
            try:
                stop = self._deliver(cpu) or self._step(cpu)
            except TripleFault:
                return Shutdown()
            except Unsupported:
                return InternalError(suberror=3)
            if stop is not None:
                return stop

    def _deliver(self, cpu: Cpu) -> Stop | None:
        """Deliver what is queued; the stop of a VMM that waits for a window."""
        if cpu.interrupt is not None and cpu.interruptible:
            cpu.queue(Event(cpu.interrupt, external=True))
            cpu.interrupt = None
        while cpu.events:
            event = cpu.events.pop(0)
            source = cpu.registers.linear_rip - event.length
            delivery.inject(cpu.registers, self.memory, event)
            self._branches.far(source, cpu.registers.linear_rip)
        if cpu.wants_window and cpu.interruptible:
            cpu.wants_window = False
            return IrqWindow()
        return None

    def _step(self, cpu: Cpu) -> Stop | None:
        """Execute until the emulator stops; None: it goes on."""
        if cpu.single_step:
            return self._step_for_debugger(cpu)
        why, status = self.execute(cpu)
        taken = self._take(cpu)
        if taken is not None:
            if why is Why.INTERRUPT and self._vector == DB:
                self._trap(cpu)  # it would not come again
            return taken
        if why is Why.NOTHING:
            if self.meter.expired():
                return None
            # HLT is a site and never gets here.
            return InternalError(suberror=1, data=(status, cpu.registers.linear_rip))
        return self.handle(cpu, why)

    def execute(self, cpu: Cpu) -> tuple[Why, int]:
        """Let the emulator run once; why it stopped and its error number."""
        self._why = Why.NOTHING
        self._site = None
        status = self.unicorn.start(cpu.registers.rip)
        cpu.registers.settle_flags(self.unicorn.flags())
        if self._flush_code:
            self.unicorn.flush_code()
            self._flush_code = False
        if self._new_code:
            for begin, end in self._new_code:
                self.unicorn.drop_code(begin, end)
            self._new_code.clear()
        self._branches.stopped()
        return self._why, status

    def _take(self, cpu: Cpu) -> Stop | None:
        """A bus lock that was expected: taken, if RIP went on."""
        pending, self._pending = self._pending, None
        self._fell_short = pending is not None and cpu.registers.rip == self._pending_rip
        if pending is None or self._fell_short:
            return None
        cpu.bus_locks += 1
        return BusLock(cpl=cpu.registers.cpl)

    def handle(self, cpu: Cpu, why: Why) -> Stop | None:
        """What an end of execution means; None: the guest goes on."""
        stop: Stop | None = None
        if why is not Why.NEW_SITES:
            self.meter.charge(EXIT_BYTES)
        if why is Why.LOCK:
            site = self._site
            assert site is not None
            cpu.admitted = site.address
            return BusLock(cpl=cpu.registers.cpl)
        if why is Why.SITE:
            stop = self._at_site(cpu)
        elif why is Why.INTERRUPT:
            self._interrupted(cpu)
        elif why is Why.INVALID:
            cpu.queue(Event(UD))
        elif why is Why.ACCESS:
            stop = mmio.stopped(self, cpu)
            if self._fell_short:
                # Locked before it turned out that nothing answers: the lock rides on the exit.
                stop.bus_lock = True
                cpu.bus_locks += 1
        return stop

    def _at_site(self, cpu: Cpu) -> Stop | None:
        site = self._site
        assert site is not None
        assert site.found is not None
        if site.kind is Kind.UNDEFINED:
            cpu.queue(Event(UD))
        elif site.kind is Kind.LOCK:
            cpu.queue(Event(AC))
        elif site.kind is Kind.WINDOW:
            why = self.single(cpu, restores_flags=site.found.opcode != STI)
            return None if why is Why.NOTHING else self.handle(cpu, why)
        else:
            return self._execute_site(cpu, site)
        return None

    def _execute_site(self, cpu: Cpu, site: Site) -> Stop | None:
        assert site.found is not None
        if site.found.locked:
            cpu.queue(Event(UD))
            return None
        traps = cpu.registers.flags & r.FLAG_TF
        at = cpu.registers.linear_rip
        try:
            stop = instructions.execute(cpu, site.found)
        except Fault as fault:
            self.raise_fault(cpu, fault)
            return None
        if site.found.opcode in {SYSCALL, SYSENTER}:
            self._branches.far(at, cpu.registers.linear_rip)
        elif site.found.opcode == WRMSR:
            self._branches.watch(cpu)
        if traps and stop is None:
            self._trap(cpu)
        return stop

    def raise_fault(self, cpu: Cpu, fault: Fault) -> None:
        """Queue the exception of an instruction the engine executed."""
        if fault.address is not None:
            cpu.registers.cr2 = fault.address
        cpu.queue(Event(fault.vector, fault.code))

    def _interrupted(self, cpu: Cpu) -> None:
        """An exception, or INT n with RIP behind it already."""
        vector, registers = self._vector, cpu.registers
        software = bool(registers.d[EXCEPTION_IS_INT])
        if vector == DB and not software:
            self._trap(cpu)
            return
        code = registers.error_code if vector in delivery.WITH_CODE and not software else 0
        length = self._int_length(cpu, vector) if software else 0
        cpu.queue(Event(vector, code, software=software, length=length))

    def _int_length(self, cpu: Cpu, vector: int) -> int:
        """Bytes of the INT3, INTO or INT n just behind which RIP is."""
        last = self.read_code(cpu.registers.linear_rip - 1, 1)
        return 1 if (last, vector) in {(b"\xcc", delivery.BP), (b"\xce", delivery.OF)} else 2

    def _trap(self, cpu: Cpu) -> None:
        """A single step is over."""
        cpu.registers.set_debug(6, cpu.registers.debug(6) | DR6_BS)
        cpu.queue(Event(DB))

    def _step_for_debugger(self, cpu: Cpu) -> Stop | None:
        """Execute one instruction for a debugger in user space: it gets the #DB, not the guest."""
        registers = cpu.registers
        before, guests = registers.debug(6), registers.flags & r.FLAG_TF
        registers.flags |= r.FLAG_TF
        why, _status = self.execute(cpu)
        registers.flags &= ~r.FLAG_TF | guests
        taken = self._take(cpu)
        over = Debug(exception=DB, dr6=DR6_BS, dr7=registers.debug(7))
        if why is Why.INTERRUPT and self._vector == DB:
            registers.set_debug(6, before)
            if taken is not None:
                cpu.stops.append(over)
            return taken or over
        if taken is not None or why in {Why.NEW_SITES, Why.NOTHING}:
            return taken
        at = registers.rip
        stop = self.handle(cpu, why)
        return over if stop is None and why is Why.SITE and registers.rip != at else stop

    def single(self, cpu: Cpu, *, restores_flags: bool = False) -> Why:
        """Execute one instruction, unseen by the sites.

        Args:
            cpu: whose.
            restores_flags: the instruction loads the flags itself.

        Returns:
            Why the emulator stopped before the instruction ended; NOTHING: it is done.
        """
        registers = cpu.registers
        guests, before = registers.flags & r.FLAG_TF, registers.debug(6)
        why = Why.NEW_SITES
        while why is Why.NEW_SITES:
            registers.flags |= r.FLAG_TF
            self.stepping = True
            try:
                why, _status = self.execute(cpu)
            finally:
                self.stepping = False
            if not restores_flags or why is not Why.INTERRUPT:
                registers.flags &= ~r.FLAG_TF | guests
        if why is Why.INTERRUPT and self._vector == DB and not registers.d[EXCEPTION_IS_INT]:
            registers.set_debug(6, before)
            if guests:
                self._trap(cpu)
            return Why.NOTHING
        return why

    # -- code changed by the host ------------------------------------------------------------------

    def _check_code(self) -> None:
        """Forget translations of code that user space has changed since it was translated."""
        for view, copy in self._watched.values():
            if bytes(view) != copy:
                self.unicorn.flush_code()
                self._watched.clear()
                return
