"""Last-branch records of branches that are really executed."""

import pytest

from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.lbr import FROM, LBR_SELECT, LBR_TOS, LastBranches
from kvmsim.engine.x86.policy import PlainPolicy

CODE, DATA, HANDLER = 0x1000, 0x8000, 0x2000
HLT = "f4"


@pytest.fixture
def guest(make_guest):
    class Machine(PlainPolicy):
        def wrmsr(self, cpu, index, value):
            if index != 0x1D9:
                return False
            cpu.lbr.enabled = bool(value & 1)
            return True

    guest = make_guest(Machine())
    guest.cpu.lbr = LastBranches(32)
    guest.cpu.lbr.enabled = True
    return guest


def taken(guest):
    """(from, to) of all records, the oldest first."""
    return [pair for pair in guest.cpu.lbr.newest() if pair[0]][::-1]


CALLS = (
    "e8 09 00 00 00",  # 1000 call 100e
    "b8 11 10 00 00",  # 1005 mov eax, 1011
    "ff d0",  # 100a call rax
    "eb 05",  # 100c jmp 1013
    "31 c0",  # 100e xor eax, eax
    "c3",  # 1010 ret
    "eb fd",  # 1011 jmp 1010
    "75 02",  # 1013 jne: not taken
    "74 01",  # 1015 je 1018
    "90",
    HLT,  # 1018
)
BRANCHES = [
    (0x1000, 0x100E),
    (0x1010, 0x1005),
    (0x100A, 0x1011),
    (0x1011, 0x1010),
    (0x1010, 0x100C),
    (0x100C, 0x1013),
    (0x1015, 0x1018),
]


def test_calls_returns_and_jumps_are_recorded_in_order(guest):
    guest.long(*CALLS)
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == BRANCHES


@pytest.mark.parametrize(
    ("select", "left"),
    [
        (1 << 3, BRANCHES[1:]),
        (1 << 4, BRANCHES[:2] + BRANCHES[3:]),
        (1 << 5, [BRANCHES[n] for n in (0, 2, 3, 5, 6)]),
        (1 << 7, [BRANCHES[n] for n in (0, 1, 2, 4, 6)]),
        (1 << 2, BRANCHES[:-1]),
        (1, []),
    ],
)
def test_the_filter_hides_what_it_says(guest, select, left):
    guest.long(*CALLS)
    guest.cpu.lbr.write(LBR_SELECT, select)
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == left


def test_the_last_32_branches_of_a_loop_are_left(guest):
    guest.long("ff c9", "75 fc", HLT)  # dec ecx; jnz
    guest.q[r.RCX] = 1000
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == [(CODE + 2, CODE)] * 32
    assert guest.cpu.lbr.tos == 999 % 32


def test_stops_and_slices_neither_add_nor_lose_a_branch(guest):
    guest.vm.slice_bytes = 30
    guest.long("f0 ff 07", "ff c9", "75 f9", HLT)  # lock inc [rdi]; dec; jnz
    guest.q[r.RCX], guest.q[r.RDI] = 20, DATA + 62
    locks = 0
    while not isinstance(stop := guest.run(), Hlt):
        locks += isinstance(stop, BusLock)
    assert locks == 20
    assert taken(guest) == [(CODE + 5, CODE)] * 19


def test_exceptions_and_their_returns_are_far_branches(guest):
    guest.long("0f 0b", "cd 80", HLT).gate(6, HANDLER).gate(0x80, HANDLER + 0x20)
    guest.put(HANDLER, "48 83 04 24 02", "48 cf")  # add qword [rsp], 2; iretq
    guest.put(HANDLER + 0x20, "48 cf")
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == [
        (CODE, HANDLER),
        (HANDLER + 5, CODE + 2),
        (CODE + 2, HANDLER + 0x20),
        (HANDLER + 0x20, CODE + 4),
    ]


def test_repeated_string_instructions_are_no_branches(guest):
    guest.long("f3 a4", HLT)  # rep movsb
    guest.q[r.RSI], guest.q[r.RDI], guest.q[r.RCX] = DATA, DATA + 0x100, 50
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == []


def test_one_address_in_two_address_spaces_keeps_its_own_branches(guest):
    guest.long("90", "eb 01", "90", HLT)  # jmp at 1001
    guest.put(0x2000, "eb 02", "90 90", HLT)  # jmp at 1000
    for gpa, expected in ((CODE, 0x1001), (0x2000, 0x1000), (CODE, 0x1001), (0x2000, 0x1000)):
        guest.map_page(CODE, gpa)
        guest.r.rip = CODE
        guest.cpu.lbr.reset()
        assert isinstance(guest.run(), Hlt)
        assert taken(guest) == [(expected, CODE + 4)]


def test_changed_code_branches_where_it_does_now(guest):
    guest.long("90", "eb 01", "90", HLT)
    assert isinstance(guest.run(), Hlt)
    guest.put(CODE, "eb 02 90")
    guest.r.rip = CODE
    guest.cpu.lbr.reset()
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == [(CODE, CODE + 4)]


def test_the_guest_turns_its_records_on_and_reads_them(guest):
    guest.cpu.lbr.enabled = False
    enable = ("b9 d9 01 00 00", "b8 01 00 00 00", "31 d2", "0f 30")
    disable = ("b9 d9 01 00 00", "31 c0", "0f 30")
    guest.long("eb 00", "eb 00", *enable, "eb 01", "90", *disable, "eb 01 90", "b9 81 06 00 00")
    guest.put(CODE + 4 + 14 + 3 + 9 + 3 + 5, "0f 32", HLT)  # rdmsr FROM_1
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == [(CODE + 18, CODE + 21)]
    assert guest.q[r.RAX] == CODE + 18
    assert guest.cpu.lbr.read(LBR_TOS) == 1
    assert guest.cpu.lbr.read(FROM + 1) == CODE + 18
