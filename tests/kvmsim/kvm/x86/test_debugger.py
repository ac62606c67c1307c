"""KVM_SET_GUEST_DEBUG on guests of real code: who gets a #DB, and what the guest notices."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import (
    KVM_DEBUGREGS,
    KVM_GUEST_DEBUG,
    KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
)
from kvmsim.kvm import debug, events

pytest.importorskip("unicorn")

INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
AMD = 'vendor = "amd"\n'
CODE, DATA, HANDLER = 0x1000, 0x8000, 0x2000
HLT, NOP, COUNT, IRET = "f4", "90", "ff c3", "48 cf"
BS = 1 << 14
ACTIVE_LOW = 0xFFFF0FF0
WRITE_4 = 0xD0000  # DR7: breakpoint 0 on writes of 4 bytes


@pytest.fixture(params=[INTEL, AMD], ids=["intel", "amd"])
def guest(request, start):
    def begin(*code, **options):
        return start(request.param, *code, exits=False, **options)

    return begin


def watch(guest, control, *addresses, dr7=0x400):
    data = bytearray(KVM_GUEST_DEBUG.size_bytes)
    KVM_GUEST_DEBUG.put(data, "control", control)
    for number, address in enumerate(addresses):
        KVM_GUEST_DEBUG.put(data, "arch", address, number)
    KVM_GUEST_DEBUG.put(data, "arch", dr7, 7)
    assert guest.vcpu.ioctl(ioctls.KVM_SET_GUEST_DEBUG, data) == 0


def shown(guest):
    """Exception, address, DR6 and DR7 of a debug exit."""
    page = guest.vcpu.run.memory
    words = (page[32:36], page[40:48], page[48:56], page[56:64])
    return tuple(int.from_bytes(word, "little") for word in words)


def registers(guest):
    data = bytearray(KVM_DEBUGREGS.size_bytes)
    assert guest.vcpu.ioctl(ioctls.KVM_GET_DEBUGREGS, data) == 0
    return KVM_DEBUGREGS.get(data, "dr6"), KVM_DEBUGREGS.get(data, "dr7")


def test_a_data_breakpoint_shows_the_debuggers_registers_and_leaves_the_guests(guest):
    one = guest("89 07", NOP, HLT)
    one.set_regs(rdi=DATA)
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, DATA, dr7=0x402 | WRITE_4)
    assert one.run() == Exit.DEBUG
    assert shown(one) == (1, CODE + 2, ACTIVE_LOW | 1, 0x402 | WRITE_4)
    assert registers(one) == (ACTIVE_LOW, 0x400)


def test_a_debugger_that_goes_while_a_port_waits_leaves_no_exception_behind(guest):
    one = guest("e6 80", NOP, HLT).gate(1, COUNT, IRET)
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    assert one.run() == Exit.IO
    watch(one, 0)
    assert one.run() == Exit.HLT
    assert one.regs("rbx") == 0


def test_a_debugger_that_comes_while_a_port_waits_sees_it_done(guest):
    one = guest("e6 80", NOP, HLT)
    assert one.run() == Exit.IO
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    assert one.run() == Exit.DEBUG
    assert shown(one)[:3] == (1, CODE + 2, ACTIVE_LOW | BS)


def test_the_guests_own_step_is_the_debuggers_while_it_steps(guest):
    one = guest("9c 81 0c 24 00 01 00 00 9d", NOP, NOP, HLT).gate(1, COUNT, IRET)
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    for _ in range(4):
        assert one.run() == Exit.DEBUG
    assert one.regs("rbx") == 0
    watch(one, 0)
    assert one.run() == Exit.HLT
    assert one.regs("rbx") >= 1


def test_interrupts_wait_while_a_debugger_blocks_them(guest):
    one = guest("fb", NOP, NOP, HLT).gate(0x30, COUNT, IRET)
    events.of(one.vcpu).queue_interrupt(0x30)
    debug.of(one.vcpu).queued = True
    control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ
    watch(one, control)
    for length in (1, 2, 3):
        assert one.run() == Exit.DEBUG
        assert shown(one)[1] == CODE + length
    assert one.regs("rbx") == 0
    watch(one, 0)
    assert one.run() == Exit.HLT
    assert one.regs("rbx") == 1


def test_nmis_wait_while_a_debugger_blocks_interrupts(guest):
    one = guest(NOP, NOP, HLT).gate(2, COUNT, IRET)
    one.vcpu.ioctl(ioctls.KVM_NMI)
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ)
    assert one.run() == Exit.DEBUG
    assert (shown(one)[1], one.regs("rbx")) == (CODE + 1, 0)
    watch(one, 0)
    assert one.run() == Exit.HLT
    assert one.regs("rbx") == 1


def test_a_breakpoint_exception_the_debugger_injects_is_the_guests(guest):
    one = guest(NOP, HLT).gate(3, HLT)
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_BP)
    assert one.run() == Exit.HLT
    assert one.regs("rip") == HANDLER + 1


def test_the_guests_breakpoints_sleep_while_a_debugger_has_its_own(guest):
    one = guest(NOP, COUNT, HLT).gate(1, "49 ff c0", IRET)  # inc r8
    state = debug.of(one.vcpu)
    state.dr[0], state.dr7 = CODE + 1, 0x402
    watch(one, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, CODE + 3, dr7=0x402)
    assert one.run() == Exit.DEBUG
    assert (shown(one)[1], one.regs("r8")) == (CODE + 3, 0)
    watch(one, 0)
    one.set_regs(rip=CODE)
    assert one.run() == Exit.HLT
    assert one.regs("r8") == 1
