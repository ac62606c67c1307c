"""Memory that is not there: exits for user space (kvm.md G row 81)."""

from errno import EINTR

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit

CODE, DATA, RAM, DEVICE = 0x1000, 0x8000, 0x40000, 0x100000
HLT = "f4"
READ_ONLY = 2


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [
        ("8a 07", 1, 0x44332281),
        ("66 8b 07", 2, 0x44338281),
        ("8b 07", 4, 0x84838281),
        ("48 8b 07", 8, 0x8887868584838281),
        ("0f b7 07", 2, 0x8281),
        ("48 0f be 07", 1, 0xFFFFFFFFFFFFFF81),
        ("48 63 07", 4, 0xFFFFFFFF84838281),
    ],
)
def test_row_81_a_read_is_completed_with_the_answer(guest, code, size, rax):
    guest.long(code, HLT, rdi=DEVICE, rax=0x44332211)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (False, DEVICE, size)
    assert guest.regs("rip") == CODE
    guest.answer_mmio(bytes(range(0x81, 0x81 + size)))
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == rax


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("88 07", "11"),
        ("66 89 07", "11 22"),
        ("89 07", "11 22 33 44"),
        ("48 89 07", "11 22 33 44 55 66 77 88"),
        ("aa", "11"),
        ("c7 07 04 03 02 01", "04 03 02 01"),
    ],
)
def test_a_write_is_one_exit(guest, code, data):
    guest.long(code, HLT, rdi=DEVICE, rax=0x8877665544332211)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE, bytes.fromhex(data))
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == CODE + len(bytes.fromhex(code)) + 1


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ("83 07 05", "07 00 00 00"),  # add dword [rdi], 5
        ("80 27 0f", "02"),  # and byte [rdi], 15
        ("ff 0f", "01 00 00 00"),  # dec dword [rdi]
        ("f0 ff 07", "03 00 00 00"),  # lock inc dword [rdi]
        ("f7 1f", "fe ff ff ff"),  # neg dword [rdi]
    ],
)
def test_read_modify_write_reads_then_writes(guest, code, written):
    guest.long(code, HLT, rdi=DEVICE)
    data = bytes.fromhex(written)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (False, DEVICE, len(data))
    guest.answer_mmio(bytes([2, *bytes(len(data) - 1)]))
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE, data)
    assert guest.run() == Exit.HLT


def test_xchg_reads_and_writes(guest):
    guest.long("87 07", HLT, rdi=DEVICE, rax=0x11223344)
    assert guest.run() == Exit.MMIO
    guest.answer_mmio(b"\x01\x02\x03\x04")
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE, b"\x44\x33\x22\x11")
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x04030201


def test_a_comparison_reads_only(guest):
    guest.long("83 3f 05", "0f 94 c0", HLT, rdi=DEVICE, rax=0)  # cmp dword [rdi], 5; sete al
    assert guest.run() == Exit.MMIO
    guest.answer_mmio(b"\5\0\0\0")
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 1


def test_from_a_device_to_memory(guest):
    guest.long("48 a5", HLT, rsi=DEVICE, rdi=DATA)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (False, DEVICE, 8)
    guest.answer_mmio(b"12345678")
    assert guest.run() == Exit.HLT
    assert bytes(guest.ram[DATA : DATA + 8]) == b"12345678"
    assert (guest.regs("rsi"), guest.regs("rdi")) == (DEVICE + 8, DATA + 8)


def test_rep_stosb_to_a_device_is_an_exit_for_each_byte(guest):
    guest.long("f3 aa", HLT, rdi=DEVICE, rcx=3, rax=0x41)
    seen = []
    while guest.run() == Exit.MMIO:
        seen.append(guest.mmio())
    assert seen == [(True, DEVICE + number, b"A") for number in range(3)]
    assert guest.regs("rcx") == 0


def test_a_push_to_a_device(guest):
    guest.long("50", HLT, rsp=DEVICE + 8, rax=0x1122334455667788)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE, bytes.fromhex("8877665544332211"))
    assert guest.run() == Exit.HLT
    assert guest.regs("rsp") == DEVICE


def test_sixteen_bytes_are_two_exits(guest):
    """KVM splits what does not fit into the page's eight bytes."""
    guest.long("f3 0f 6f 06", "0f 11 07", HLT, rsi=DATA, rdi=DEVICE)  # movdqu; movups
    guest.ram[DATA : DATA + 16] = b"0123456789abcdef"
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE, b"01234567")
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE + 8, b"89abcdef")
    assert guest.run() == Exit.HLT


@pytest.mark.parametrize(
    ("code", "offset", "asked"),
    [
        ("48 8b 07", 3, [(3, 8)]),
        ("48 8b 07", 5, [(5, 8)]),
        ("8b 07", 7, [(7, 4)]),
        ("ff 37", 3, [(3, 8)]),  # push qword [rdi]
        ("48 8b 07", 0xFFD, [(0xFFD, 3), (0x1000, 5)]),
        ("48 8b 07", 0xFF9, [(0xFF9, 7), (0x1000, 1)]),
        ("8b 07", 0xFFE, [(0xFFE, 2), (0x1000, 2)]),
        ("0f b7 07", 0xFFF, [(0xFFF, 1), (0x1000, 1)]),
    ],
)
def test_an_unaligned_read_asks_for_its_bytes_page_by_page_and_no_others(
    guest, code, offset, asked
):
    guest.long(code, HLT, rdi=DEVICE + offset, rax=0, rsp=DATA)
    for at, size in asked:
        assert guest.run() == Exit.MMIO
        assert guest.mmio() == (False, DEVICE + at, size)
        guest.answer_mmio(bytes((at + n) & 0x7F for n in range(size)))
    assert guest.run() == Exit.HLT
    size = sum(size for _, size in asked)
    answer = bytes((offset + n) & 0x7F for n in range(size))
    pushed = code == "ff 37"
    where = guest.ram[DATA - 8 : DATA] if pushed else guest.regs("rax").to_bytes(8, "little")
    assert bytes(where[:size]) == answer


@pytest.mark.parametrize(
    ("code", "offset", "written"),
    [
        ("48 89 07", 3, [(3, "11 22 33 44 55 66 77 88")]),
        ("48 89 07", 0xFFD, [(0xFFD, "11 22 33"), (0x1000, "44 55 66 77 88")]),
        ("66 89 07", 0xFFF, [(0xFFF, "11"), (0x1000, "22")]),
    ],
)
def test_an_unaligned_write_goes_out_page_by_page(guest, code, offset, written):
    guest.long(code, HLT, rdi=DEVICE + offset, rax=0x8877665544332211)
    for at, data in written:
        assert guest.run() == Exit.MMIO
        assert guest.mmio() == (True, DEVICE + at, bytes.fromhex(data))
    assert guest.run() == Exit.HLT


@pytest.mark.parametrize(
    ("code", "offset", "asked"),
    [
        ("66 0f 6f 07", 0, [(0, 8), (8, 8)]),  # movdqa xmm0, [rdi]
        ("f3 0f 6f 07", 3, [(3, 8), (11, 8)]),  # movdqu
        ("f3 0f 6f 07", 0xFF8, [(0xFF8, 8), (0x1000, 8)]),
        ("f3 0f 6f 07", 0xFF3, [(0xFF3, 8), (0xFFB, 5), (0x1000, 3)]),
    ],
)
def test_a_read_of_sixteen_bytes_asks_for_eight_at_a_time(guest, code, offset, asked):
    guest.long(code, "f3 0f 7f 06", HLT, rdi=DEVICE + offset, rsi=DATA)  # movdqu [rsi], xmm0
    for at, size in asked:
        assert guest.run() == Exit.MMIO
        assert guest.mmio() == (False, DEVICE + at, size)
        guest.answer_mmio(bytes((at + n) & 0x7F for n in range(size)))
    assert guest.run() == Exit.HLT
    assert bytes(guest.ram[DATA : DATA + 16]) == bytes((offset + n) & 0x7F for n in range(16))


def test_a_read_across_the_end_of_memory_asks_for_the_rest_only(guest):
    guest.long("48 8b 07", HLT, rdi=RAM - 4)
    guest.ram[RAM - 4 : RAM] = b"\1\2\3\4"
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (False, RAM, 4)
    guest.answer_mmio(b"\5\6\7\x08")
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x0807060504030201


def test_a_write_across_the_end_of_memory_writes_both(guest):
    guest.long("48 89 07", HLT, rdi=RAM - 4, rax=0x0807060504030201)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, RAM, b"\5\6\7\x08")
    assert guest.run() == Exit.HLT
    assert bytes(guest.ram[RAM - 4 : RAM]) == b"\1\2\3\4"


def test_a_read_is_completed_also_by_a_run_that_does_not_enter(guest):
    guest.long("8b 07", HLT, rdi=DEVICE)
    assert guest.run() == Exit.MMIO
    guest.answer_mmio(b"\x09\0\0\0")
    assert guest.finish() == (-1, EINTR)
    assert (guest.regs("rax"), guest.regs("rip")) == (9, CODE + 2)


def test_read_only_memory_is_read_directly_and_written_by_user_space(guest):
    rom = guest.add_memory(1, DEVICE, 4096, READ_ONLY)
    rom[:4] = b"\1\2\3\4"
    guest.long("8b 07", "89 1f", "8b 0f", HLT, rdi=DEVICE, rbx=0x99)
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (True, DEVICE, b"\x99\0\0\0")
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == guest.regs("rcx") == 0x04030201


def test_real_mode_reaches_devices_too(guest):
    guest.real("b8 00 f0", "8e d8", "a1 00 10", HLT)  # ds = f000; mov ax, [1000]
    assert guest.run() == Exit.MMIO
    assert guest.mmio() == (False, 0xF1000, 2)
    guest.answer_mmio(b"\x34\x12")
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") & 0xFFFF == 0x1234


def test_an_instruction_that_kvm_cannot_emulate_is_shown_to_user_space(guest):
    """x87: with KVM_CAP_EXIT_ON_EMULATION_FAILURE, its bytes as well."""
    enable = bytearray(104)
    enable[0], enable[8] = 204, 1
    assert guest.world.ioctl(guest.vm, ioctls.KVM_ENABLE_CAP, enable) == (0, 0)
    guest.long("d9 00", HLT, rax=DEVICE)  # fld dword [rax]
    assert guest.run() == Exit.INTERNAL_ERROR
    suberror, nr_words, flags = guest.field(32), guest.field(36), guest.field(40, 8)
    assert (suberror, nr_words >= 3, flags & 1) == (1, True, 1)
    assert guest.page[48] >= 2
    assert bytes(guest.page[49:51]) == b"\xd9\x00"
    assert guest.regs("rip") == CODE
    guest.set_regs(rip=CODE + 2)
    assert guest.run() == Exit.HLT


def test_a_store_of_the_x87_control_word_is_emulated(guest):
    guest.long("d9 38", HLT, rax=DEVICE)  # fnstcw [rax]
    assert guest.run() == Exit.MMIO
    assert guest.mmio()[:2] == (True, DEVICE)
