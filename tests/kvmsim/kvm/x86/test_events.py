"""Exceptions, NMIs and shadows on their way into guests that execute code."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.regs import KVM_VCPU_EVENTS

pytest.importorskip("unicorn")

INTEL, AMD = 'vendor = "intel"\n', 'vendor = "amd"\n'
HLT = "f4"


def events(guest):
    data = bytearray(64)
    guest.vcpu.ioctl(ioctls.KVM_GET_VCPU_EVENTS, data)
    return data


def event(guest, name):
    return KVM_VCPU_EVENTS.get(events(guest), name)


def set_events(guest, **values):
    data = events(guest)
    for name, value in values.items():
        KVM_VCPU_EVENTS.put(data, name.replace("__", "."), value)
    guest.vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, data)


@pytest.mark.parametrize(
    ("preset", "code", "shadow"),
    [
        (INTEL, "fb", 2),  # sti
        (INTEL, "8e d0", 1),  # mov ss, eax
        (AMD, "fb", 3),
    ],
)
def test_shadow_of_an_instruction_is_shown_at_the_exit_behind_it(start, preset, code, shadow):
    guest = start(preset, "b8 10 00 00 00", code, "e6 80", HLT)
    assert guest.run() == Exit.IO
    assert event(guest, "interrupt.shadow") == shadow
    assert not guest.vcpu.run.ready_for_interrupt_injection
    assert guest.run() == Exit.HLT
    assert event(guest, "interrupt.shadow") == 0


def test_shadow_user_space_sets_holds_an_interrupt_for_one_instruction(start):
    guest = start(INTEL, "90", "90", HLT).gate(0x30, "58", "50", HLT)  # pop rax; push rax
    guest.set_regs(rflags=0x202)
    guest.vcpu.ioctl(ioctls.KVM_INTERRUPT, bytearray((0x30).to_bytes(4, "little")))
    set_events(guest, interrupt__shadow=1)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x1001


def test_exception_user_space_injects_reaches_its_handler_with_its_code(start):
    guest = start(INTEL, HLT).gate(13, "58", HLT)  # pop rax
    set_events(
        guest,
        exception__injected=1,
        exception__nr=13,
        exception__has_error_code=1,
        exception__error_code=0x18,
    )
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x18
    assert event(guest, "exception.injected") == 0


def test_interrupt_waits_where_user_space_sees_it(start):
    guest = start(INTEL, "e6 80", "fb", "90", HLT).gate(0x30, "b3 07", HLT)
    guest.vcpu.ioctl(ioctls.KVM_INTERRUPT, bytearray((0x30).to_bytes(4, "little")))
    assert guest.run() == Exit.IO
    assert (event(guest, "interrupt.injected"), event(guest, "interrupt.nr")) == (1, 0x30)
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") & 0xFF == 7
    assert event(guest, "interrupt.injected") == 0


def test_nmi_is_not_interrupted_by_another_before_its_end(start):
    # The handler counts, goes out, and returns.
    guest = start(INTEL, "90", HLT).gate(2, "ff c3", "e6 80", "48 cf")
    guest.vcpu.ioctl(ioctls.KVM_NMI)
    assert guest.run() == Exit.IO
    assert event(guest, "nmi.masked") == 1
    guest.vcpu.ioctl(ioctls.KVM_NMI)
    assert (event(guest, "nmi.pending"), guest.regs("rbx")) == (1, 1)
    assert guest.run() == Exit.IO
    assert (event(guest, "nmi.pending"), guest.regs("rbx")) == (0, 2)
    assert guest.run() == Exit.HLT
    assert event(guest, "nmi.masked") == 0


def test_nmi_user_space_masks_waits_for_the_end_of_a_handler(start):
    guest = start(INTEL, "90", HLT).gate(2, "ff c3", "48 cf")
    set_events(guest, nmi__masked=1, nmi__pending=1)
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") == 0
    assert event(guest, "nmi.pending") == 1


def test_flags_of_the_page_are_those_of_the_guest(start):
    guest = start(INTEL, "fb", "90", "e6 80", "fa", "e6 80", HLT)
    assert guest.run() == Exit.IO
    page = guest.vcpu.run
    assert (page.if_flag, page.ready_for_interrupt_injection) == (1, 1)
    assert guest.run() == Exit.IO
    assert (page.if_flag, page.ready_for_interrupt_injection) == (0, 0)
