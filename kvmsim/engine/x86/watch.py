"""What is watched while a guest executes: its sites, its exceptions, its accesses to no memory.

Everything here happens inside callbacks of the emulator, which may only take notes and stop: the
engine acts on the notes when the emulator has returned. They may come in another thread than
KVM's, and touch nothing of KVM's.

How a bus lock is found: a callback before each locked instruction computes the address of its
operand. Where the operand stays within a cache line of memory known to be write-back, that is all.
Else, if the page tables let the access happen, it will be a bus lock:

* trap-like: a callback before the *next* instruction stops the guest, the lock just taken;
* fault-like: the guest stops in front, and passes once the lock is admitted.

A fault of the locked instruction itself leaves RIP on it, which is how a lock that was not taken is
told from one that was. Translated blocks come to know a new callback only by being dropped.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import breakpoints, control, descriptor_locks, faults, paging, sites
from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86.code_watch import CodeWatch
from kvmsim.engine.x86.delivery import DB
from kvmsim.engine.x86.lock_code import FAULT_LIKE, TRAP_LIKE, Expected, LockCode
from kvmsim.engine.x86.memory import NoMemory
from kvmsim.engine.x86.registers import (
    CC_OP,
    CC_SRC,
    EFLAGS,
    FLAG_RF,
    FLAG_TF,
    RIP,
    STATUS_FLAGS,
    U32,
    U64,
)
from kvmsim.engine.x86.sites import Kind, Site

if TYPE_CHECKING:
    from kvmsim.engine.base import BusLock
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.operands import Operands
    from kvmsim.engine.x86.policy import Policy
    from kvmsim.engine.x86.registers import Registers
    from kvmsim.engine.x86.vm import X86Vm

PAGE = 4096
CR4_UMIP = 1 << 11
LOCKS = (Kind.LOCK, Kind.DESCRIPTOR)
ENGINES = (Kind.SENSITIVE, Kind.UNDEFINED)


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
    BREAKPOINT = auto()  # in front of an instruction with a breakpoint


# Every stop comes by here, and to look a member up takes Python 3.11 some 50 ns.
NOTHING, NEW_SITES, LOCK, LOCKED = Why.NOTHING, Why.NEW_SITES, Why.LOCK, Why.LOCKED
INTERRUPT, INVALID, ACCESS, SITE = Why.INTERRUPT, Why.INVALID, Why.ACCESS, Why.SITE
_RIP, _EFLAGS = RIP // 8, EFLAGS // 8
#: The emulator's ``cc_op`` of flags that are not to be computed.
_FLAGS_ARE_SETTLED = 1


class Watch:
    """The notes of one VM's emulator.

    Args:
        vm: the VM.
        operands: memory types of locked operands.

    Attributes:
        armed: there are code breakpoints.
        site: the site at which the emulator stopped.
        vector: of the exception that stopped it.
        access: kind, guest-physical address, size and value of the access that did.
        stepping: sites are passed without a look.
        fell_short: a bus lock was expected and not taken.
    """

    def __init__(self, vm: X86Vm, operands: Operands) -> None:
        self._vm = vm
        self._unicorn = vm.unicorn
        self._live = vm.live
        self._q = vm.live.q
        self._operands = operands
        self._sites: dict[int, Site] = {}
        self._code = CodeWatch(vm.unicorn.native)
        self._expected = Expected()
        self._why = NOTHING
        self._new_code: list[tuple[int, int]] = []
        self._flush_code = False
        self._cpu: Cpu | None = None
        self._points: frozenset[int] = frozenset()
        self._points_hooked: set[int] = set()
        self.armed = False
        native = vm.unicorn.native
        self._lock_code = None
        self._opened = 0
        self._go_on = self._start_at_rip if native is None else native.go_on
        self._settles = native is not None
        if native is not None:
            address, pages = vm.unicorn.env_address, operands.calm_pages
            self._lock_code = LockCode(native, address, pages, self._expected)
        self._source = self._operation = 0
        self.site: Site | None = None
        self.vector = 0
        self.access: tuple[int, int, int, int] | None = None
        self.stepping = False
        self.fell_short = False
        vm.unicorn.hook_interrupts(self._on_interrupt)
        vm.unicorn.hook_invalid(self._on_invalid)
        vm.unicorn.hook_blocks_made(self._on_block_made)

    # -- executing ---------------------------------------------------------------------------------

    def execute(self, cpu: Cpu) -> tuple[Why, int]:
        """Let the emulator run once; why it stopped and its error number."""
        self._cpu = cpu
        self._why = NOTHING
        self.site = None
        registers, policy = cpu.registers, self._vm.policy
        fault_like = policy.fault_like
        self._open(cpu, policy)
        steps = registers.q[_EFLAGS] & FLAG_TF
        dr6 = registers.debug(6) if steps else 0
        status = self._go_on()
        if self._opened == FAULT_LIKE:
            self._read_admissions(cpu)
        elif not fault_like and self._why is NOTHING and self._expected.lock:
            self._why = LOCKED  # machine code stopped
        why = self._why
        if not self._settles:
            registers.settle_flags(self._unicorn.flags())
        if why is INTERRUPT or why is INVALID or why is ACCESS:
            self._settle_faulting_flags(registers)
        if steps and why is INTERRUPT and self.vector == DB:
            # The emulator has set BS; DR6 changes when the #DB is delivered.
            registers.set_debug(6, dr6)
        if self._flush_code:
            self._unicorn.flush_code()
            self._flush_code = False
        if self._new_code:
            for begin, end in self._new_code:
                self._unicorn.drop_code(begin, end)
            self._new_code.clear()
        if self._vm.branches.active:
            trapped = why is INTERRUPT and self.vector == DB
            self._vm.branches.stopped(trapped=trapped)
        return why, status

    def _start_at_rip(self) -> int:
        return self._unicorn.start(self._q[_RIP])

    def take(self, cpu: Cpu) -> BusLock | None:
        """A bus lock that was expected: taken, if RIP went on. None for one that was admitted."""
        expected = self._expected
        self.fell_short = False
        if not expected.lock:
            return None
        expected.lock = 0
        if cpu.registers.q[_RIP] == expected.rip:
            self.fell_short = True
            return None
        if self._vm.policy.fault_like:
            self.admitted(cpu)
            return None
        cpu.bus_locks += 1
        stop = cpu.bus_lock
        stop.bus_lock = False
        return stop

    def admitted(self, cpu: Cpu) -> None:
        """A fault-like bus lock was admitted before, and is taken."""
        cpu.admitted = self._expected.admitted = -1
        cpu.bus_locks += 1

    def _open(self, cpu: Cpu, policy: Policy) -> None:
        """Whether machine code may find bus locks by itself, this time."""
        opened = FAULT_LIKE if policy.fault_like else TRAP_LIKE
        detects = cpu.detects_splits
        if self.stepping or policy.split_lock_ac or (detects is not None and detects()):
            opened = 0
        if opened != self._opened:
            self._opened = opened
            self._expected.open = opened
        if opened == FAULT_LIKE:
            self._expected.admitted = cpu.admitted

    def _read_admissions(self, cpu: Cpu) -> None:
        """What machine code did about fault-like bus locks."""
        expected = self._expected
        if expected.passed:
            cpu.bus_locks += expected.passed
            cpu.admitted = -1
            expected.passed = 0
        if expected.stopped:
            self._why, self.site = LOCK, self._sites[expected.stopped]
            expected.stopped = 0

    def arm(self, cpu: Cpu) -> None:
        """Stop in front of the code breakpoints a vCPU has at this moment, and at no data."""
        self._vm.accesses.rest()
        if not self._points and not self._q[_EFLAGS] & FLAG_RF and not breakpoints.armed(cpu):
            return
        self._points = breakpoints.code_addresses(cpu) if breakpoints.armed(cpu) else frozenset()
        self.armed = bool(self._points)
        if not self._points:
            # Nobody asks, and the emulator would keep it for a whole block.
            self._live.resumed()
        missing = self._points - self._points_hooked
        for address in missing:
            self._unicorn.hook_code(partial(self._at_breakpoint, address), address)
        if missing:
            self._points_hooked |= missing
            self._unicorn.flush_code()

    # -- callbacks; they may only take notes and stop ---------------------------------------------

    def _stop(self, why: Why) -> None:
        self._why = why
        self._unicorn.stop()

    def _hook(self, site: Site) -> None:
        """Have the emulator stop by at a site from now on."""
        if self._hook_machine_code(site):
            return
        watch = site.watch
        if watch is not None and not site.exchanges_pairs:
            site.calm = self._operands.calm
            self._unicorn.hook_code(watch(self._q, site, self._look), site.address)
        elif site.kind is Kind.NEXT:
            self._unicorn.hook_code(lambda: self._behind(site), site.address)
        else:
            self._unicorn.hook_code(lambda: self._look(site), site.address)

    def _hook_machine_code(self, site: Site) -> bool:
        """The same where machine code can tell that there is nothing to see."""
        if self._lock_code is None:
            return False
        if site.kind is Kind.NEXT:
            callback = self._unicorn.callback(lambda: self._behind(site))
            self._unicorn.hook_code_at(self._lock_code.behind(callback), site.address)
            return True
        if site.kind is not Kind.LOCK or site.exchanges_pairs:
            return False
        callback = self._unicorn.callback(lambda: self._look(site))
        code = self._lock_code.in_front(site, callback)
        if code is None:
            return False
        self._unicorn.hook_code_at(code, site.address)
        return True

    def _disturb(self, site: Site) -> None:
        """Look at every execution of a site from now on."""
        site.calm = frozenset()
        if self._lock_code is not None:
            self._lock_code.never_calm(site.address)

    def _behind(self, site: Site) -> None:
        """Execution gets to where a bus lock may just have been taken."""
        self._met()
        if self._expected.lock and not self.stepping:
            if not self._vm.policy.fault_like:
                self._stop(LOCKED)
                return
            self._confirm()
        if site.kind is not Kind.NEXT:
            self._look(site)

    def _confirm(self) -> None:
        """Execution got behind a bus lock that was admitted."""
        assert self._cpu is not None
        self._expected.lock = 0
        self.admitted(self._cpu)

    def _at_breakpoint(self, address: int) -> None:
        self._met()
        if self._why is NOTHING and not self.stepping and self._breaks(address):
            self._stop(Why.BREAKPOINT)

    def _breaks(self, address: int) -> bool:
        return address in self._points and not self._live.flags & FLAG_RF

    def _look(self, site: Site) -> None:
        self._met()
        if self.stepping or self._why is not NOTHING or self._is_behind_a_lock():
            return
        if site.ambiguous:
            found = self._site_now(site.address)
            if found is None:
                return
            site = found
        if self._points and self._breaks(site.address):
            self._stop(Why.BREAKPOINT)
            return
        kind = site.kind
        if site.exchanges_pairs and self._live.d[CC_OP // 4] != _FLAGS_ARE_SETTLED:
            self._stop(NEW_SITES)  # it is met again, with flags that are settled
        elif kind in LOCKS:
            self._look_at_operand(site)
        elif kind in ENGINES or self._refused(site) or self._window_asked(site):
            self.site = site
            self._stop(SITE)

    def _is_behind_a_lock(self) -> bool:
        """Whether the lock that was expected stops the guest here: taken, and trap-like."""
        if not self._expected.lock:
            return False
        if self._live.rip == self._expected.rip:
            self._expected.lock = 0
        elif self._vm.policy.fault_like:
            self._confirm()
        else:
            self._stop(LOCKED)
            return True
        return False

    def _refused(self, site: Site) -> bool:
        """Whether an instruction the emulator would execute is #GP."""
        live, found = self._live, site.found
        if site.kind is Kind.SYSTEM_STATE:
            return bool(live.cr4 & CR4_UMIP and live.cpl)
        if site.kind is not Kind.MAPPING:
            return False
        self._operands.forget()
        if found is None or found.operand is not None or live.cpl:
            return False
        value = self._q[found.rm] & (U64 if live.mode == 64 else U32)
        return control.refuses(live, found.reg, value)

    def _window_asked(self, site: Site) -> bool:
        cpu = self._cpu
        if site.kind is Kind.PAUSE:
            # Where turns end otherwise may be where a spinning guest has the lock, every time.
            return len(self._vm.busy) > 1
        if site.kind is not Kind.WINDOW or cpu is None:
            return False
        if self._points or cpu.nmi_masked:
            return True
        return cpu.wants_window or cpu.interrupt is not None

    def _look_at_operand(self, site: Site) -> None:
        if site.kind is Kind.LOCK:
            assert site.locate is not None
            self._look_at_lock(site, site.locate(self._q), site.size)
            return
        assert self._cpu is not None
        assert site.found is not None
        at = descriptor_locks.updated(self._cpu, site.found)
        if at is not None:
            self._look_at_lock(site, at, descriptor_locks.BYTES, user=False)

    def _look_at_lock(self, site: Site, at: int, size: int, *, user: bool | None = None) -> None:
        cpu = self._cpu
        assert cpu is not None
        split, locks = self._operands.classify(cpu.mtrrs, at, size, user=user)
        if not locks:
            return
        if split and self._raises_ac(cpu):
            self.site = site
            self._stop(SITE)
            return
        self.site = site
        if self._vm.policy.fault_like and cpu.admitted != site.address:
            self._stop(LOCK)
            return
        self._expect(site)

    def _raises_ac(self, cpu: Cpu) -> bool:
        detects = cpu.detects_splits
        return self._vm.policy.split_lock_ac or (detects is not None and detects())

    def _expect(self, site: Site) -> None:
        """The instruction is about to take a bus lock; have somebody look behind it."""
        following = self._sites.get(site.following)
        if following is None:
            following = self._sites[site.following] = Site(site.following, Kind.NEXT)
            self._hook(following)
            # Everything goes: the same code may be translated for other address spaces too.
            self._flush_code = True
            self._stop(NEW_SITES)
            return
        if self._lock_code is None:
            following.calm = frozenset()
        else:
            self._lock_code.arm(site)
        self._expected.lock, self._expected.rip = 1, self._live.rip

    def _met(self) -> None:
        """Note where execution is, and the operand of flags."""
        self._expected.met_rip = self._q[_RIP]
        self._expected.met_source = self._q[CC_SRC // 8]

    def _note_flags(self) -> None:
        """An instruction faults: note what its flags are to be computed of."""
        self._source = self._q[CC_SRC // 8]
        self._operation = self._live.d[CC_OP // 4]

    def flags_computed(self, registers: Registers, found: d.Instruction) -> None:
        """Put the flags right of an instruction that computes them before it accesses memory.

        The emulator forgets at the fault that it did: RCL, RCR and some SETcc would go on with
        wrong ones when they are tried again.
        """
        if faults.computes_flags(found, self._operation):
            registers.flags = registers.flags & ~STATUS_FLAGS | self._source & STATUS_FLAGS

    def _settle_faulting_flags(self, registers: Registers) -> None:
        """Put the flags right of an instruction that has a callback and faulted.

        For the callback the emulator computed them and keeps them as the operand of flags it has
        computed; but at a fault it takes the operand for one of the computation that came before.
        """
        same = self._expected.met_rip == registers.q[_RIP]
        if same and self._source != self._expected.met_source:
            registers.flags = registers.flags & ~STATUS_FLAGS | self._source & STATUS_FLAGS

    def _on_interrupt(self, vector: int) -> None:
        self._note_flags()
        self.vector = vector
        self._stop(INTERRUPT)

    def _on_invalid(self) -> None:
        self._note_flags()
        self._stop(INVALID)

    def on_access(self, kind: int, gpa: int, size: int, value: int) -> None:
        """An access does not go through."""
        self._note_flags()
        self.access = (kind, gpa, size, value)
        self._why = ACCESS

    def _on_block_made(self, address: int, size: int) -> None:
        if self._live.checks_alignment and not self._live.flags & FLAG_TF:
            # The vCPU checks alignment since some instruction just now: debugger.is_needed.
            self._new_code.append((address, address + size))
            self._stop(NEW_SITES)
            return
        code = self.read_code(address, size, watch=True)
        self._vm.branches.made(address, code)
        met = any(at in self._sites for at in range(address, address + size))
        if not met and not d.INTERESTING.search(code):
            return
        code = self.read_code(address, size + d.MAX_LENGTH)
        made = sites.sites_in(code, address, self._live.mode, size)
        found = {site.address: site for site in made}
        for at in range(address, address + size):
            known = self._sites.get(at)
            if known is None or (known.kind is Kind.NEXT and at not in found):
                continue
            if known.kind is Kind.NEXT and self._lock_code is not None:
                continue  # machine code there calls nobody; the real thing gets its own
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
        self._stop(NEW_SITES)

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
            self._disturb(site)

    def read_code(self, address: int, size: int, *, watch: bool = False) -> bytes:
        """Code at a linear address, as much as is there.

        Args:
            address: linear address.
            size: how much is wanted, in bytes.
            watch: watch it for changes by the host from now on.
        """
        memory, code = self._vm.memory, b""
        while len(code) < size:
            at = address + len(code)
            length = min(size - len(code), PAGE - at % PAGE)
            try:
                gpa = paging.locate(self._live, memory, at)
                piece = memory.read(gpa, length)
            except (paging.PageFault, NoMemory):
                break
            slot = memory.find(gpa) if watch else None
            if slot is not None:
                self._code.add(slot, gpa, piece)
            code += piece
        return code

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

    @property
    def expects_lock(self) -> bool:
        """Whether a bus lock was about to be taken: :meth:`take` says whether it was."""
        return bool(self._expected.lock)

    def forget_code(self) -> None:
        """Forget all translations and what was watched for their sake."""
        self._unicorn.flush_code()
        self._code.clear()

    def close(self) -> None:
        """The emulator ends: hold no guest memory any more."""
        self._code.clear()

    def check_code(self) -> None:
        """Forget translations of code that user space has changed since it was translated."""
        if self._code.changed():
            self.forget_code()
