"""Which instructions are bus locks (kvm.md A.1), each found once and in its place."""

import pytest

from kvmsim.engine.base import BusLock, Hlt, InKernel, Io, Mmio
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.policy import PlainPolicy

CODE, DATA = 0x1000, 0x8000
INC = "f0 ff 07"  # lock inc dword [rdi]
HLT = "f4"


def stops_of(guest, limit=100):
    """All stops up to HLT."""
    found = []
    for _ in range(limit):
        stop = guest.run()
        if isinstance(stop, Hlt):
            return found
        found.append(stop)
    raise AssertionError(found[-3:])


def test_trap_like_hardware_stops_behind_the_instruction(guest):
    guest.long(INC, HLT)
    guest.q[r.RDI] = DATA + 62
    stop = guest.run()
    assert isinstance(stop, BusLock)
    assert (guest.r.rip, guest.word(DATA + 62), stop.cpl) == (CODE + 3, 1, 0)
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.bus_locks == 1


@pytest.mark.parametrize("fault_like", [False, True])
def test_lock_of_ring_3_is_found_where_the_system_may_not_look_at_its_pages(make_guest, fault_like):
    guest = make_guest(PlainPolicy(fault_like=fault_like)).long(INC, "0f 31", ring=3)  # rdtsc
    guest.r.cr4 |= 1 << 21  # SMAP
    guest.r.flags &= ~(1 << 18)
    guest.q[r.RDI] = DATA + 62
    stop = guest.run()
    assert (type(stop), stop.cpl) == (BusLock, 3)


def test_fault_like_hardware_stops_in_front_and_then_passes(make_guest):
    guest = make_guest(PlainPolicy(fault_like=True)).long(INC, HLT)
    guest.q[r.RDI] = DATA + 62
    stop = guest.run()
    assert isinstance(stop, BusLock)
    assert (guest.r.rip, guest.word(DATA + 62), guest.cpu.bus_locks) == (CODE, 0, 0)
    assert isinstance(guest.run(), Hlt)
    assert (guest.word(DATA + 62), guest.cpu.bus_locks) == (1, 1)


def test_fault_like_lock_user_space_skips_is_not_taken(make_guest):
    guest = make_guest(PlainPolicy(fault_like=True)).long(INC, INC, HLT)
    guest.q[r.RDI] = DATA + 62
    assert isinstance(guest.run(), BusLock)
    guest.r.rip = CODE + 3
    assert isinstance(guest.run(), BusLock)
    assert guest.r.rip == CODE + 3
    assert isinstance(guest.run(), Hlt)
    assert guest.word(DATA + 62) == 1


@pytest.mark.parametrize("fault_like", [False, True])
def test_hundred_split_increments_are_hundred_stops_with_the_values_of_the_vendor(
    make_guest, fault_like
):
    guest = make_guest(PlainPolicy(fault_like=fault_like))
    guest.long("b9 64 00 00 00", INC, "ff c9", "75 f9", HLT)  # mov ecx, 100; l: inc; dec; jnz l
    guest.q[r.RDI] = DATA + 62
    values = []
    while isinstance(guest.run(), BusLock):
        values.append(guest.word(DATA + 62))
    assert values == list(range(0 if fault_like else 1, 100 if fault_like else 101))
    assert guest.cpu.bus_locks == 100


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", range(54, 65))
def test_a_lock_is_a_bus_lock_exactly_when_it_crosses_a_line(guest, size, offset):
    code = {1: "f0 fe 07", 2: "f0 66 ff 07", 4: "f0 ff 07", 8: "f0 48 ff 07"}[size]
    guest.long(code, HLT)
    guest.q[r.RDI] = DATA + offset
    assert len(stops_of(guest)) == int((offset & 63) + size > 64)
    assert guest.ram[DATA + offset] == 1


@pytest.mark.parametrize(
    "code",
    [
        "f0 01 07",  # lock add [rdi], eax
        "f0 11 07",  # lock adc
        "f0 21 07",  # lock and
        "f0 09 07",  # lock or
        "f0 31 07",  # lock xor
        "f0 29 07",  # lock sub
        "f0 19 07",  # lock sbb
        "f0 83 07 01",  # lock add dword [rdi], 1
        "f0 81 07 01 00 00 00",  # the same with a dword
        "f0 f7 17",  # lock not
        "f0 f7 1f",  # lock neg
        "f0 ff 0f",  # lock dec
        "f0 0f c1 07",  # lock xadd
        "f0 0f b1 0f",  # lock cmpxchg [rdi], ecx: equal
        "f0 0f ba 2f 03",  # lock bts dword [rdi], 3
        "f0 0f b3 07",  # lock btr [rdi], eax
        "f0 0f c7 0f",  # lock cmpxchg8b
        "f0 48 0f c1 07",  # lock xadd qword
        "87 07",  # xchg without a prefix
        "48 87 07",
        "f0 87 07",
    ],
)
def test_every_locking_instruction_is_found_once(guest, code):
    guest.long(code, HLT)
    guest.q[r.RDI] = DATA + 61
    assert len(stops_of(guest)) == 1


def test_a_compare_that_fails_locks_all_the_same(guest):
    guest.long("f0 0f b1 0f", HLT)  # lock cmpxchg [rdi], ecx
    guest.q[r.RDI] = DATA + 61
    guest.q[r.RAX] = 5
    assert len(stops_of(guest)) == 1
    assert guest.q[r.RAX] == 0


@pytest.mark.parametrize("code", ["01 07", "0f c1 07", "89 07", "87 d8"])
def test_accesses_without_a_lock_may_split(guest, code):
    guest.long(code, HLT)
    guest.q[r.RDI] = DATA + 61
    assert stops_of(guest) == []


def test_bit_strings_lock_where_the_bit_is(guest):
    guest.long("f0 0f ab 07", HLT)  # lock bts [rdi], eax
    guest.q[r.RDI] = DATA + 125
    guest.q[r.RAX] = -16 * 32 & r.U32  # 64 bytes down
    assert len(stops_of(guest)) == 1
    assert guest.ram[DATA + 61] == 1


def test_a_bit_string_that_leads_away_from_the_line_end_does_not_split(guest):
    guest.long("f0 0f ab 07", HLT)
    guest.q[r.RDI] = DATA + 60
    guest.q[r.RAX] = 32
    assert stops_of(guest) == []
    assert guest.ram[DATA + 64] == 1


def test_sixteen_bytes_off_their_boundary_are_a_fault_and_no_lock(guest):
    guest.long("f0 48 0f c7 0f", HLT).gate(13, 0x2000)  # lock cmpxchg16b [rdi]
    guest.put(0x2000, HLT)
    guest.q[r.RDI] = DATA + 56
    assert stops_of(guest) == []
    assert guest.r.rip == 0x2001


def test_a_page_fault_of_the_locked_access_is_no_lock(guest):
    guest.long(INC, HLT).gate(14, 0x2000)
    guest.map_page(DATA + 0x1000, 0, 0)
    guest.put(0x2000, HLT)
    guest.q[r.RDI] = DATA + 0xFFE
    assert stops_of(guest) == []
    assert guest.r.rip == 0x2001
    assert guest.cpu.bus_locks == 0


def test_the_lock_is_found_once_after_its_page_fault_is_mended(guest):
    handler = (
        "48 c7 04 25 48 30 01 00 07 90 00 00",  # mov qword [0x13048], 0x9007
        "0f 01 3f",  # invlpg [rdi]
        "48 83 c4 08",  # add rsp, 8
        "48 cf",  # iretq
    )
    guest.long(INC, HLT).gate(14, 0x2000)
    guest.map_page(DATA + 0x1000, 0, 0)
    guest.put(0x2000, *handler)
    guest.q[r.RDI] = DATA + 0xFFE
    assert [type(stop) for stop in stops_of(guest)] == [BusLock]
    assert guest.word(DATA + 0xFFE) == 1


PAT_UC = 0x10  # PCD: PAT entry 2 is UC- after reset


def test_an_aligned_lock_in_uncached_memory_is_a_bus_lock(guest):
    guest.long(INC, HLT)
    guest.map_page(DATA, DATA, 7 | PAT_UC)
    guest.q[r.RDI] = DATA
    assert len(stops_of(guest)) == 1


def test_a_split_between_cached_and_uncached_memory_is_one(guest):
    guest.long(INC, HLT)
    guest.map_page(DATA + 0x1000, DATA + 0x1000, 7 | PAT_UC)
    guest.q[r.RDI] = DATA + 0xFFE
    assert len(stops_of(guest)) == 1


def test_the_guest_itself_makes_a_page_uncached(guest):
    guest.long(
        INC,  # not a bus lock
        "48 c7 04 25 40 30 01 00 17 80 00 00",  # mov qword [0x13040], 0x8017
        "0f 01 3f",  # invlpg [rdi]
        INC,  # a bus lock
        HLT,
    )
    guest.q[r.RDI] = DATA
    assert [type(stop) for stop in stops_of(guest)] == [BusLock]
    assert guest.word(DATA) == 2


def test_the_guest_turns_the_memory_type_registers_on(guest):
    wrmsr = ("b9 ff 02 00 00", "b8 00 08 00 00", "31 d2", "0f 30")  # DEF_TYPE: on, UC
    guest.long(INC, *wrmsr, INC, HLT)
    guest.q[r.RDI] = DATA
    assert [type(stop) for stop in stops_of(guest)] == [BusLock]


def test_locks_one_after_the_other_are_all_found(guest):
    guest.long(INC, INC, "87 07", INC, HLT)
    guest.q[r.RDI] = DATA + 62
    assert len(stops_of(guest)) == 4


def test_lock_on_an_instruction_that_cannot_have_it_is_undefined(guest):
    guest.long("f0 89 07", HLT).gate(6, 0x2000)  # lock mov
    guest.put(0x2000, HLT)
    guest.q[r.RDI] = DATA
    assert stops_of(guest) == []
    assert (guest.r.rip, guest.word(DATA)) == (0x2001, 0)


def test_a_lock_at_the_end_of_a_page_is_found_once_though_the_next_page_faults(guest):
    guest.long(INC, at=0x2000 - 3).gate(14, 0xB000)
    guest.map_page(0x2000, 0, 0)
    guest.put(
        0xB000,
        "48 c7 04 25 10 30 01 00 07 20 00 00",  # mov qword [0x13010], 0x2007
        "48 83 c4 08",  # add rsp, 8
        "48 cf",  # iretq
    )
    guest.put(0x2000, HLT)
    guest.q[r.RDI] = DATA + 62
    assert [type(stop) for stop in stops_of(guest)] == [BusLock]
    assert (guest.r.cr2, guest.word(DATA + 62)) == (0x2000, 1)


def test_segments_and_wrapping_addresses_count(guest):
    guest.real("f0 ff 47 02", HLT)  # lock inc word [bx+2]
    guest.r.set_segment(r.DS, r.Segment(0x800, 0x8000, 0xFFFF, guest.r.segment(r.DS).rights))
    guest.q[r.RBX] = 0x3D
    assert len(stops_of(guest)) == 1
    assert guest.ram[0x803F] == 1


def test_fs_base_counts_in_long_mode(guest):
    guest.long("f0 64 ff 07", HLT)  # lock inc dword fs:[rdi]
    guest.r.set_msr(0xC0000100, DATA)
    guest.q[r.RDI] = 62
    assert len(stops_of(guest)) == 1


def test_protected_mode_locks(guest):
    guest.protected(INC, HLT)
    guest.q[r.RDI] = DATA + 62
    assert len(stops_of(guest)) == 1


def test_a_lock_on_memory_that_is_not_there_rides_on_the_exit(guest):
    guest.long(INC, HLT)
    guest.map_page(DATA + 0x1000, 0xC0000)
    guest.q[r.RDI] = DATA + 0x1000 + 62
    first = guest.run()
    assert isinstance(first, Mmio)
    assert (first.bus_lock, first.data) == (True, b"")


def test_split_lock_ac_comes_before_the_lock(make_guest):
    guest = make_guest(PlainPolicy(split_lock_ac=True)).long(INC, HLT).gate(17, 0x2000)
    guest.put(0x2000, HLT)
    guest.q[r.RDI] = DATA + 62
    assert stops_of(guest) == []
    assert (guest.r.rip, guest.word(DATA + 62), guest.cpu.bus_locks) == (0x2001, 0, 0)


def test_code_changed_by_the_guest_locks_from_then_on(guest):
    guest.long(
        "c6 04 25 0e 10 00 00 f0",  # mov byte [0x100e], 0xf0: nop becomes a LOCK prefix
        "eb 04",
        "90 90 90 90",
        "90",
        "ff 07",
        HLT,
    )
    guest.q[r.RDI] = DATA + 62
    assert [type(stop) for stop in stops_of(guest)] == [BusLock]


def test_code_changed_by_the_host_is_not_stale(guest):
    guest.long("90", "ff 07", HLT)
    guest.q[r.RDI] = DATA + 62
    assert stops_of(guest) == []
    guest.put(CODE, "f0")
    guest.r.rip = CODE
    assert len(stops_of(guest)) == 1
    guest.put(CODE, "90")
    guest.r.rip = CODE
    assert stops_of(guest) == []


def test_one_address_with_two_codes_in_two_address_spaces(guest):
    guest.long(INC, HLT)
    guest.put(0x2000, "ff 07 90", HLT)  # inc without a lock
    guest.q[r.RDI] = DATA + 62
    for gpa, locks in ((CODE, 1), (0x2000, 0), (CODE, 1), (0x2000, 0)):
        guest.map_page(CODE, gpa)
        guest.r.rip = CODE
        assert len(stops_of(guest)) == locks


@pytest.mark.parametrize("fault_like", [False, True])
def test_no_lock_of_many_is_missed_or_counted_twice(make_guest, fault_like):
    count = 100_000
    guest = make_guest(PlainPolicy(fault_like=fault_like))
    guest.long("f0 48 0f c1 07", "48 ff c9", "75 f6", HLT)  # l: lock xadd [rdi], rax; dec rcx; jnz
    guest.q[r.RDI], guest.q[r.RAX], guest.q[r.RCX] = DATA + 60, 1, count
    ends = {CODE if fault_like else CODE + 5}
    stops = 0
    while isinstance(guest.run(), BusLock):
        stops += 1
        assert guest.r.rip in ends
    assert (stops, guest.cpu.bus_locks, guest.q[r.RCX]) == (count, count, 0)


def test_an_aligned_loop_counts_nothing(guest):
    guest.long("f0 48 0f c1 07", "48 ff c9", "75 f6", HLT)
    guest.q[r.RDI], guest.q[r.RAX], guest.q[r.RCX] = DATA + 56, 0, 100_000
    assert [stop for stop in stops_of(guest) if not isinstance(stop, InKernel)] == []
    assert guest.cpu.bus_locks == 0


def test_instruction_behind_a_lock_at_the_end_of_a_block_is_still_the_engines(guest):
    # The block ends with the page: what follows is translated when somebody waits there already.
    at = 0x2000 - 3
    guest.long(INC, "e6 80", HLT, at=at)
    guest.q[r.RDI] = DATA + 62
    for _ in range(2):
        guest.r.rip = at
        assert isinstance(guest.run(), BusLock)
        assert isinstance(guest.run(), Io)
        guest.cpu.complete()
        assert isinstance(guest.run(), Hlt)
