"""Port I/O of real code (kvm.md G rows 72 to 82, F.4)."""

from errno import EINTR

import pytest

from kvmsim.abi.exits import Exit

CODE, DATA = 0x1000, 0x8000
HLT = "f4"
MODES = ["real", "long"]


def start(guest, mode, *code, **values):
    getattr(guest, mode)(*code, **{"rdx": 0x3F8, "rax": 0x44332211, **values})
    return guest


@pytest.mark.parametrize(
    ("mode", "code", "port", "data"),
    [
        ("real", "e6 80", 0x80, "11"),
        ("real", "e7 80", 0x80, "11 22"),
        ("real", "66 e7 80", 0x80, "11 22 33 44"),
        ("real", "ee", 0x3F8, "11"),
        ("long", "e6 80", 0x80, "11"),
        ("long", "66 e7 80", 0x80, "11 22"),
        ("long", "e7 80", 0x80, "11 22 33 44"),
        ("long", "66 ef", 0x3F8, "11 22"),
        ("long", "ef", 0x3F8, "11 22 33 44"),
    ],
)
def test_row_72_out_shows_what_the_guest_wrote(guest, mode, code, port, data):
    start(guest, mode, code, HLT)
    assert guest.run() == Exit.IO
    written = bytes.fromhex(data)
    assert guest.io() == (True, len(written), port, written)
    assert (guest.field(40, 8), guest.field(14, 2)) == (4096, 0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == CODE + len(bytes.fromhex(code)) + 1


@pytest.mark.parametrize(
    ("mode", "code", "size", "rax"),
    [
        ("real", "e4 80", 1, 0xFFFFFFFFFFFFFF01),
        ("real", "ed", 2, 0xFFFFFFFFFFFF0201),
        ("long", "ec", 1, 0xFFFFFFFFFFFFFF01),
        ("long", "66 ed", 2, 0xFFFFFFFFFFFF0201),
        ("long", "ed", 4, 0x04030201),
    ],
)
def test_row_74_in_is_completed_when_the_guest_is_entered_again(guest, mode, code, size, rax):
    start(guest, mode, code, HLT, rax=0xFFFFFFFFFFFFFFFF)
    assert guest.run() == Exit.IO
    assert guest.io()[:2] == (False, size)
    assert guest.regs("rip") == CODE
    guest.answer_io(bytes([1, 2, 3, 4][:size]))
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == rax


def test_row_75_a_run_that_does_not_enter_completes_in(guest):
    start(guest, "long", "ec", HLT)
    assert guest.run() == Exit.IO
    guest.answer_io(b"\x99")
    assert guest.finish() == (-1, EINTR)
    assert (guest.field(8), guest.regs("rip")) == (Exit.IO, CODE + 1)
    assert guest.regs("rax") == 0x44332299
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x44332299


def outs(guest):
    """What string output says, however many exits that takes."""
    seen = b""
    while guest.run() == Exit.IO:
        seen += guest.io()[3]
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("code", "flags", "rsi", "data"),
    [
        ("f3 6e", 2, DATA, b"0123"),
        ("fd f3 6e", 2, DATA + 3, b"3210"),
        ("6e 6e", 2, DATA, b"01"),
    ],
)
def test_string_output_goes_out_in_order(guest, mode, code, flags, rsi, data):
    start(guest, mode, code, HLT, rsi=rsi, rcx=4, rflags=flags)
    guest.ram[DATA : DATA + 4] = b"0123"
    assert outs(guest) == data


def test_row_82_the_first_exit_of_rep_outsb_has_one_byte(guest):
    start(guest, "real", "f3 6e", HLT, rsi=DATA, rcx=4)
    guest.ram[DATA : DATA + 4] = b"0123"
    assert guest.run() == Exit.IO
    assert guest.io() == (True, 1, 0x3F8, b"0")


def test_rep_outsw_in_long_mode_leaves_its_registers_at_the_end(guest):
    start(guest, "long", "f3 66 6f", HLT, rsi=DATA, rcx=3)
    guest.ram[DATA : DATA + 6] = b"abcdef"
    assert outs(guest) == b"abcdef"
    assert (guest.regs("rsi"), guest.regs("rcx")) == (DATA + 6, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 5, 2500])
def test_rep_insb_fills_memory(guest, mode, count):
    """However many bytes KVM asks for at once."""
    start(guest, mode, "f3 6c", HLT, rdi=DATA, rcx=count)
    data = bytes(number * 7 % 251 for number in range(count))
    left = data
    while guest.run() == Exit.IO:
        wanted = len(guest.io()[3])
        guest.answer_io(left[:wanted])
        left = left[wanted:]
    assert left == b""
    assert bytes(guest.ram[DATA : DATA + count + 1]) == data + b"\0"
    assert (guest.regs("rdi"), guest.regs("rcx")) == (DATA + count, 0)


def test_insd_backwards(guest):
    start(guest, "long", "fd 6d", HLT, rdi=DATA + 8)
    assert guest.run() == Exit.IO
    assert guest.io()[:2] == (False, 4)
    guest.answer_io(b"\1\2\3\4")
    assert guest.run() == Exit.HLT
    assert guest.word(DATA + 8, size_bytes=4) == 0x04030201
    assert guest.regs("rdi") == DATA + 4


def test_rep_with_a_count_of_zero_asks_nobody(guest):
    start(guest, "long", "f3 6e", HLT, rsi=DATA, rcx=0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rsi") == DATA


def test_row_77_hlt_stops_behind_itself(guest):
    start(guest, "real", HLT, "40", HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == CODE + 1
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") & 0xFFFF == 0x2212


def test_ring_3_may_not_use_ports(guest):
    """IOPL 0 and a TSS without a bitmap: #GP with error code 0."""
    guest.long("ee", HLT, ring=3, rdx=0x3F8)
    guest.gate(13)
    guest.put(0x2000, HLT)
    assert guest.run() == Exit.HLT
    assert guest.word(guest.regs("rsp")) == 0
    assert guest.word(guest.regs("rsp") + 8) == CODE
