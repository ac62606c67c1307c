"""Descriptors the processor marks: a bus lock where the table is misaligned or not write-back."""

import pytest

from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.policy import PlainPolicy

CODE, GDT, HLT = 0x1000, 0x3000, "f4"
DATA_DESCRIPTOR, TSS_32 = 0x00CF92000000FFFF, 0x0000890000000067
ACCESSED, BUSY = 1 << 40, 1 << 41
MOV_DS, MOV_DS_MEMORY, LTR = "8e d8", "8e 1f", "0f 00 d8"


def loading(guest, code, descriptor, table, *, mode="protected"):
    """A guest about to load selector 0x40 from a table elsewhere, in AX and at RDI."""
    getattr(guest, mode)(code, HLT)
    base = table - 0x40
    guest.r.set_segment(r.GDTR, r.Segment(0, base, 0x7F))
    guest.set_word(table, descriptor)
    guest.set_word(0x8000, 0x40)
    guest.q[r.RAX], guest.q[r.RDI] = 0x40, 0x8000
    return guest


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("code", [MOV_DS, MOV_DS_MEMORY])
def test_accessed_bit_across_a_line_is_one_bus_lock(guest, mode, code):
    loading(guest, code, DATA_DESCRIPTOR, 0x93FC, mode=mode)
    assert isinstance(guest.run(), BusLock)
    assert guest.r.rip == CODE + 2
    assert guest.word(0x93FC, 8) & ACCESSED
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.bus_locks == 1


def test_busy_bit_across_a_line_is_a_bus_lock(guest):
    loading(guest, LTR, TSS_32, 0x93FC)
    assert isinstance(guest.run(), BusLock)
    assert guest.word(0x93FC, 8) & BUSY


def test_fault_like_hardware_stops_before_the_bit_is_set(make_guest):
    guest = loading(make_guest(PlainPolicy(fault_like=True)), MOV_DS, DATA_DESCRIPTOR, 0x93FC)
    assert isinstance(guest.run(), BusLock)
    assert not guest.word(0x93FC, 8) & ACCESSED
    assert isinstance(guest.run(), Hlt)
    assert guest.word(0x93FC, 8) & ACCESSED


@pytest.mark.parametrize(
    ("code", "descriptor", "table"),
    [
        (MOV_DS, DATA_DESCRIPTOR, 0x9400),
        (LTR, TSS_32, 0x9400),
        (MOV_DS, DATA_DESCRIPTOR | ACCESSED, 0x93FC),
    ],
    ids=["aligned", "aligned TSS", "accessed before"],
)
def test_what_needs_no_lock_across_a_line_is_none(guest, code, descriptor, table):
    loading(guest, code, descriptor, table)
    assert isinstance(guest.run(), Hlt)


def test_uncached_table_is_a_bus_lock(guest):
    loading(guest, MOV_DS, DATA_DESCRIPTOR, 0x9400, mode="long")
    guest.map_page(0x9000, 0x9000, 7 | 0x18)  # PCD, PWT
    assert isinstance(guest.run(), BusLock)


def test_load_that_faults_takes_no_bus_lock(guest):
    loading(guest, LTR, TSS_32 | BUSY, 0x93FC).gate(13, 0x2000)
    guest.r.set_segment(r.GDTR, r.Segment(0, GDT, 0x3F))
    guest.put(0x2000, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.bus_locks == 0


def test_real_mode_has_no_descriptors(guest):
    guest.real(MOV_DS, HLT)
    guest.r.set_segment(r.GDTR, r.Segment(0, 0x93FC - 0x40, 0x7F))
    guest.q[r.RAX] = 0x40
    assert isinstance(guest.run(), Hlt)
