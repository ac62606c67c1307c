"""Guests that change their code, jump to where nothing is, and write their page tables wrong."""

import pytest

from kvmsim.engine.base import BusLock, Hlt, InternalError, Io, Mmio, Shutdown
from kvmsim.engine.x86 import registers as r

CODE, HANDLER, DATA, STACK, TABLES, HOLE = 0x1000, 0x2000, 0x8000, 0x6000, 0x10000, 0x180000
HLT, NOP = "f4", "90"
PAGE = 4096
P, W, US, NX = 1, 2, 4, 1 << 63


def page_faults(guest):
    """A handler of #PF on a stack of its own."""
    guest.gate(14, HANDLER, ist=1).gate(13, 0x2100, ist=1)
    guest.put(HANDLER, HLT)
    guest.put(0x2100, HLT)
    return guest


def error_code(guest):
    assert guest.r.rip == HANDLER + 1
    return guest.word(guest.q[r.RSP], 8)


# -- code that changes ---------------------------------------------------------------------------


def test_code_a_guest_writes_ahead_of_itself_is_what_it_executes(guest):
    # mov byte [rip+1], 0x43: the operand of the next mov, one byte further
    guest.long("c6 05 01 00 00 00 43", "b0 41", HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] & 0xFF == 0x43


def test_a_loop_that_changes_its_own_instruction_executes_every_version(guest):
    # again: add eax, 1 ; inc byte [the 1] ; dec ecx ; jnz again
    guest.long("83 c0 01", "fe 05 f9 ff ff ff", "ff c9", "75 f3", HLT)
    guest.q[r.RAX], guest.q[r.RCX] = 0, 10
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == sum(range(1, 11))


def test_a_nop_the_guest_makes_a_port_access_is_one(guest):
    guest.long(NOP * 8, HLT)
    assert isinstance(guest.run(), Hlt)
    guest.long("66 c7 05 01 00 00 00 e6 80", NOP * 3, HLT)
    stop = guest.run()
    assert isinstance(stop, Io)
    assert stop.port == 0x80


def test_a_locked_instruction_the_guest_makes_plain_is_no_bus_lock(guest):
    guest.q[r.RDI] = DATA + 62
    # twice: lock inc dword [rdi], whose prefix becomes a nop in between
    guest.long("f0 ff 07", "c6 05 f6 ff ff ff 90", "ff c9", "75 f2", HLT)
    guest.q[r.RCX] = 2
    stops = []
    while not isinstance(stop := guest.run(), Hlt):
        stops.append(type(stop))
    assert stops == [BusLock]
    assert guest.word(DATA + 62) == 2


@pytest.mark.parametrize("code", ["e6 80", "f0 ff 07", "0f 0b"])
def test_code_user_space_changes_between_entries_is_the_new_code(guest, code):
    guest.long(NOP * 4, HLT).gate(6, HANDLER)
    guest.put(HANDLER, HLT)
    guest.q[r.RDI] = DATA + 62
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == CODE + 5
    guest.put(CODE, code)
    guest.r.rip = CODE
    stop = guest.run()
    expected = {"e6 80": Io, "f0 ff 07": BusLock, "0f 0b": Hlt}[code]
    assert isinstance(stop, expected)
    assert guest.r.rip == {"e6 80": CODE, "f0 ff 07": CODE + 3, "0f 0b": HANDLER + 1}[code]


def test_a_page_the_guest_maps_elsewhere_shows_the_code_that_is_there(guest):
    guest.long("ff 15 0a 00 00 00", "0f 22 d8", "ff 15 01 00 00 00", HLT)
    # call [rip+x] twice, with CR3 written in between: see the pointer behind the code
    guest.set_word(CODE + 0x10, 0x9000)
    guest.put(0xA000, COUNT_1, "c3")
    guest.put(0xB000, COUNT_2, "c3")
    guest.map_page(0x9000, 0xA000)
    guest.q[r.RAX], guest.q[r.RBX] = guest.r.cr3, 0
    guest.put(0xA000, COUNT_1, "c7 04 25 48 30 01 00 07 b0 00 00", "c3")  # mov [entry], 0xb007
    guest.map_page(0x13000, 0x13000)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 3


COUNT_1, COUNT_2 = "83 c3 01", "83 c3 02"


# -- nothing there -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["long", "protected"])
def test_a_jump_into_a_hole_is_an_emulation_failure_at_its_target(guest, mode):
    getattr(guest, mode)("ff e0")  # jmp rax
    guest.q[r.RAX] = HOLE if mode == "long" else 0xFED00000
    if mode == "long":
        guest.map_page(HOLE, 0xFED00000)
    stop = guest.run()
    assert isinstance(stop, InternalError)
    assert (stop.suberror, guest.r.rip) == (1, guest.q[r.RAX])


def test_code_that_runs_off_the_end_of_memory_is_an_emulation_failure(guest):
    guest.protected(NOP * 16, at=0x3FFF0)
    assert isinstance(guest.run(), InternalError)
    assert guest.r.rip == 0x40000


def test_a_jump_to_an_unmapped_page_is_a_page_fault_there(guest):
    page_faults(guest.long("ff e0"))
    guest.map_page(HOLE, 0, 0)
    guest.q[r.RAX] = HOLE
    assert isinstance(guest.run(), Hlt)
    assert error_code(guest) == 0x10
    assert (guest.r.cr2, guest.word(guest.q[r.RSP] + 8, 8)) == (HOLE, HOLE)


def test_a_jump_to_no_address_is_a_general_protection_fault(guest):
    page_faults(guest.long("ff e0"))
    guest.q[r.RAX] = 0x1234_5678_9ABC_DEF0
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2101


@pytest.mark.parametrize("level", range(3))
def test_a_page_table_where_no_memory_is_maps_nothing(guest, level):
    page_faults(guest.long("8b 07", HLT))
    guest.q[r.RDI] = 0x200000 if level == 2 else 0x40000000 if level == 1 else 1 << 39
    entry = TABLES + level * PAGE + 8
    guest.set_word(entry, 0xFED00007)
    guest.cpu.changed()
    stop = guest.run()
    assert isinstance(stop, Hlt)
    assert error_code(guest) == 0
    assert guest.r.cr2 == guest.q[r.RDI]


def test_a_root_where_no_memory_is_ends_in_a_triple_fault(guest):
    page_faults(guest.long("0f 22 d8", NOP))
    guest.q[r.RAX] = 0xFED00000
    assert isinstance(guest.run(), Shutdown)


# -- wrong tables --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "code", "error"),
    [
        (0, "8b 07", 0),
        (0xA000 | P | US, "89 07", 3),
        (0xA000 | P | US, "8b 07", None),
        (0xA000 | P | W | US | NX, "ff e7", 0x11),
        (0xA000 | P | W | US | NX, "8b 07", None),
    ],
)
def test_an_entry_decides_what_an_access_may(guest, entry, code, error):
    page_faults(guest.long(code, HLT))
    guest.r.cr0 |= 1 << 16  # WP
    guest.set_word(TABLES + 3 * PAGE + 9 * 8, entry)
    guest.cpu.changed()
    guest.q[r.RDI] = 0x9000
    assert isinstance(guest.run(), Hlt)
    if error is None:
        assert guest.r.rip == CODE + 3
    else:
        assert error_code(guest) == error


@pytest.mark.parametrize(("entry", "error"), [(0xA000 | P | W, 5), (0xA000 | P | W | US, None)])
def test_ring_3_reads_its_own_pages_only(guest, entry, error):
    page_faults(guest.long("8b 07", "cc", ring=3)).gate(3, 0x2200, dpl=3)
    guest.put(0x2200, HLT)
    guest.set_word(TABLES + 3 * PAGE + 9 * 8, entry)
    guest.cpu.changed()
    guest.q[r.RDI] = 0x9000
    assert isinstance(guest.run(), Hlt)
    if error is None:
        assert guest.r.rip == 0x2201
    else:
        assert error_code(guest) == error


def test_a_guest_that_clears_its_page_tables_ends_in_a_triple_fault(guest):
    # rep stosd over the last table, then over the others
    page_faults(guest.long("f3 ab", "0f 20 d8 0f 22 d8", "90"))
    guest.q[r.RAX], guest.q[r.RCX], guest.q[r.RDI] = 0, PAGE, TABLES
    assert isinstance(guest.run(), Shutdown)


def test_a_device_behind_a_page_crossing_access_is_asked_for_its_part(guest):
    guest.long("8b 07", HLT)
    guest.map_page(0xA000, 0xFED00000)
    guest.q[r.RDI] = 0x9FFE
    guest.set_word(0x9FFE, 0x2211, 2)
    parts = []
    while isinstance(stop := guest.run(), Mmio):
        parts.append((stop.gpa, stop.size))
        guest.cpu.complete(b"\x33\x44" + bytes(6))
    assert isinstance(stop, Hlt)
    assert parts[-1][0] >> 12 == 0xFED00
    assert guest.q[r.RAX] == 0x44332211
