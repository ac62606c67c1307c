"""Small guests: memory, page tables and vCPUs in each mode."""

import mmap

import pytest

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.memory import Slot
from kvmsim.engine.x86.policy import PlainPolicy

pytest.importorskip("unicorn")

PAGE = 4096
CODE, DATA, STACK, TABLES = 0x1000, 0x8000, 0x6000, 0x10000
GDT, IDT, TSS = 0x3000, 0x4000, 0x5000
RAM_BYTES = 0x40000
CODE_64 = r.RIGHTS_G | r.RIGHTS_L | r.RIGHTS_P | r.RIGHTS_S | 0xB << 8
CODE_32 = r.RIGHTS_G | r.RIGHTS_DB | r.RIGHTS_P | r.RIGHTS_S | 0xB << 8
DATA_32 = r.RIGHTS_G | r.RIGHTS_DB | r.RIGHTS_P | r.RIGHTS_S | 3 << 8
RING_3 = 3 << 13


class Guest:
    """A VM with 256 KiB of memory and one vCPU, whose code is bytes in hexadecimal."""

    def __init__(self, policy=None, **options):
        from kvmsim.engine.x86.vm import X86Vm

        self.ram = mmap.mmap(-1, RAM_BYTES)
        self.policy = policy or PlainPolicy()
        self.vm = X86Vm([Slot(0, memoryview(self.ram))], self.policy, **options)
        self.cpu = self.vm.add_cpu()

    @property
    def r(self):
        return self.cpu.registers

    @property
    def q(self):
        return self.cpu.registers.q

    def put(self, at, *lines):
        code = bytes.fromhex("".join(lines))
        self.ram[at : at + len(code)] = code
        return at + len(code)

    def word(self, at, size=4):
        return int.from_bytes(self.ram[at : at + size], "little")

    def set_word(self, at, value, size=8):
        self.ram[at : at + size] = value.to_bytes(size, "little")

    def run(self):
        return self.vm.run(self.cpu)

    def real(self, *lines, at=CODE):
        """16-bit real mode, all segments 0."""
        self.put(at, *lines)
        for number in range(6):
            old = self.r.segment(number)
            self.r.set_segment(number, r.Segment(0, 0, 0xFFFF, old.rights))
        self.r.set_segment(r.IDTR, r.Segment(0, 0, 0x3FF))
        self.q[r.RSP] = STACK
        self.r.rip = at
        return self

    def protected(self, *lines, at=CODE, ring=0):
        """32-bit flat segments, no paging."""
        self.put(at, *lines)
        self.r.cr0 = 0x11
        self._flat(CODE_32, ring)
        self.r.rip = at
        return self

    def long(self, *lines, at=CODE, ring=0):
        """64-bit, the first 2 MiB mapped one to one by 4 KiB pages, all for ring 3."""
        self.put(at, *lines)
        for level in range(3):
            self.set_word(TABLES + level * PAGE, TABLES + (level + 1) * PAGE | 7)
        for page in range(512):
            self.set_word(TABLES + 3 * PAGE + page * 8, page * PAGE | 7)
        self.r.cr3 = TABLES
        self.r.cr4 = 0x620  # PAE, OSFXSR, OSXMMEXCPT
        self.r.efer = 0xD01  # SCE, LME, LMA, NXE
        self.r.cr0 = 0x80010011
        self._flat(CODE_64, ring)
        self.r.rip = at
        self.cpu.changed()
        return self

    def map_page(self, linear, gpa, flags=7):
        """Map one page of the first 2 MiB of long mode."""
        self.set_word(TABLES + 3 * PAGE + linear // PAGE * 8, gpa | flags)
        self.cpu.changed()

    def _flat(self, code, ring):
        dpl = ring << 13
        selectors = {0: (0x08, 0x10), 3: (0x1B, 0x23)}[ring]
        self.r.set_segment(r.CS, r.Segment(selectors[0], 0, r.U32, code | dpl))
        for number in (r.DS, r.ES, r.SS, r.FS, r.GS):
            self.r.set_segment(number, r.Segment(selectors[1], 0, r.U32, DATA_32 | dpl))
        self._tables(code)
        self.q[r.RSP] = STACK

    def _tables(self, code):
        """A GDT with rings 0 and 3, a TSS with a ring 0 stack, an empty IDT."""
        for at, rights in ((1, code), (2, DATA_32), (3, code | RING_3), (4, DATA_32 | RING_3)):
            self.set_word(GDT + 8 * at, 0xFFFF | (rights | 0xF0000) << 32)
        self.r.set_segment(r.GDTR, r.Segment(0, GDT, 0x3F))
        self.r.set_segment(r.IDTR, r.Segment(0, IDT, 0xFFF))
        self.r.set_segment(r.TR, r.Segment(0x28, TSS, 0x67, r.RIGHTS_P | 0xB << 8))
        self.set_word(TSS + 102, 0x68, 2)  # no port bitmap
        if code == CODE_64:
            self.set_word(TSS + 4, STACK - 0x400)
            self.set_word(TSS + 36, STACK - 0x800)  # IST 1
        else:
            self.set_word(TSS + 4, (STACK - 0x400) | 0x10 << 32)

    def gate(self, vector, target, *, kind=0xE, ist=0, dpl=0):
        """An interrupt gate to ring 0 code."""
        low = (target & 0xFFFF) | 0x08 << 16
        high = (target & 0xFFFF0000) | (0x80 | dpl << 5 | kind) << 8 | ist
        size = 16 if self.r.long_mode else 8
        self.set_word(IDT + vector * size, low | high << 32)
        return self


@pytest.fixture
def make_guest():
    made = []

    def make(*args, **kwargs):
        made.append(Guest(*args, **kwargs))
        return made[-1]

    yield make
    for guest in made:
        guest.vm.close()


@pytest.fixture
def guest(make_guest):
    return make_guest()
