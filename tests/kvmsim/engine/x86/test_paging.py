"""The engine's own walk of the guest's page tables, and memory types."""

import pytest

from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.memory import Memory, NoMemory, Slot
from kvmsim.engine.x86.paging import (
    MemoryType,
    Mtrrs,
    PageFault,
    Translation,
    is_write_back,
    locate,
    translate,
)

TABLE = 0x13000


@pytest.fixture
def paged(guest):
    return guest.long()


def walk(guest, linear, **access):
    return translate(guest.r, guest.vm.memory, linear, **access)


def test_a_mapped_page_is_found_and_marked(paged):
    paged.map_page(0x9000, 0xA000)
    assert walk(paged, 0x9123) == Translation(0xA123, 0)
    assert paged.word(TABLE + 9 * 8) & 0x60 == 0x20
    walk(paged, 0x9123, write=True)
    assert paged.word(TABLE + 9 * 8) & 0x60 == 0x60


def test_looking_leaves_no_marks(paged):
    walk(paged, 0x9123, write=True, touch=False)
    assert paged.word(TABLE + 9 * 8) & 0x60 == 0


def test_a_look_of_the_engine_needs_no_rights(paged):
    paged.r.cr4 |= 1 << 21  # SMAP
    paged.map_page(0x9000, 0xA000, 5)
    with pytest.raises(PageFault):
        walk(paged, 0x9123)
    assert locate(paged.r, paged.vm.memory, 0x9123) == 0xA123
    paged.map_page(0x9000, 0xA000, 0)
    with pytest.raises(PageFault):
        locate(paged.r, paged.vm.memory, 0x9123)


@pytest.mark.parametrize(
    ("flags", "access", "code"),
    [
        (0, {}, 0),
        (0, {"write": True, "user": True}, 6),
        (5, {"write": True, "user": True}, 7),
        (3, {"user": True}, 5),
        (7 | 1 << 63, {"fetch": True}, 0x11),
    ],
)
def test_what_a_page_does_not_allow_is_a_fault_with_its_code(paged, flags, access, code):
    paged.map_page(0x9000, 0xA000, flags)
    with pytest.raises(PageFault) as caught:
        walk(paged, 0x9008, **access)
    assert (caught.value.address, caught.value.code) == (0x9008, code)


def test_the_system_writes_read_only_pages_unless_protected(paged):
    paged.map_page(0x9000, 0xA000, 5)
    paged.r.cr0 &= ~(1 << 16)
    assert walk(paged, 0x9000, write=True).gpa == 0xA000
    paged.r.cr0 |= 1 << 16
    with pytest.raises(PageFault):
        walk(paged, 0x9000, write=True)


def test_large_pages_end_the_walk(paged):
    paged.set_word(0x12000 + 8, 0x0000_0000 | 0x80 | 7)
    assert walk(paged, 0x20_5678).gpa == 0x5678
    paged.set_word(0x11000 + 8, 0x87 | 1 << 12)
    assert walk(paged, 0x4000_1234) == Translation(0x1234, 4)


def test_pages_of_32_bits(paged):
    paged.r.efer = 0
    paged.r.cr4 = 0x10
    paged.r.cr3 = 0x20000
    paged.set_word(0x20000, 0x21007, 4)
    paged.set_word(0x21000 + 4 * 9, 0xA007 | 8, 4)
    paged.set_word(0x20000 + 4, 0x87, 4)
    assert walk(paged, 0x9004) == Translation(0xA004, 1)
    assert walk(paged, 0x41_0004).gpa == 0x10004


def test_pages_of_32_bits_with_wide_entries(paged):
    paged.r.efer = 0
    paged.r.cr3 = 0x20000
    paged.set_word(0x20000, 0x21001)
    paged.set_word(0x21000, 0x22007)
    paged.set_word(0x22000 + 8 * 9, 0xA007)
    assert walk(paged, 0x9004).gpa == 0xA004


def test_a_hole_in_the_tables_maps_nothing(paged):
    paged.r.cr3 = 0x100000
    with pytest.raises(PageFault):
        walk(paged, 0)


def test_mtrrs_that_are_off_do_not_count():
    assert Mtrrs.reset().type_of(0) == MemoryType.WB


@pytest.mark.parametrize(
    ("gpa", "expected"),
    [
        (0x0_FFFF, MemoryType.WB),
        (0xA_0000, MemoryType.UC),
        (0xC_1000, MemoryType.WP),
        (0x10_0000, MemoryType.WT),
        (0x8000_0000, MemoryType.WC),
        (0x9000_0000, MemoryType.UC),
        (0xF000_0000, MemoryType.WB),
    ],
)
def test_ranges_have_their_types(gpa, expected):
    mtrrs = Mtrrs(6 | 3 << 10, [0x0606060606060606] + [0] * 10, [(0, 0)] * 8)
    mtrrs.fixed[3] = 0x0505050505050505
    mask = ((1 << 52) - 1) & ~0xFFFFFFF | 1 << 11
    mtrrs.variable[:3] = [(0x4, mask), (0x8000_0001, mask), (0x9000_0001, mask)]
    mtrrs.variable[3:5] = [(0x9000_0000, mask), (0x6, mask)]
    assert mtrrs.type_of(gpa) == expected


@pytest.mark.parametrize("entry", range(8))
def test_only_write_back_entries_of_the_pat_are_cached(entry):
    pat = 0x0706050406010006
    expected = pat >> 8 * entry & 0xFF == 6
    assert is_write_back(Translation(0, entry), pat, Mtrrs.reset(), paging=True) is expected
    assert is_write_back(Translation(0, 0), 0, Mtrrs.reset(), paging=False)


def test_memory_knows_its_holes():
    memory = Memory(
        [Slot(0x4000, memoryview(bytearray(0x1000))), Slot(0, memoryview(b"\0" * 4096))]
    )
    assert list(memory.holes()) == [(0x1000, 0x3FFF), (0x5000, (1 << 64) - 1)]
    with pytest.raises(NoMemory):
        memory.read(0xFFF, 2)
    assert memory.read_word(0x2000, 8) == 0


def test_read_only_memory_is_not_written():
    memory = Memory([Slot(0, memoryview(bytearray(4096)), read_only=True)])
    with pytest.raises(NoMemory):
        memory.write(0, b"x")


def test_registers_keep_every_flag(guest):
    for flags in (0x2, 0xCD7, 0x40602, 0x200002, 0x10202):
        guest.r.flags = flags
        assert guest.r.flags == flags | 2
    assert guest.r.segment(r.CS).base == 0xFFFF0000
