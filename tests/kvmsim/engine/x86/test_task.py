"""Task gates: events that switch tasks, and the way back."""

import pytest

from kvmsim.engine.base import Hlt, InternalError, Shutdown
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import Event

CODE, HANDLER, GDT, IDT, TSS, OTHER, STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x5800, 0x6000
TASK_SELECTOR = 0x30
HLT = "f4"


@pytest.fixture
def tasks(guest):
    """A 32-bit guest whose #UD, #NP, vector 0x40 and #DF are gates to another task."""
    guest.protected("0f 0b", HLT)
    guest.set_word(GDT + 0x28, 0x67 | TSS << 16 | 0x8B << 40)
    guest.set_word(GDT + TASK_SELECTOR, 0x67 | OTHER << 16 | 0x89 << 40)
    words = {32: HANDLER, 36: 2, 40: 0x111, 44: 0x222, 56: STACK - 0x1000, 28: 0xABC000}
    for offset, value in words.items():
        guest.set_word(OTHER + offset, value, 4)
    for number, selector in enumerate((0x10, 0x08, 0x10, 0x10, 0, 0)):
        guest.set_word(OTHER + 72 + 4 * number, selector, 4)
    for vector in (6, 8, 11, 0x40):
        guest.set_word(IDT + 8 * vector, TASK_SELECTOR << 16 | 0x85 << 40)
    guest.put(HANDLER, HLT)
    return guest


def test_an_exception_through_a_task_gate_enters_the_other_task(tasks):
    tasks.q[r.RBX] = 0x5555
    assert isinstance(tasks.run(), Hlt)
    assert (tasks.r.rip, tasks.q[r.RAX], tasks.q[r.RCX]) == (HANDLER + 1, 0x111, 0x222)
    assert tasks.q[r.RSP] == STACK - 0x1000
    assert tasks.r.segment(r.TR).selector == TASK_SELECTOR
    assert tasks.r.flags & r.FLAG_NT
    assert tasks.r.cr0 & 8


def test_the_task_that_was_left_is_saved_and_linked(tasks):
    tasks.q[r.RBX], tasks.q[r.RSP] = 0x5555, STACK
    assert isinstance(tasks.run(), Hlt)
    saved = {offset: tasks.word(TSS + offset) for offset in (32, 52, 56, 76)}
    assert saved == {32: CODE, 52: 0x5555, 56: STACK, 76: 0x08}
    assert tasks.word(OTHER, 2) == 0x28
    assert tasks.word(GDT + TASK_SELECTOR + 5, 1) == 0x8B
    assert tasks.word(GDT + 0x28 + 5, 1) == 0x8B


def test_iret_goes_back_to_the_task_that_was_interrupted(tasks):
    tasks.put(HANDLER, "83 05 20 50 00 00 02", "cf")  # add dword [TSS + 32], 2; iret
    tasks.q[r.RBX] = 0x5555
    assert isinstance(tasks.run(), Hlt)
    assert (tasks.r.rip, tasks.q[r.RBX]) == (CODE + 3, 0x5555)
    assert tasks.r.segment(r.TR).selector == 0x28
    assert not tasks.r.flags & r.FLAG_NT
    assert tasks.word(GDT + TASK_SELECTOR + 5, 1) == 0x89


def test_an_error_code_is_on_the_stack_of_the_new_task(tasks):
    tasks.protected("8e d8", HLT)  # mov ds, ax: a segment that is not present
    tasks.set_word(GDT + 0x28, 0x67 | TSS << 16 | 0x8B << 40)
    tasks.set_word(GDT + 0x38, 0xFFFF | 0x13 << 40)
    tasks.q[r.RAX] = 0x38
    assert isinstance(tasks.run(), Hlt)
    assert tasks.word(STACK - 0x1004) == 0x38
    assert tasks.q[r.RSP] == STACK - 0x1004


def test_an_interrupt_through_a_task_gate_returns_behind_the_instruction(tasks):
    tasks.protected("90", HLT)
    tasks.set_word(GDT + 0x28, 0x67 | TSS << 16 | 0x8B << 40)
    tasks.cpu.queue(Event(0x40, external=True))
    assert isinstance(tasks.run(), Hlt)
    assert tasks.r.rip == HANDLER + 1
    assert tasks.word(TSS + 32) == CODE


def test_a_double_fault_by_a_task_saves_a_guest_without_a_stack(tasks):
    tasks.r.set_segment(r.SS, r.Segment(0x10, 0, 0xFFF, 0x409300))
    tasks.protected("0f 0b")
    tasks.set_word(GDT + 0x28, 0x67 | TSS << 16 | 0x8B << 40)
    tasks.gate(6, HANDLER).gate(12, HANDLER)
    tasks.r.set_segment(r.SS, r.Segment(0x10, 0, 0xFFF, 0x409300))
    assert isinstance(tasks.run(), Hlt)
    assert tasks.q[r.RSP] == STACK - 0x1004  # an error code of 0
    assert tasks.word(TSS + 32) == CODE


@pytest.mark.parametrize(
    ("high", "stop"), [(0x8B << 40, Shutdown), (0x09 << 40, Shutdown), (0x81 << 40, InternalError)]
)
def test_a_task_that_cannot_be_entered_ends_the_guest(tasks, high, stop):
    tasks.set_word(GDT + TASK_SELECTOR, 0x67 | OTHER << 16 | high)
    assert isinstance(tasks.run(), stop)


def test_a_task_has_page_tables_of_its_own(tasks):
    # Both directories map the first 4 MiB one to one, but for 0x9000: 0xA000 or 0xB000.
    for directory, table, page in ((0x10000, 0x11000, 0xA000), (0x12000, 0x13000, 0xB000)):
        tasks.set_word(directory, table | 7, 4)
        for number in range(64):
            tasks.set_word(table + 4 * number, number << 12 | 7, 4)
        tasks.set_word(table + 4 * 9, page | 7, 4)
    tasks.set_word(0xA000, 0xAAAA, 4)
    tasks.set_word(0xB000, 0xBBBB, 4)
    tasks.put(CODE, "8b 1d 00 90 00 00", "0f 0b")  # mov ebx, [0x9000]
    tasks.put(HANDLER, "8b 0d 00 90 00 00", HLT)  # mov ecx, [0x9000]
    tasks.set_word(OTHER + 28, 0x12000, 4)
    tasks.r.cr3 = 0x10000
    tasks.r.cr0 |= 1 << 31
    tasks.cpu.changed()
    assert isinstance(tasks.run(), Hlt)
    assert (tasks.word(TSS + 52), tasks.q[r.RCX]) == (0xAAAA, 0xBBBB)


def test_a_far_jump_to_a_task_is_the_emulators_and_works(tasks):
    tasks.protected("ea 00 00 00 00 30 00")
    tasks.set_word(GDT + 0x28, 0x67 | TSS << 16 | 0x8B << 40)
    assert isinstance(tasks.run(), Hlt)
    assert (tasks.r.rip, tasks.q[r.RAX]) == (HANDLER + 1, 0x111)
    assert tasks.word(TSS + 32) == CODE + 7
