"""The second engine: Bochs, in processes that may die.

``python -m fuzz.second`` reads pickled cases from its standard input and answers with pickled
outcomes. Each guest runs in a fork: the package keeps one processor per process, dies of I/O and of
triple faults, and does not notice code the host changes.
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
PORTS = frozenset({0x6C, 0x6D, 0x6E, 0x6F, 0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF})


def load():
    """The package; its wheel names symbols newer than Debian 12's libc, never called."""
    sys.setdlopenflags(os.RTLD_LAZY)
    import bochscpu
    import bochscpu.cpu
    import bochscpu.memory

    return bochscpu


class Run:
    """One guest in this process, which ends with it."""

    def __init__(self, bochs, case, answer):
        self.bochs = bochs
        self.case = case
        self.answer = answer
        self.ram = mmap.mmap(-1, RAM_BYTES)
        self.before = bytes(image(case))
        self.ram[:] = self.before
        self.session = bochs.Session()
        self.executed = []
        self.undefined = 0
        self.known = set()
        self.faults = 0
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        for page in range(0, RAM_BYTES, PAGE):
            bochs.memory.page_insert(page, first + page)

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
        self._end("skip", "stopped by itself")

    def _segment(self, selector, base, limit, rights):
        segment = self.bochs.Segment()
        segment.present = bool(rights & 1 << 15)
        segment.selector, segment.base, segment.limit = selector, base, limit
        segment.attr = rights >> 8
        return segment

    def _missing(self, gpa):
        self._end("mmio", f"{gpa:#x}")

    def _exception(self, _session, _cpu, vector, _code):
        self.faults += 1
        # The third in a row ends the processor, and the package with it.
        if self.faults == 3:
            self._end("shutdown", f"vector {vector}")

    def _before(self, session, _cpu, _instruction):
        self.faults = 0
        state = session.cpu
        cs = state.cs
        hidden = cs.attr
        mode = 32 if hidden & 1 << 14 else 16
        at = state.rip + cs.base & 0xFFFF_FFFF
        if hidden & 1 << 13 and self.case.is_long:
            mode, at = 64, state.rip
        found = d.decode(self.ram, at, mode) if at < RAM_BYTES else None
        if len(self.executed) >= INSTRUCTIONS:
            self._end("limit")
        if found is None:
            self.executed.append(-1)
            self.known.update(explanations_of_bytes(bytes(self.ram[at : at + 15]), mode))
            return
        self.executed.append(found.opcode)
        self._explain(found, mode)
        if NOT_COMPARED(found):
            self._end("skip", f"{found.opcode:x} {found.modrm:x}")
        if found.opcode in PORTS and not found.locked and self._may_use_ports(session):
            self._end("io")
        if self.undefined & reads_flags(found):
            self._end("skip", "reads undefined flags")
        self.undefined |= undefined_flags(found)

    def _explain(self, found, mode):
        state = self.session.cpu.state
        general = [getattr(state, name) for name in NAMES]
        segments = [self._shown(getattr(state, name)) for name in SEGMENTS]
        self.known.update(
            explanations(Seen(found, mode, general, segments, state.rip, state.rflags))
        )

    def _may_use_ports(self, session):
        state = session.cpu.state
        if not state.cr0 & 1:
            return True
        return (state.cs.selector & 3) <= (state.rflags >> 12 & 3)

    def _end(self, kind, detail=""):
        state = self.session.cpu.state
        outcome = Outcome(
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
        )
        with os.fdopen(self.answer, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)

    @staticmethod
    def _shown(segment):
        return (segment.selector, segment.base, segment.limit, segment.attr << 8 & 0xF0FF00)


def run_case(bochs, case):
    """Run a guest in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            Run(bochs, case, writer).go()
        finally:
            os._exit(3)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _pid, status = os.waitpid(child, 0)
    if data and not status:
        return pickle.loads(data)
    return Outcome("skip", f"died: {status}")


def serve():
    """Answer cases until the input ends."""
    bochs = load()
    answers = os.fdopen(os.dup(1), "wb")
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(run_case(bochs, case), answers)
        answers.flush()


if __name__ == "__main__":
    serve()
