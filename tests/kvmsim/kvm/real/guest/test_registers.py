"""Registers, CPUID, MSRs and hypercalls as the guest and user space see them."""

from errno import EINTR

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import KVM_REGS

CODE, HANDLER, STACK, DATA = 0x1000, 0x2000, 0x6000, 0x8000
HLT, NOP = "f4", "90"
RDMSR, WRMSR = "0f 32", "0f 30"
VALID, REGS, DIRTY = 288, 304, 296
USER_SPACE_MSR = 188
NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))


def msr(guest, index):
    data = bytearray(8 + 16)
    data[0], data[8:12] = 1, index.to_bytes(4, "little")
    assert guest.ioctl(ioctls.KVM_GET_MSRS, data) == (1, 0)
    return int.from_bytes(data[16:], "little")


def set_msr(guest, index, value):
    data = bytearray(8 + 16)
    data[0], data[8:12], data[16:] = 1, index.to_bytes(4, "little"), value.to_bytes(8, "little")
    assert guest.ioctl(ioctls.KVM_SET_MSRS, data) == (1, 0)


def enable(guest, cap, value):
    data = bytearray(104)
    data[:4], data[8:16] = cap.to_bytes(4, "little"), value.to_bytes(8, "little")
    assert guest.world.ioctl(guest.vm, ioctls.KVM_ENABLE_CAP, data) == (0, 0)


def test_every_register_reaches_the_guest_and_comes_back(guest):
    guest.long("48 ff c0", HLT, **{n: 0x1111111111111111 * i for i, n in enumerate(NAMES)})
    assert guest.run() == Exit.HLT
    assert [guest.regs(name) for name in NAMES] == [
        1,
        *(0x1111111111111111 * number for number in range(1, len(NAMES))),
    ]


def test_flags_come_back(guest):
    guest.long("f9", "48 83 e8 01", HLT, rax=0, rflags=0x202)  # stc; sub rax, 1
    assert guest.run() == Exit.HLT
    assert guest.regs("rflags") == 0x297  # IF SF AF PF CF


def test_row_84_the_page_shows_registers_and_takes_them(guest):
    guest.long("ff c3", HLT, "ff c3", HLT)
    guest.page[VALID] = 1
    assert guest.run() == Exit.HLT
    shown = KVM_REGS.get(guest.page[REGS : REGS + 144], "rbx")
    assert shown == 1
    offset = REGS + KVM_REGS.fields["rbx"].offset
    guest.page[offset : offset + 8] = (41).to_bytes(8, "little")
    guest.page[DIRTY] = 1
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") == 42


def test_system_registers_the_guest_changes_are_shown(guest):
    guest.long(
        "0f 20 e0 0d 80 00 00 00 0f 22 e0",  # CR4 |= PGE
        "0f 20 c0 0d 00 00 01 00 0f 22 c0",  # CR0 |= WP
        "b8 10 00 00 00 8e e0",  # mov fs, 10h
        HLT,
    )
    assert guest.run() == Exit.HLT
    assert (guest.sregs("cr4"), guest.sregs("cr0")) == (0x6A0, 0x80010033)
    assert guest.sregs("fs.selector") == 0x10


def test_tables_the_guest_loads_are_shown(guest):
    guest.long("0f 01 16", HLT, rsi=DATA)  # lgdt [rsi]
    guest.word(DATA, 0x47, 2)
    guest.word(DATA + 2, 0x3000)
    assert guest.run() == Exit.HLT
    assert (guest.sregs("gdt.base"), guest.sregs("gdt.limit")) == (0x3000, 0x47)


def test_cpuid_is_what_user_space_set(guest):
    guest.set_cpuid(
        (0, 0, 0, 7, 0x11, 0x22, 0x33),
        (4, 0, 1, 1, 2, 3, 4),
        (4, 1, 1, 5, 6, 7, 8),
        (0x40000000, 0, 0, 0x40000001, 0xA, 0xB, 0xC),
    )
    guest.long("0f a2", "f4", "b8 04 00 00 00 b9 01 00 00 00 0f a2", "f4", rax=0, rcx=9)
    assert guest.run() == Exit.HLT
    assert [guest.regs(name) for name in ("rax", "rbx", "rcx", "rdx")] == [7, 0x11, 0x22, 0x33]
    assert guest.run() == Exit.HLT
    assert [guest.regs(name) for name in ("rax", "rbx", "rcx", "rdx")] == [5, 6, 7, 8]


def test_a_leaf_that_is_not_in_the_table_is_zero(guest):
    guest.set_cpuid((0, 0, 0, 7, 0x11, 0x22, 0x33))
    guest.long("0f a2", HLT, rax=3, rbx=9)
    assert guest.run() == Exit.HLT
    assert [guest.regs(name) for name in ("rax", "rbx", "rcx", "rdx")] == [0, 0, 0, 0]


@pytest.mark.parametrize("index", [0xC0000081, 0xC0000082, 0xC0000102, 0x174, 0x277])
def test_user_space_sees_what_the_guest_wrote(guest, index):
    """STAR, LSTAR, KERNEL_GS_BASE, SYSENTER_CS, PAT."""
    guest.long(WRMSR, HLT, rcx=index, rax=0x06060606, rdx=0)
    assert guest.run() == Exit.HLT
    assert msr(guest, index) == 0x06060606


@pytest.mark.parametrize("index", [0xC0000081, 0xC0000082, 0xC0000102, 0x174, 0x277])
def test_the_guest_sees_what_user_space_wrote(guest, index):
    guest.long(RDMSR, HLT, rcx=index, rax=r64(0), rdx=r64(1))
    set_msr(guest, index, 0x06060106)
    assert guest.run() == Exit.HLT
    assert (guest.regs("rdx"), guest.regs("rax")) == (0, 0x06060106)


def r64(number):
    """Something in the upper halves, which RDMSR clears."""
    return 0xDEAD0000_00000000 + number


def test_row_95_an_unknown_msr_is_a_protection_fault(guest):
    guest.long(RDMSR, HLT, rcx=0x1C9)
    guest.gate(13)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1
    assert guest.word(guest.regs("rsp") + 8) == CODE


def msr_exit(guest):
    """The page's msr part: (error, reason, index, data)."""
    return guest.page[32], guest.field(40), guest.field(44), guest.field(48, 8)


def test_row_109_user_space_answers_an_unknown_msr(guest):
    enable(guest, USER_SPACE_MSR, 7)
    guest.long(RDMSR, HLT, rcx=0x12345678)
    assert guest.run() == Exit.X86_RDMSR
    assert msr_exit(guest)[:3] == (0, 2, 0x12345678)
    guest.page[48:56] = (0x1122334455667788).to_bytes(8, "little")
    assert guest.run() == Exit.HLT
    assert (guest.regs("rdx"), guest.regs("rax")) == (0x11223344, 0x55667788)
    assert guest.regs("rip") == CODE + 3


def test_user_space_takes_a_write_to_an_unknown_msr(guest):
    enable(guest, USER_SPACE_MSR, 7)
    guest.long(WRMSR, HLT, rcx=0x12345678, rdx=0x11, rax=0x22)
    assert guest.run() == Exit.X86_WRMSR
    assert msr_exit(guest) == (0, 2, 0x12345678, 0x1100000022)
    assert guest.run() == Exit.HLT


def test_user_space_refuses_an_unknown_msr(guest):
    enable(guest, USER_SPACE_MSR, 7)
    guest.long(RDMSR, HLT, rcx=0x12345678)
    guest.gate(13)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.X86_RDMSR
    guest.page[32] = 1
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1
    assert guest.word(guest.regs("rsp") + 8) == CODE


def test_user_space_finishes_an_unknown_msr_without_entering(guest):
    enable(guest, USER_SPACE_MSR, 7)
    guest.long(RDMSR, HLT, rcx=0x12345678)
    assert guest.run() == Exit.X86_RDMSR
    guest.page[48:56] = bytes([5, *bytes(7)])
    assert guest.finish() == (-1, EINTR)
    assert (guest.regs("rax"), guest.regs("rip")) == (5, CODE + 2)


@pytest.mark.usefixtures("on_hardware")
@pytest.mark.parametrize("code", ["0f 01 c1", "0f 01 d9"])
def test_an_unknown_hypercall_says_so(guest, code):
    """VMCALL and VMMCALL alike: KVM patches the one its CPU does not have."""
    guest.long(code, HLT, rax=0x1234)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0xFFFFFFFFFFFFFC18  # -KVM_ENOSYS
    assert guest.regs("rip") == CODE + 4


def test_a_hypercall_of_ring_3_is_not_permitted(guest):
    guest.long("0f 01 d9", "0f 0b", ring=3, rax=1)
    guest.gate(6)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0xFFFFFFFFFFFFFFFF  # -KVM_EPERM


def test_row_85_a_split_lock_is_nothing_special_without_detection(guest):
    guest.long("f0 ff 07", HLT, rdi=DATA + 62)
    assert guest.run() == Exit.HLT
    assert guest.field(14, 2) == 0
    assert guest.word(DATA + 62, size_bytes=4) == 1


def test_row_117_translation_follows_the_guests_tables(guest):
    guest.long(HLT)
    guest.word(0x13000 + 0x20 * 8, 0x9007)
    translated = bytearray(24)
    translated[:8] = (0x20123).to_bytes(8, "little")
    assert guest.ioctl(ioctls.KVM_TRANSLATE, translated) == (0, 0)
    assert int.from_bytes(translated[8:16], "little") == 0x9123
    assert translated[16] == 1


@pytest.mark.usefixtures("on_hardware")
def test_floating_point_registers_come_back(guest):
    guest.long("f3 0f 6f 06", "d9 e8", HLT, rsi=DATA)  # movdqu xmm0, [rsi]; fld1
    guest.ram[DATA : DATA + 16] = b"0123456789abcdef"
    assert guest.run() == Exit.HLT
    state = bytearray(416)
    assert guest.ioctl(ioctls.KVM_GET_FPU, state) == (0, 0)
    assert bytes(state[152:168]) == b"0123456789abcdef"
    assert bytes(state[:10]) == bytes.fromhex("00 00 00 00 00 00 00 80 ff 3f")


def test_the_time_stamp_counter_counts(guest):
    guest.long("0f 31", "89 c3", "0f 31", HLT)  # rdtsc; mov ebx, eax; rdtsc
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") > guest.regs("rbx")
