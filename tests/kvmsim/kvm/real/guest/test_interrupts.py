"""Interrupts that user space gives, windows, and the task priority (kvm.md G row 83)."""

from errno import EINTR

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit

CODE, HANDLER, STACK = 0x1000, 0x2000, 0x6000
HLT, NOP = "f4", "90"
VECTOR = 0x30
READY, IF_FLAG, CR8 = 12, 13, 16


def interrupt(guest, vector=VECTOR):
    assert guest.ioctl(ioctls.KVM_INTERRUPT, bytearray(vector.to_bytes(4, "little"))) == (0, 0)


@pytest.fixture
def handled(guest):
    """A guest in 64-bit mode that counts its interrupts in RBX."""
    guest.gate(VECTOR)
    guest.put(HANDLER, "ff c3", "48 cf")  # inc ebx; iretq
    return guest


def test_an_interrupt_wakes_the_guest_behind_its_hlt(handled):
    handled.long("fb", HLT, NOP, HLT)
    assert handled.run() == Exit.HLT
    assert (handled.page[READY], handled.page[IF_FLAG]) == (1, 1)
    interrupt(handled)
    assert handled.run() == Exit.HLT
    assert (handled.regs("rbx"), handled.regs("rip")) == (1, CODE + 4)
    assert handled.regs("rsp") == STACK


def test_a_second_interrupt_while_the_first_waits_is_not_taken_yet(handled):
    handled.long("fb", HLT, HLT)
    assert handled.run() == Exit.HLT
    interrupt(handled)
    assert handled.finish() == (-1, EINTR)
    assert handled.page[READY] == 0


def test_row_83_the_window_opens_when_interrupts_are_allowed(guest):
    guest.real("eb fe", rflags=0x202)
    guest.page[0] = 1
    assert guest.run() == Exit.IRQ_WINDOW_OPEN
    assert (guest.page[READY], guest.page[IF_FLAG]) == (1, 1)


@pytest.mark.usefixtures("on_hardware")
def test_the_window_opens_one_instruction_behind_sti(handled):
    handled.long(NOP, "fb", NOP, NOP, HLT)
    handled.page[0] = 1
    assert handled.run() == Exit.IRQ_WINDOW_OPEN
    assert handled.regs("rip") == CODE + 3


@pytest.mark.usefixtures("on_hardware")
def test_a_window_that_is_open_already_is_an_exit_at_once(handled):
    handled.long(NOP, HLT, rflags=0x202)
    handled.page[0] = 1
    assert handled.run() == Exit.IRQ_WINDOW_OPEN
    assert handled.regs("rip") == CODE


def test_no_window_no_exit(handled):
    handled.long(NOP, HLT)
    handled.page[0] = 1
    assert handled.run() == Exit.HLT
    assert (handled.page[READY], handled.page[IF_FLAG]) == (0, 0)


@pytest.mark.usefixtures("on_hardware")
def test_the_interrupted_code_goes_on_where_it_was(handled):
    handled.long("ff c0", "ff c0", HLT, rflags=0x202)
    handled.page[0] = 1
    assert handled.run() == Exit.IRQ_WINDOW_OPEN
    handled.page[0] = 0
    interrupt(handled)
    assert handled.run() == Exit.HLT
    assert (handled.regs("rax"), handled.regs("rbx")) == (2, 1)


def test_interrupts_are_off_in_the_handler(handled):
    handled.put(HANDLER, HLT)
    handled.long("fb", HLT)
    assert handled.run() == Exit.HLT
    interrupt(handled)
    assert handled.run() == Exit.HLT
    assert handled.regs("rip") == HANDLER + 1
    assert handled.page[IF_FLAG] == 0
    frame = [handled.word(handled.regs("rsp") + number * 8) for number in range(3)]
    assert frame[:2] == [CODE + 2, 8]
    assert frame[2] & 0x200 == 0x200


def test_an_interrupt_takes_ring_3_to_ring_0(handled):
    handled.put(HANDLER, HLT)
    handled.long("eb fe", ring=3, rflags=0x202)
    handled.page[0] = 1
    assert handled.run() == Exit.IRQ_WINDOW_OPEN
    handled.page[0] = 0
    interrupt(handled)
    assert handled.run() == Exit.HLT
    assert handled.sregs("ss.dpl") == 0
    frame = [handled.word(handled.regs("rsp") + number * 8) for number in range(5)]
    assert (frame[0], frame[1], frame[3], frame[4]) == (CODE, 0x1B, 0x7000, 0x23)


def test_real_mode_interrupts_go_through_the_vector_table(guest):
    guest.real("fb", HLT, NOP, HLT)
    guest.word(VECTOR * 4, HANDLER, 4)
    guest.put(HANDLER, "43", "cf")  # inc bx; iret
    assert guest.run() == Exit.HLT
    interrupt(guest)
    assert guest.run() == Exit.HLT
    assert (guest.regs("rbx") & 0xFFFF, guest.regs("rip")) == (1, CODE + 4)


def test_an_nmi_does_not_need_the_flag(guest):
    guest.long(HLT, HLT)
    guest.gate(2)
    guest.put(HANDLER, "ff c3", "48 cf")
    assert guest.run() == Exit.HLT
    assert guest.ioctl(ioctls.KVM_NMI) == (0, 0)
    assert guest.run() == Exit.HLT
    assert (guest.regs("rbx"), guest.regs("rip")) == (1, CODE + 2)


def test_the_guest_sees_the_priority_of_the_page(guest):
    guest.long("44 0f 20 c0", HLT)  # mov rax, cr8
    guest.page[CR8] = 5
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 5


def test_a_priority_the_guest_raises_is_shown(guest):
    guest.long("44 0f 22 c0", HLT, rax=9)  # mov cr8, rax
    assert guest.run() == Exit.HLT
    assert (guest.field(CR8, 8), guest.sregs("cr8")) == (9, 9)


@pytest.mark.usefixtures("on_hardware")
def test_a_priority_the_guest_lowers_is_an_exit(guest):
    """User space has the APIC: it must see that something may be deliverable."""
    guest.long("44 0f 22 c0", HLT, rax=2)
    guest.page[CR8] = 9
    assert guest.run() == Exit.SET_TPR
    assert guest.field(CR8, 8) == 2
    assert guest.run() == Exit.HLT


def test_a_priority_beyond_15_is_refused(guest):
    guest.long("44 0f 22 c0", HLT, rax=16)
    guest.gate(13)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1
