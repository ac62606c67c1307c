"""Registers set from outside, as the guest finds them."""

from kvmsim.engine.base import Hlt
from kvmsim.engine.x86 import registers as r

HLT = "f4"
STATUS_AND_DF = 0xCD5


def test_status_flags_and_direction_set_from_outside_reach_the_guest(guest):
    guest.long("9c 58", HLT)  # pushf; pop rax
    guest.r.flags = STATUS_AND_DF | 2
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == STATUS_AND_DF | 2
    assert guest.r.flags == STATUS_AND_DF | 2


def test_flags_cleared_from_outside_are_clear(guest):
    guest.long("fd f9", HLT, "9c 58", HLT)  # std; stc; hlt; pushf; pop rax
    assert isinstance(guest.run(), Hlt)
    assert guest.r.flags == 0x403
    guest.r.flags = 2
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 2


def test_an_instruction_the_engine_executes_ends_the_resume_flag(guest):
    guest.long("0f a2", HLT)  # cpuid
    guest.r.flags = 2 | r.FLAG_RF
    assert isinstance(guest.run(), Hlt)
    assert not guest.r.flags & r.FLAG_RF


def test_io_privilege_the_guest_gives_up_is_gone(guest):
    # push 2; popf; then iretq to ring 3, which does cli
    guest.long("6a 02 9d", "6a 23 68 00 60 00 00 6a 02 6a 1b 68 00 21 00 00 48 cf")
    guest.put(0x2100, "fa", "cd 80")
    guest.gate(13, 0x2000).gate(0x80, 0x2200, dpl=3)
    guest.put(0x2000, HLT)
    guest.put(0x2200, HLT)
    guest.r.flags = 0x3002
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2001
