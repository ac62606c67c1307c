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
