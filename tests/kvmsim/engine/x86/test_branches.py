"""Last-branch records of branches that are really executed."""

import random
import threading

import pytest

from kvmsim.engine.base import BusLock, Executing, Hlt
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86 import stepping
from kvmsim.engine.x86.branches import BranchFeed
from kvmsim.engine.x86.decode import Branch, branch_of, decode
from kvmsim.engine.x86.lbr import FROM, INFO, LBR_SELECT, LBR_TOS, LastBranches
from kvmsim.engine.x86.policy import PlainPolicy
from kvmsim.engine.x86.watch import Why

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


@pytest.mark.parametrize("native", [None, False])
def test_jumps_to_the_very_next_instruction_are_branches(guest, native):
    guest.vm.branches = BranchFeed(guest.vm, native=native)
    guest.long(
        "31 c9",  # xor ecx, ecx
        "eb 00",  # 1002 jmp
        "e8 00 00 00 00",  # 1004 call
        "75 00",  # 1009 jne: not taken
        "74 00",  # 100b je
        "e3 00",  # 100d jrcxz
        "ff c1",  # 100f inc ecx
        "e2 00",  # 1011 loop: not taken
        "7e 00",  # 1013 jle: not taken
        "7f 00",  # 1015 jg
        HLT,
    )
    assert isinstance(guest.run(), Hlt)
    straight = [(0x1002, 2), (0x1004, 5), (0x100B, 2), (0x100D, 2), (0x1015, 2)]
    assert taken(guest) == [(source, source + length) for source, length in straight]


@pytest.mark.parametrize("native", [None, False])
def test_a_jump_into_its_own_block_is_a_branch(guest, native):
    guest.vm.branches = BranchFeed(guest.vm, native=native)
    guest.long("ff c0", "ff c0", "ff c9", "75 fa", HLT)  # back to the second inc
    guest.q[r.RCX] = 3
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == [(CODE + 6, CODE + 2)] * 2


def test_records_under_single_step_are_those_without(guest):
    guest.long(*CALLS).gate(1, HANDLER)
    guest.put(HANDLER, "48 cf")
    guest.cpu.lbr.write(LBR_SELECT, 1 << 8)
    guest.r.flags |= 1 << 8
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == BRANCHES


def test_cycles_since_the_last_record_follow_the_code_in_between(guest):
    guest.long("eb 00", "90" * 38, "eb 00", HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.lbr.read(INFO + 2) == 10


def test_two_processors_have_records_of_their_own(guest):
    guest.long("eb 00", "f4")
    other = guest.vm.add_cpu()
    other.saved[:] = bytes(guest.cpu.saved)
    other.changed()
    guest.put(0x2000, "eb 00", "eb 00", "f4")
    other.registers.rip = 0x2000
    other.lbr = LastBranches(16)
    other.lbr.enabled = True
    assert isinstance(guest.run(), Hlt)
    assert isinstance(guest.vm.run(other), Hlt)
    assert taken(guest) == [(CODE, CODE + 2)]
    assert [pair[0] for pair in other.lbr.newest() if pair[0]] == [0x2002, 0x2000]


def test_a_processor_without_records_leaves_the_others_alone(guest):
    guest.vm.slice_bytes = 30
    guest.long("ff c9", "75 fc", "f4")
    guest.q[r.RCX] = 40
    other = guest.vm.add_cpu()
    other.saved[:] = bytes(guest.cpu.saved)
    other.changed()
    others = []
    while not isinstance(guest.run(), Hlt):
        others.append(guest.vm.run(other))
    assert others
    assert guest.cpu.lbr.tos == 39 % 32


def test_kicks_by_another_thread_neither_add_nor_lose_a_branch(make_guest):
    guest = make_guest(paced=False, inline_bytes=0)
    # l: lock inc [rdi]; inc ecx; cmp byte [rsi], 0; je l; hlt
    guest.long("f0 ff 07", "ff c1", "80 3e 00", "74 f6", HLT)
    guest.q[r.RDI], guest.q[r.RSI] = DATA, DATA + 64
    guest.cpu.lbr = LastBranches(32)
    guest.cpu.lbr.enabled = True
    kicks = 0
    while isinstance(stop := guest.run(), Executing):
        thread = threading.Thread(target=stop.work)
        thread.start()
        for _ in range(kicks % 16 * 500):  # not always as it begins
            pass
        stop.kick()
        thread.join(10)
        assert not thread.is_alive()
        kicks += 1
        guest.ram[DATA + 64] = kicks >= 300
    assert isinstance(stop, Hlt)
    assert set(taken(guest)) == {(CODE + 8, CODE)}
    assert guest.cpu.lbr.tos == (guest.q[r.RCX] - 1) % 32
    assert guest.word(DATA) == guest.q[r.RCX]


# -- random code, against the same code executed step by step ------------------------------------

PIECES = ("ff c8", "01 d8", "31 c3", "jcc", "jcc", "jmp", "call", "loop", "ret")
#: Those below 60 whose program ends.
SEEDS = (
    *(3, 5, 7, 8, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 23, 27, 28, 29, 30, 31, 33, 34, 35),
    *(37, 43, 48, 49, 50, 51, 52, 54, 56, 57, 59),
)
CHAIN = 24
"""Instructions of a random program, all in one cache of blocks."""


def random_program(seed):
    """Code of short branches in all directions, and how it is laid out."""
    chance = random.Random(seed)
    pieces = [chance.choice(PIECES) for _ in range(CHAIN)]
    sizes = {"jcc": 2, "jmp": 2, "call": 5, "loop": 2, "ret": 1}
    starts = [CODE]
    for piece in pieces:
        starts.append(starts[-1] + sizes.get(piece, 2))
    code = b""
    for number, piece in enumerate(pieces):
        following = starts[number + 1]
        target = starts[chance.randrange(max(0, number - 3), min(CHAIN, number + 6) + 1)]
        if piece == "call":
            code += b"\xe8" + (target - following).to_bytes(4, "little", signed=True)
        elif piece == "ret":
            code += b"\xc3"
        elif piece in sizes:
            opcode = {"jmp": 0xEB, "loop": 0xE2}.get(piece, 0x70 + chance.randrange(16))
            code += bytes([opcode]) + (target - following).to_bytes(1, "little", signed=True)
        else:
            code += bytes.fromhex(piece)
    return code + b"\xf4"


def stepped(guest, limit):
    """Branches of a program by its RIPs: an instruction that goes elsewhere, or is one anyway."""
    found = []
    guest.vm.load(guest.cpu)
    guest.vm.meter.start(1 << 40)
    for _ in range(limit):
        source = guest.r.rip
        code = guest.vm.watch.read_code(source, 15)
        instruction = decode(code, 0, 64)
        before, q = guest.r.flags, list(guest.q[:16])
        if instruction.opcode == 0xF4:
            return found, True
        assert stepping.single(guest.vm, guest.cpu) is Why.NOTHING
        kind = branch_of(instruction)
        straight = guest.r.rip == source + instruction.length
        if not straight or kind not in {None, Branch.CONDITIONAL}:
            found.append((source, guest.r.rip))
        elif kind is Branch.CONDITIONAL and code[1] == 0:
            q[1] -= instruction.opcode == 0xE2
            if condition(instruction.opcode, before, q[1] & (1 << 64) - 1):
                found.append((source, guest.r.rip))
    return found, False


def condition(opcode, flags, count):
    """The manual's table of conditions, written out."""
    if opcode == 0xE2:
        return count != 0
    cf, pf, zf, sf, of = (bool(flags >> bit & 1) for bit in (0, 2, 6, 7, 11))
    table = [of, cf, zf, cf or zf, sf, pf, sf != of, zf or sf != of]
    return table[(opcode & 15) >> 1] != bool(opcode & 1)


def prepared(guest, code, seed):
    guest.long(code.hex())
    guest.q[r.RCX], guest.q[r.RBX], guest.q[r.RAX] = 5, seed * 77, seed
    # What RET finds: some more of the program, the end at last.
    for at in range(64):
        guest.set_word(0x6000 + 8 * at, CODE + len(code) - 1)
    return guest


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_code_has_the_branches_it_has_step_by_step(make_guest, seed, native):
    code = random_program(seed)
    slow = prepared(make_guest(), code, seed)
    expected, ended = stepped(slow, 300)
    guest = prepared(make_guest(), code, seed)
    guest.vm.branches = BranchFeed(guest.vm, native=native)
    guest.cpu.lbr = LastBranches(32)
    guest.cpu.lbr.enabled = True
    assert ended
    assert isinstance(guest.run(), Hlt)
    assert taken(guest) == expected[-32:]
