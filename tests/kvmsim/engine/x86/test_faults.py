"""Faults as a processor reports them, where the emulator does otherwise."""

import pytest

from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.x86 import registers as r

CODE, HANDLER, STACK = 0x1000, 0x2000, 0x6000
HLT = "f4"
HOLE = 0x180000
BAD = 0x1234_5678_9ABC_0000


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("ff 07", 2),  # inc dword [rdi]
        ("01 07", 2),  # add [rdi], eax
        ("87 07", 2),  # xchg
        ("0f b1 0f", 2),  # cmpxchg
        ("f7 17", 2),  # not
        ("03 07", 0),  # add eax, [rdi]
        ("39 07", 0),  # cmp [rdi], eax
        ("f7 27", 0),  # mul
        ("8b 07", 0),
        ("89 07", 2),
    ],
)
def test_a_page_fault_of_an_instruction_that_writes_says_so(guest, code, error):
    guest.long(code, HLT).gate(14, HANDLER)
    guest.map_page(HOLE, 0, 0)
    guest.put(HANDLER, HLT)
    guest.q[r.RDI] = HOLE
    assert isinstance(guest.run(), Hlt)
    assert guest.word(guest.q[r.RSP], 8) == error
    assert guest.r.cr2 == HOLE


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("50", 12),  # push rax
        ("58", 12),  # pop rax
        ("c3", 12),
        ("8b 04 24", 12),  # mov eax, [rsp]
        ("8b 45 00", 12),  # mov eax, [rbp]
        ("8b 07", 13),  # mov eax, [rdi]
        ("65 8b 45 00", 13),  # mov eax, gs:[rbp]
    ],
)
def test_a_stack_that_is_not_canonical_is_a_stack_fault(guest, code, vector):
    guest.long(code, HLT).gate(12, HANDLER, ist=1).gate(13, 0x2100, ist=1)
    guest.put(HANDLER, HLT)
    guest.put(0x2100, HLT)
    guest.q[r.RSP] = guest.q[r.RBP] = guest.q[r.RDI] = BAD
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == {12: HANDLER, 13: 0x2100}[vector] + 1


@pytest.mark.parametrize(
    "code",
    [
        *("c6 08 01", "c7 c8 01 00 00 00", "8f c8", "0f 38 f0 c8"),
        *("f3 0f ae f0", "f2 0f ae f0", "66 0f ae f0"),  # umonitor; umwait; tpause
        "f3 48 0f ae e8",  # incsspq
        *("0f 50 47 fc", "66 0f 72 57 fc 01", "f2 0f d6 47 fc", "f3 0f d6 47 fc"),
    ],
)
def test_forms_that_do_not_exist_are_undefined(guest, code):
    guest.long(code, HLT).gate(6, HANDLER)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == HANDLER + 1


@pytest.mark.parametrize(
    "code", ["66 0f d6 07", "0f ae f0", "0f ae e8", "48 0f ae f0", "66 0f ae 37"]
)
def test_what_looks_like_them_exists(guest, code):
    guest.long(code, HLT)
    guest.q[r.RDI] = 0x8000
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x1001 + len(bytes.fromhex(code))


def test_crc32_and_movbe_exist(guest):
    guest.long("f2 0f 38 f1 c8", "0f 38 f0 07", HLT)
    guest.q[r.RDI] = 0x8000
    guest.set_word(0x8000, 0x01020304, 4)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 0x04030201


@pytest.mark.parametrize(
    "code",
    [
        "f0 ff 07",  # a locked instruction
        "0f 22 d8",  # mov cr3, rax: a site that faults by itself
    ],
)
def test_flags_computed_before_a_watched_instruction_survive_its_fault(guest, code):
    guest.long("38 d1", code, HLT, ring=3).gate(13, HANDLER).gate(14, HANDLER)  # cmp cl, dl
    guest.map_page(HOLE, 0, 0)
    guest.put(HANDLER, HLT)
    guest.q[r.RDI], guest.q[r.RCX], guest.q[r.RDX] = HOLE, 4, 0xF4
    for _ in range(2):
        assert isinstance(guest.run(), Hlt)
        pushed = guest.word(guest.q[r.RSP] + 24, 8)
        assert pushed & 0x8D5 == 0x01
        guest.long(ring=3).map_page(HOLE, 0, 0)
        guest.r.flags = 2


def test_flags_survive_the_fault_of_what_follows_a_bus_lock(guest):
    # stc; lock dec dword [rdi]; mov eax, [rsi]
    guest.long("f9", "f0 ff 0f", "8b 06", HLT).gate(14, HANDLER)
    guest.put(HANDLER, HLT)
    guest.q[r.RSI] = HOLE
    for at in (0x803E, 0x803E, 0x8000, 0x803E):
        guest.long().map_page(HOLE, 0, 0)
        guest.q[r.RDI] = at
        guest.set_word(at, 0x80000000, 4)
        stop = guest.run()
        while isinstance(stop, BusLock):
            stop = guest.run()
        assert isinstance(stop, Hlt)
        assert guest.word(guest.q[r.RSP] + 24, 8) & 0x8D5 == 0x815


@pytest.mark.parametrize(
    ("before", "code", "result"),
    [
        ("f9 04 00 f9", "c0 17 01", 0x03),  # stc; rcl byte [rdi], 1
        ("3c 02", "c0 17 01", 0x03),  # cmp al, 2: CF
        ("04 00", "c0 1f 01", 0x00),  # add al, 0: no CF; rcr
        ("84 c0", "0f 9f 07", 0x01),  # test al, al; setg: al is 1
        ("3c 02", "0f 9f 07", 0x00),  # cmp al, 2; setg
        ("3c 02", "0f 96 07", 0x01),  # setbe
        ("04 7f", "0f 90 07", 0x01),  # add al, 0x7f: overflow; seto
        ("3c 02", "0f 9a 07", 0x01),  # cmp: 0xff has even parity; setp
        ("84 c0", "0f 96 07", 0x00),  # test; setbe
        ("3c 01", "0f 94 07", 0x01),  # sete
        ("3c 01 eb 00", "0f 94 07", 0x01),  # in another block
        ("3c 02 eb 00", "0f 94 07", 0x00),
        ("3c 02 eb 00", "0f 98 07", 0x01),  # sets
        ("a8 03 eb 00", "0f 95 07", 0x01),  # test; setne
        ("04 ff eb 00", "0f 94 07", 0x01),  # add al, -1: zero
    ],
)
def test_an_instruction_tried_again_after_its_page_fault_has_its_flags(guest, before, code, result):
    guest.long(before, code, HLT).gate(14, HANDLER)
    # The handler maps the page and returns: or byte [entry], 7; add rsp, 8; iretq
    entry = 0x13000 + (HOLE >> 12) * 8
    guest.put(HANDLER, "80 0c 25", entry.to_bytes(4, "little").hex(), "07", "48 83 c4 08 48 cf")
    guest.map_page(HOLE, 0x9000, 0)
    guest.q[r.RAX], guest.q[r.RDI] = 1, HOLE
    guest.ram[0x9000] = 1 if code.startswith("c0 17") else 0
    assert isinstance(guest.run(), Hlt)
    assert guest.ram[0x9000] == result


@pytest.mark.parametrize("code", ["0f c7 0f", "48 0f c7 0f", "f0 0f c7 0f"])
@pytest.mark.parametrize(("before", "flags"), [("00 c8", 0x11), ("3c 02", 0x90), ("f9", 0x01)])
def test_comparing_and_exchanging_pairs_changes_no_flag_but_zero(guest, before, flags, code):
    guest.long(before, "b8 00 00 00 00", code, "9c", HLT)  # pushf
    guest.q[r.RAX], guest.q[r.RCX], guest.q[r.RDI] = 0xF1, 0x1F, 0x8010
    guest.set_word(0x8010, 0x77)
    assert isinstance(guest.run(), Hlt)
    assert guest.word(guest.q[r.RSP], 8) & ~4 == 2 | flags


@pytest.mark.parametrize("code", ["0f 01 7d 00", "0f 01 55 00", "0f 00 5d 00"])
def test_privileged_instructions_of_ring_3_are_gp_wherever_their_operand_is(guest, code):
    # invlpg [rbp]; lgdt; ltr
    guest.long(code, HLT, ring=3).gate(12, HANDLER).gate(13, 0x2100)
    guest.put(HANDLER, HLT)
    guest.put(0x2100, HLT)
    guest.q[r.RBP] = BAD
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2101


@pytest.mark.parametrize("code", ["48 cf", "cb", "48 ca 08 00"])  # iretq, retf, retf 8
def test_a_far_return_of_ring_3_reads_its_stack_as_ring_3(guest, code):
    guest.long(code, HLT, ring=3).gate(14, HANDLER)
    guest.map_page(HOLE, 0, 0)
    guest.put(HANDLER, HLT)
    guest.q[r.RSP] = HOLE
    assert isinstance(guest.run(), Hlt)
    assert guest.word(guest.q[r.RSP], 8) == 4
    assert guest.r.cr2 - HOLE < 16
