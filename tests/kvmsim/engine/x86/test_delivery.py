"""Exceptions and interrupts in every mode, as the guest's handlers see them."""

import pytest

from kvmsim.engine.base import Hlt, InternalError, Io, IrqWindow, Shutdown
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import Event

CODE, HANDLER, STACK = 0x1000, 0x2000, 0x6000
INNER, IST = STACK - 0x400, STACK - 0x800
HLT = "f4"


def frame(guest, count, size=8):
    top = guest.q[r.RSP]
    return [guest.word(top + n * size, size) for n in range(count)]


def test_real_mode_pushes_flags_and_address_and_returns(guest):
    guest.real("fb", "cd 21", "90", HLT)  # sti; int 0x21
    guest.set_word(0x21 * 4, HANDLER, 4)
    guest.put(HANDLER, "b8 34 12", "cf")  # mov ax, 0x1234; iret
    assert isinstance(guest.run(), Hlt)
    assert (guest.r.rip, guest.q[r.RAX] & 0xFFFF) == (CODE + 5, 0x1234)
    assert guest.r.flags & r.FLAG_IF
    assert guest.q[r.RSP] & 0xFFFF == STACK


def test_division_by_zero_in_real_mode_returns_to_the_division(guest):
    guest.real("31 c9", "f7 f1", HLT)  # xor cx, cx; div cx
    guest.set_word(0, HANDLER, 4)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 1, 2) == [CODE + 2]


@pytest.mark.parametrize(
    ("code", "vector", "at", "error"),
    [
        ("0f 0b", 6, 0, None),  # ud2
        ("31 c9 f7 f1", 0, 2, None),  # div ecx
        ("cc", 3, 1, None),  # int3
        ("f1", 1, 1, None),  # int1
        ("8e d8", 13, 0, 0x1230),  # mov ds, ax: beyond the GDT
        ("48 8b 04 25 00 00 30 00", 14, 0, 0),  # mov rax, [0x300000]: not present
        ("48 89 04 25 00 00 30 00", 14, 0, 2),  # a write
        ("0f 32", 13, 0, 0),  # rdmsr of nothing
        ("0f 01 c1", None, 3, None),  # vmcall: -KVM_ENOSYS
        ("0f 23 e8", None, 3, None),  # mov dr5, rax: DR7 without CR4.DE
    ],
)
def test_exceptions_in_long_mode_come_with_their_frame(guest, code, vector, at, error):
    guest.long(code, HLT)
    guest.q[r.RAX], guest.q[r.RCX] = 0x1230, 0x12345
    handler = HANDLER
    for number in (0, 1, 3, 6, 13, 14):
        guest.gate(number, handler, dpl=3)
    guest.put(handler, HLT)
    assert isinstance(guest.run(), Hlt)
    if vector is None:
        assert guest.r.rip == CODE + at + 1
        return
    assert guest.r.rip == handler + 1
    words = frame(guest, 6)
    if error is not None:
        assert words.pop(0) == error
    assert words[:2] == [CODE + at, 0x08]
    assert words[3:5] == [STACK, 0x10]


def test_the_second_exception_is_as_good_as_the_first(guest):
    guest.long("0f 0b" * 5, HLT).gate(6, HANDLER)
    guest.put(HANDLER, "48 83 04 24 02", "ff c3", "48 cf")  # add [rsp], 2; inc ebx; iretq
    guest.q[r.RBX] = 0
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 5


def test_ring_3_goes_to_the_stack_of_ring_0_and_back(guest):
    guest.long("cd 80", "90", "f4", ring=3).gate(0x80, HANDLER, dpl=3).gate(13, 0x2100)
    guest.put(HANDLER, "48 89 e3", "48 cf")  # mov rbx, rsp; iretq
    guest.put(0x2100, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == INNER - 40
    # HLT in ring 3 is #GP.
    assert frame(guest, 6)[:3] == [0, CODE + 3, 0x1B]
    assert guest.r.cpl == 0


def test_ring_3_may_not_use_a_gate_of_ring_0(guest):
    guest.long("cd 80", ring=3).gate(0x80, HANDLER).gate(13, 0x2100)
    guest.put(0x2100, HLT)
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 2) == [0x80 * 8 + 2, CODE]


def test_an_interrupt_stack_is_used_without_a_change_of_ring(guest):
    guest.long("0f 0b").gate(6, HANDLER, ist=1)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RSP] == IST - 40


def test_protected_mode_delivers_with_and_without_error_code(guest):
    guest.protected("0f 0b", HLT).gate(6, HANDLER).gate(13, 0x2100)
    guest.put(HANDLER, "83 04 24 02", "b8 77 77 00 00", "8e d8", HLT)  # add [esp],2; mov ds, ax
    guest.put(0x2100, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2101
    assert frame(guest, 3, 4) == [0x7774, HANDLER + 9, 0x08]


def test_protected_mode_changes_rings_both_ways(guest):
    guest.protected("cd 80", "cd 81", ring=3).gate(0x80, HANDLER, dpl=3).gate(0x81, 0x2100, dpl=3)
    guest.put(HANDLER, "89 e3", "cf")  # mov ebx, esp; iretd
    guest.put(0x2100, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == INNER - 20
    assert frame(guest, 5, 4)[3:] == [STACK, 0x23]
    assert guest.r.segment(r.SS).selector == 0x10


def test_a_fault_without_a_handler_is_a_double_fault(guest):
    guest.long("0f 0b").gate(8, HANDLER)
    guest.put(HANDLER, HLT)
    guest.put(CODE, "8e d8")  # #GP, and no gate for it
    guest.q[r.RAX] = 0x1230
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 2) == [0, CODE]


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_without_a_double_fault_handler_the_guest_shuts_down(guest, mode):
    getattr(guest, mode)("0f 0b")
    assert isinstance(guest.run(), Shutdown)


def test_real_mode_without_a_vector_table_shuts_down(guest):
    guest.real("cc")
    guest.r.set_segment(r.IDTR, r.Segment(0, 0, 0))
    assert isinstance(guest.run(), Shutdown)


def test_a_page_fault_on_the_stack_of_a_page_fault_is_a_double_fault(guest):
    guest.long("50", ring=0).gate(14, HANDLER).gate(8, HANDLER, ist=1)
    guest.put(HANDLER, HLT)
    guest.q[r.RSP] = 0x300000
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RSP] == IST - 48
    assert guest.r.cr2 == 0x300000 - 48


def test_an_external_interrupt_comes_when_the_guest_is_entered(guest):
    guest.long("fb", HLT, HLT).gate(0x30, HANDLER)
    guest.put(HANDLER, "ff c3", "48 cf")
    guest.q[r.RBX] = 0
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.interruptible
    guest.cpu.interrupt = 0x30
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RBX], guest.r.rip) == (1, CODE + 3)


def test_an_interrupt_waits_for_the_guest_to_allow_it(guest):
    guest.long("90", "90", "fb", "ff c2", "f4").gate(0x30, HANDLER)
    guest.put(HANDLER, "89 d3", "48 cf")  # mov ebx, edx; iretq
    guest.q[r.RDX] = 7
    guest.cpu.interrupt = 0x30
    assert isinstance(guest.run(), Hlt)
    # One instruction behind STI is executed first.
    assert (guest.q[r.RBX], guest.q[r.RDX]) == (8, 8)


def test_an_nmi_does_not_wait(guest):
    guest.long("90", HLT).gate(2, HANDLER)
    guest.put(HANDLER, "ff c3", "48 cf")
    guest.q[r.RBX] = 0
    guest.cpu.queue(Event(2, external=True))
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 1


def test_the_interrupt_window_opens_behind_the_shadow_of_sti(guest):
    guest.long("90", "fb", "90", "90", HLT)
    guest.cpu.wants_window = True
    assert isinstance(guest.run(), IrqWindow)
    assert guest.r.rip == CODE + 3
    assert guest.cpu.interruptible
    assert isinstance(guest.run(), Hlt)


def test_the_window_opens_by_popf(guest):
    guest.long("68 02 02 00 00", "9d", "90", HLT)  # push 0x202; popfq
    guest.cpu.wants_window = True
    assert isinstance(guest.run(), IrqWindow)
    assert guest.r.rip == CODE + 6


def test_the_guest_steps_itself(guest):
    guest.long("9c", "80 4c 24 01 01", "9d", "90", "90", HLT)  # pushf; or [rsp+1], 1; popf: TF
    guest.gate(1, HANDLER)
    guest.put(
        HANDLER,
        "ff c3",  # inc ebx
        "83 fb 02",  # cmp ebx, 2
        "75 08",  # jne out
        "80 64 24 11 fe",  # and byte [rsp+17], 0xfe: clear TF
        "90 90 90",
        "48 cf",
    )
    guest.q[r.RBX] = 0
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 2
    assert guest.r.debug(6) & 1 << 14


def test_a_guest_in_ring_3_needs_the_port_bitmap(guest):
    guest.long("e6 80", ring=3).gate(13, HANDLER)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 2) == [0, CODE]


def test_the_port_bitmap_lets_ring_3_through(guest):
    guest.long("e6 80", ring=3)
    guest.r.set_segment(r.TR, r.Segment(0x28, 0x5000, 0x200, r.RIGHTS_P | 0xB << 8))
    guest.set_word(0x5000 + 102, 104, 2)
    assert isinstance(guest.run(), Io)


def test_syscall_and_sysret(guest):
    guest.long("0f 05", "90", "0f 0b", ring=3).gate(6, 0x2100)
    guest.put(HANDLER, "48 89 cb", "48 0f 07")  # mov rbx, rcx; sysretq
    guest.put(0x2100, HLT)
    guest.r.set_msr(0xC0000081, 0x08 << 32 | 0x13 << 48)
    guest.r.set_msr(0xC0000082, HANDLER)
    guest.r.set_msr(0xC0000084, 0x200)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == CODE + 2
    assert frame(guest, 2) == [CODE + 3, 0x23]


def virtual_8086(guest, *code):
    """A task in virtual-8086 mode at 0100:0000, stack 0200:0100, all port rights."""
    guest.protected()
    guest.put(CODE, *code)
    for number, selector in ((r.CS, 0x100), (r.SS, 0x200), (r.DS, 0x300), (r.ES, 0x400)):
        rights = r.RIGHTS_P | 3 << 13 | r.RIGHTS_S | 3 << 8
        guest.r.set_segment(number, r.Segment(selector, selector << 4, 0xFFFF, rights))
    guest.r.flags = r.FLAG_VM | 3 << r.FLAG_IOPL_SHIFT | r.FLAG_IF | 2
    guest.r.rip, guest.q[r.RSP] = 0, 0x100
    return guest


def test_virtual_8086_mode_goes_to_ring_0_with_all_its_segments(guest):
    virtual_8086(guest, "cd 80", "0f 0b").gate(0x80, HANDLER, dpl=3)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    eip, cs, flags, esp, ss, es, ds, _fs, _gs = frame(guest, 9, 4)
    assert (eip, cs, esp, ss, es, ds) == (2, 0x100, 0x100, 0x200, 0x400, 0x300)
    assert flags & r.FLAG_VM
    assert not guest.r.flags & (r.FLAG_VM | r.FLAG_IF)
    assert (guest.r.cpl, guest.r.segment(r.DS).selector) == (0, 0)


def test_virtual_8086_mode_is_entered_again_by_iret(guest):
    virtual_8086(guest, "cd 80", "b4 07", "cd 81").gate(0x80, HANDLER, dpl=3)
    guest.gate(0x81, 0x2100, dpl=3)
    guest.put(HANDLER, "cf")
    guest.put(0x2100, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 0x700
    assert frame(guest, 2, 4) == [6, 0x100]


def test_virtual_8086_mode_may_not_enter_ring_3(guest):
    virtual_8086(guest, "cd 80").gate(13, HANDLER)
    guest.set_word(0x4000 + 0x80 * 8, HANDLER & 0xFFFF | 0x18 << 16 | 0xEE00 << 32)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 2, 4) == [0x18, 0]


def test_a_16_bit_gate_pushes_words(guest):
    guest.protected("0f 0b").gate(6, HANDLER, kind=6)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RSP] == STACK - 6
    assert frame(guest, 2, 2) == [CODE, 0x08]


def test_a_trap_gate_leaves_interrupts_on(guest):
    guest.long("fb", "90", "0f 0b").gate(6, HANDLER, kind=0xF)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.flags & r.FLAG_IF


def test_a_gate_that_is_not_present_is_a_fault_of_its_own(guest):
    guest.long("cd 80").gate(11, HANDLER)
    guest.set_word(0x4000 + 0x80 * 16, 0x08 << 16 | 0x0E00 << 32)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 2) == [0x80 * 8 + 2, CODE]


def test_an_inner_stack_that_is_not_writable_is_an_invalid_task(guest):
    guest.protected("cd 80", ring=3).gate(0x80, HANDLER, dpl=3).gate(10, HANDLER)
    guest.set_word(0x5004, INNER | 0x08 << 32)  # SS0 is a code segment
    guest.put(HANDLER, HLT)
    # #TS needs the same stack: #DF, and the end.
    assert isinstance(guest.run(), Shutdown)


def test_sysenter_and_sysexit(guest):
    guest.long("0f 34", "0f 0b", ring=3).gate(6, 0x2100)
    guest.put(HANDLER, "48 0f 35")  # sysexit: RIP from RDX, RSP from RCX
    guest.put(0x2100, HLT)
    for index, value in ((0x174, 0x08), (0x175, INNER), (0x176, HANDLER)):
        guest.r.set_msr(index, value)
    guest.q[r.RDX], guest.q[r.RCX] = CODE + 2, 0x5F00
    assert isinstance(guest.run(), Hlt)
    assert frame(guest, 4) == [CODE + 2, 0x2B, guest.word(guest.q[r.RSP] + 16, 8), 0x5F00]


@pytest.mark.parametrize("where", ["stack", "table"])
def test_an_event_that_goes_where_no_memory_is_is_an_internal_error(guest, where):
    guest.long("0f 0b").gate(6, HANDLER)
    guest.map_page(0x180000, 0xFED00000)
    if where == "stack":
        guest.q[r.RSP] = 0x180800
    else:
        guest.r.set_segment(r.IDTR, r.Segment(0, 0x180000, 0xFFF))
    stop = guest.run()
    assert isinstance(stop, InternalError)
    assert (stop.suberror, guest.r.rip) == (3, CODE)


@pytest.mark.parametrize(
    ("code", "returns_to"),
    [
        (("fb", "90", "eb fe"), CODE + 2),  # sti; nop; jmp to itself
        (("fb", "e6 80", "eb fe"), CODE + 3),  # sti; out 0x80, al
        (("fb", "fb", "90", "eb fe"), CODE + 2),  # only the first STI holds it off
    ],
)
def test_an_interrupt_is_taken_one_instruction_behind_sti(guest, code, returns_to):
    guest.long(*code).gate(0x30, HANDLER)
    guest.put(HANDLER, HLT)
    guest.cpu.interrupt = 0x30
    stop = guest.run()
    while isinstance(stop, Io):
        guest.cpu.complete()
        stop = guest.run()
    assert isinstance(stop, Hlt)
    assert guest.word(guest.q[r.RSP], 8) == returns_to
