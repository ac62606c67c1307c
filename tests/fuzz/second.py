"""The second engine: Bochs, in processes that may die.

``python -m fuzz.second`` reads pickled cases from its standard input and answers with pickled
outcomes. Guests run in a fork, one after the other, until one ends it: the package dies of triple
faults, and of long repetitions that a timer stops. The package has one processor, which is reset
for each of them, and does not notice code the host changes: what it keeps of code is forgotten.
"""

import ctypes
import mmap
import os
import pickle
import signal
import sys

from fuzz.explained import Seen, explanations, explanations_of_bytes
from fuzz.machine import PAGE, RAM_BYTES, Outcome, changed_pages, image, registers_of
from fuzz.opcodes import NOT_COMPARED, reads_flags, undefined_flags

from kvmsim.engine.x86 import decode as d

INSTRUCTIONS = 120
#: Of processor time: long repetitions are not worth more.
SECONDS = 0.3
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
RESET = "_ZN8BX_CPU_C5resetEj"
FORGET_CODE = "_Z12flushICachesv"
RESET_HARDWARE = 11
GP = 13
#: Exit status of a fork that has answered and cannot serve another guest.
SPENT = 9
PORTS = frozenset({0x6C, 0x6D, 0x6E, 0x6F, 0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF})


def load():
    """The package; its wheel names symbols newer than Debian 12's libc, never called."""
    sys.setdlopenflags(os.RTLD_LAZY)
    import bochscpu
    import bochscpu.cpu
    import bochscpu.memory

    return bochscpu


class Engine:
    """The package, and what all guests of a process share.

    Attributes:
        ram: memory.
        last: called with the outcome of a guest that ends the process; does not return.
    """

    def __init__(self, bochs, last):
        self.bochs = bochs
        self.last = last
        self.ram = mmap.mmap(-1, RAM_BYTES)
        # What a guest is given instead of memory that is not there, when it has ended by that.
        self._spare = mmap.mmap(-1, PAGE)
        self._spare_pages = []
        library = ctypes.CDLL(bochs._bochscpu.__file__)
        self._library = library
        self._cpu = ctypes.addressof(ctypes.c_char.in_dll(library, "bx_cpu"))
        self.session = bochs.Session()
        first = self._address(self.ram)
        for page in range(0, RAM_BYTES, PAGE):
            bochs.memory.page_insert(page, first + page)

    @staticmethod
    def _address(memory):
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def run(self, case):
        """The outcome of a guest."""
        self._library.cpu_clear_killbit(0)
        getattr(self._library, RESET)(ctypes.c_void_p(self._cpu), RESET_HARDWARE)
        getattr(self._library, FORGET_CODE)()
        guest = Run(self, case)
        guest.go()
        for gpa in self._spare_pages:
            self.bochs.memory.page_remove(gpa)
        self._spare_pages.clear()
        return guest.outcome

    def spare(self, gpa):
        """Have some memory at an address until the guest ends."""
        page = gpa & -PAGE
        self._spare_pages.append(page)
        self.bochs.memory.page_insert(page, self._address(self._spare))


class Run:
    """One guest."""

    def __init__(self, engine, case):
        self.engine = engine
        self.bochs = engine.bochs
        self.case = case
        self.ram = engine.ram
        self.before = bytes(image(case))
        self.ram[:] = self.before
        self.session = engine.session
        self.executed = []
        self.undefined = 0
        self.known, self.spared = set(), set()
        self.faults = 0
        self.outcome = None

    def go(self):
        bochs, case = self.bochs, self.case
        state = bochs.State()
        bochs.cpu.set_real_mode(state)
        segments, control, efer, tables = registers_of(case)
        for name, values in zip((*SEGMENTS, "ldtr", "tr"), segments, strict=True):
            setattr(state, name, self._segment(*values))
        for name, (base, limit) in zip(("gdtr", "idtr"), tables, strict=True):
            table = bochs.GlobalSegment()
            table.base, table.limit = base, limit
            setattr(state, name, table)
        state.cr0, state.cr2, state.cr3, state.cr4 = control
        state.efer = efer
        state.xcr0, state.mxcsr, state.mxcsr_mask = 1, 0x1F80, 0xFFFF
        state.dr6, state.dr7 = 0xFFFF0FF0, 0x400
        state.pat, state.apic_base = 0x0007040600070406, 0xFEE00900
        state.fpcw, state.fptw = 0x37F, 0xFFFF
        for name, value in zip(NAMES, case.general, strict=True):
            setattr(state, name, value)
        state.rip, state.rflags = 0x1000, case.flags
        self.session.cpu.state = state
        self.session.missing_page_handler = self._missing
        hook = bochs.Hook()
        hook.before_execution = self._before
        hook.hlt = lambda _session, _cpu: self._end("hlt")
        hook.exception = self._exception
        self.session.run([hook])
        if self.outcome is None:
            self._end("skip", "stopped by itself")

    def _segment(self, selector, base, limit, rights):
        segment = self.bochs.Segment()
        segment.present = bool(rights & 1 << 15)
        segment.selector, segment.base, segment.limit = selector, base, limit
        segment.attr = rights >> 8
        return segment

    def _missing(self, gpa):
        # The package does not stop here, and confuses the next stop with one that was asked for.
        self._end("mmio", f"{gpa:#x}", stops=False)
        self.engine.spare(gpa)

    def _exception(self, _session, _cpu, vector, _code):
        if self.outcome is not None:
            self.session.stop()
            return
        self.faults += 1
        # The third in a row ends the processor, and the package with it.
        if self.faults == 3:
            self._end("shutdown", f"vector {vector}")

    def _before(self, _session, _cpu, _instruction):
        if self.outcome is not None:
            self.session.stop()
            return
        self.faults = 0
        state = self.session.cpu
        cs = state.cs
        hidden = cs.attr
        mode = 32 if hidden & 1 << 14 else 16
        at = state.rip + cs.base & 0xFFFF_FFFF
        if hidden & 1 << 13 and self.case.is_long:
            mode, at = 64, state.rip
        found = d.decode(self.ram, at, mode) if at < RAM_BYTES else None
        if len(self.executed) >= INSTRUCTIONS:
            self._end("limit")
        elif found is None:
            self.executed.append(-1)
            self.known.update(explanations_of_bytes(bytes(self.ram[at : at + 15]), mode))
        else:
            self._note(found, mode)

    def _note(self, found, mode):
        self.executed.append(found.opcode)
        self._explain(found, mode)
        if NOT_COMPARED(found):
            self._end("skip", f"{found.opcode:x} {found.modrm:x}")
        elif found.opcode in PORTS and not found.locked:
            if self._may_use_ports():
                self._end("io")
            else:
                # The package dies of looking at the map of ports. All TSSs have an empty one.
                self.session.cpu.set_exception(GP, 0)
        elif self.undefined & reads_flags(found):
            self._end("skip", "reads undefined flags")
        self.undefined |= undefined_flags(found)

    def _explain(self, found, mode):
        state = self.session.cpu.state
        general = [getattr(state, name) for name in NAMES]
        segments = [self._shown(getattr(state, name)) for name in SEGMENTS]
        seen = Seen(found, mode, general, segments, state.rip, state.rflags, state.cr0)
        for known in explanations(seen):
            if known.flags or known.spares:
                self.undefined |= known.flags
                self.spared |= known.spares
            else:
                self.known.add(known.name)

    def _may_use_ports(self):
        state = self.session.cpu.state
        if not state.cr0 & 1:
            return True
        return (state.cs.selector & 3) <= (state.rflags >> 12 & 3)

    def _end(self, kind, detail="", *, stops=True):
        if self.outcome is not None:
            return
        state = self.session.cpu.state
        self.outcome = Outcome(
            kind,
            detail,
            state.rip,
            [getattr(state, name) for name in NAMES],
            self.session.cpu.rflags,
            [self._shown(getattr(state, name)) for name in SEGMENTS],
            [state.cr0, state.cr2, state.cr3, state.cr4],
            changed_pages(self.before, self.ram),
            self.undefined,
            self.executed,
            sorted(self.known),
            sorted(self.spared),
        )
        if stops:
            self.session.stop()

    @staticmethod
    def _shown(segment):
        return (segment.selector, segment.base, segment.limit, segment.attr << 8 & 0xF0FF00)


def answer_cases(bochs, answers):
    """Answer cases in this process until the input ends."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)

    def answer(outcome):
        signal.setitimer(signal.ITIMER_PROF, 0)
        pickle.dump(outcome, answers)
        answers.flush()

    def last(outcome):
        answer(outcome)
        os._exit(SPENT)

    engine = Engine(bochs, last)
    # Unbuffered: what comes after a case is for another fork if this one ends.
    cases = os.fdopen(os.dup(0), "rb", buffering=0)
    while True:
        try:
            case = pickle.load(cases)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer(engine.run(case))


def serve():
    """Answer cases, in one fork after the other, until the input ends."""
    bochs = load()
    answers = os.fdopen(os.dup(1), "wb")
    while True:
        child = os.fork()
        if child == 0:
            try:
                answer_cases(bochs, answers)
            except BaseException:
                os._exit(1)
            os._exit(0)
        _pid, status = os.waitpid(child, 0)
        if not status:
            return
        if os.waitstatus_to_exitcode(status) != SPENT:
            pickle.dump(Outcome("skip", f"died: {status}"), answers)
            answers.flush()


if __name__ == "__main__":
    serve()
