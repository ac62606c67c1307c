"""The bus lock #DB in guests of real code: once per lock above ring 0, and what DR6 says."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.regs import KVM_VCPU_EVENTS
from kvmsim.abi.structs import (
    KVM_DEBUGREGS,
    KVM_GUEST_DEBUG,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_SW_BP,
)
from kvmsim.kvm.vm import KvmEnableCap

pytest.importorskip("unicorn")

CODE, DATA, HANDLER, NOTES = 0x1000, 0x8000, 0x2000, 0x9000
HLT = "f4"
INC = "f0 ff 07"  # lock inc dword [rdi]
DB, BREAKPOINT = 1, 3
BUS_LOCK_DB = 1 << 2
INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
RTM = 'vendor = "intel"\nrtm = true\n[bus-lock]\nexit = "trap"\ndetect = true\n'
PLAIN = 'vendor = "intel"\n'
PLAIN_RTM = 'vendor = "intel"\nrtm = true\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\ndetect = true\n'
RE_ARM = "b8 f0 0f ff ff 0f 23 f0"  # mov eax, 0xffff0ff0; mov dr6, rax
COUNT = "49 ff c0 0f 21 f0 49 21 c1 49 09 c2"  # inc r8; mov rax, dr6; and r9, rax; or r10, rax
LOOP = (INC, "ff c9", "75 f9", "cd 80")  # lock inc; dec ecx; jnz; int 0x80
IRET = "48 cf"


@pytest.fixture
def ring_3(start):
    """A guest in ring 3 with the bus lock #DB on, whose INT 0x80 halts."""

    def begin(*code, preset=INTEL, exits=False, handler=(COUNT, RE_ARM, IRET)):
        guest = start(preset, *code, ring=3, exits=exits).offer_everything()
        guest.gate(DB, *handler).gate(0x80, HLT, at=HANDLER + 0x800, dpl=3)
        guest.set_regs(r9=(1 << 64) - 1)
        return guest.set_debugctl(BUS_LOCK_DB)

    return begin


def test_t_b_3_each_of_ten_thousand_locks_is_one_debug_exception(ring_3):
    guest = ring_3(*LOOP)
    guest.set_regs(rcx=10_000)
    assert guest.run() == Exit.HLT
    assert guest.vcpu.bus_locks == guest.regs("r8") == 10_000
    assert (guest.regs("r9"), guest.regs("r10")) == (0xFFFF07F0, 0xFFFF07F0)
    assert guest.debug.dr6 == 0xFFFF0FF0


def test_t_b_3_ring_0_gets_none(start):
    guest = start(INTEL, INC, INC, HLT, exits=False).offer_everything().gate(DB, COUNT, IRET)
    guest.set_debugctl(BUS_LOCK_DB)
    assert guest.run() == Exit.HLT
    assert (guest.vcpu.bus_locks, guest.regs("r8")) == (2, 0)


def test_locks_within_a_cache_line_are_none(ring_3):
    guest = ring_3(*LOOP)
    guest.set_regs(rcx=100, rdi=DATA)
    assert guest.run() == Exit.HLT
    assert guest.regs("r8") == 0


def test_it_is_a_trap_and_leaves_the_resume_flag_alone(ring_3):
    guest = ring_3(INC, "90", handler=(HLT,))
    assert guest.run() == Exit.HLT
    frame = guest.regs("rsp")
    assert guest.word_at(frame) == CODE + 3
    assert not guest.word_at(frame + 16) & 1 << 16
    assert guest.word_at(DATA + 62, 4) == 1


def test_a_handler_that_does_not_set_bit_11_again_finds_it_clear_the_next_time(ring_3):
    guest = ring_3("9c 81 0c 24 00 01 00 00", INC, "9d", "90", "cd 80", handler=(COUNT, IRET))
    assert guest.run() == Exit.HLT
    # The lock, then the step over the NOP behind POPF; INT 0x80 is not reported.
    assert guest.regs("r8") >= 2
    assert guest.debug.dr6 == 0xFFFF47F0


def test_t_b_1_lock_and_single_step_are_one_exception(ring_3):
    guest = ring_3(INC, "cd 80", handler=(COUNT, HLT))
    guest.set_regs(rflags=0x102)
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.debug.dr6) == (1, 0xFFFF47F0)
    assert guest.word_at(guest.regs("rsp")) == CODE + 3


def test_t_b_1_lock_and_data_breakpoint_are_one_exception(ring_3):
    guest = ring_3(INC, "cd 80", handler=(COUNT, HLT))
    guest.debug.dr[1] = DATA + 62
    guest.debug.dr7 = 0x400 | 1 << 3 | 0x5 << 20  # writes of two bytes
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.debug.dr6) == (1, 0xFFFF07F2)


# -- with the exit ----------------------------------------


def debugregs(guest):
    data = bytearray(KVM_DEBUGREGS.size_bytes)
    guest.vcpu.ioctl(ioctls.KVM_GET_DEBUGREGS, data)
    return KVM_DEBUGREGS.get(data, "dr6")


def events(guest):
    data = bytearray(KVM_VCPU_EVENTS.size_bytes)
    guest.vcpu.ioctl(ioctls.KVM_GET_VCPU_EVENTS, data)
    names = ("exception.nr", "exception.pending", "exception.injected")
    names += ("exception_has_payload", "exception_payload", "flags")
    return [KVM_VCPU_EVENTS.get(data, name) for name in names]


def payloads(guest):
    guest.vm.enable_cap(KvmEnableCap(164, (1, 0, 0, 0)))
    return guest


def test_t_b_5_the_exit_comes_first_and_then_the_exception(ring_3):
    guest = ring_3(*LOOP, exits=True)
    guest.set_regs(rcx=3)
    seen = []
    while guest.run() == Exit.X86_BUS_LOCK:
        seen.append((guest.regs("rip"), guest.debug.dr6, guest.regs("r8")))
    assert seen == [(CODE + 3, 0xFFFF0FF0, done) for done in range(3)]
    assert guest.regs("r8") == 3


def test_t_b_5_lock_and_single_step_wait_together_behind_the_exit(ring_3):
    guest = ring_3(INC, "cd 80", exits=True, handler=(COUNT, HLT))
    guest.set_regs(rflags=0x102)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert guest.debug.dr6 == 0xFFFF0FF0
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.debug.dr6) == (1, 0xFFFF47F0)


def test_the_pending_exception_is_shown_with_its_payload(ring_3):
    guest = payloads(ring_3(*LOOP, exits=True))
    guest.set_regs(rcx=1)
    assert guest.run() == Exit.X86_BUS_LOCK
    number, pending, _, has_payload, payload, flags = events(guest)
    assert (number, pending, has_payload, payload, flags & 0x10) == (DB, 1, 1, 0x800, 0x10)
    assert debugregs(guest) == 0xFFFF0FF0
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.regs("r10")) == (1, 0xFFFF07F0)


def test_without_the_capability_reading_events_moves_the_payload(ring_3):
    guest = ring_3(*LOOP, exits=True)
    guest.set_regs(rcx=1)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert events(guest)[3] == 0
    assert debugregs(guest) == 0xFFFF07F0
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.regs("r10")) == (1, 0xFFFF07F0)


def test_without_the_capability_reading_debug_registers_moves_the_payload(ring_3):
    guest = ring_3(*LOOP, exits=True)
    guest.set_regs(rcx=1)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert debugregs(guest) == 0xFFFF07F0
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.regs("r10")) == (1, 0xFFFF07F0)


def test_shown_events_carry_the_single_step_too(ring_3):
    guest = payloads(ring_3(INC, "cd 80", exits=True, handler=(COUNT, HLT)))
    guest.set_regs(rflags=0x102)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert events(guest)[4] == 0x4800
    assert guest.run() == Exit.HLT
    assert (guest.regs("r8"), guest.debug.dr6) == (1, 0xFFFF47F0)


def test_a_pending_exception_moves_to_another_vcpu_by_its_events(ring_3):
    guest = payloads(ring_3(*LOOP, exits=True))
    guest.set_regs(rcx=1)
    assert guest.run() == Exit.X86_BUS_LOCK
    data = bytearray(KVM_VCPU_EVENTS.size_bytes)
    guest.vcpu.ioctl(ioctls.KVM_GET_VCPU_EVENTS, data)
    other = payloads(ring_3(*LOOP))
    other.vcpu.set_regs(guest.vcpu.get_regs())
    other.vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, data)
    assert other.run() == Exit.HLT
    assert (other.regs("r8"), other.regs("r10")) == (1, 0xFFFF07F0)


# -- a debugger ----------------------------------------


def watch(guest, control):
    guest.vcpu.ioctl(
        ioctls.KVM_SET_GUEST_DEBUG, KVM_GUEST_DEBUG.pack(control=KVM_GUESTDBG_ENABLE | control)
    )
    return guest


@pytest.mark.parametrize(
    ("quirk", "reported"), [("", 0xFFFF4FF0), ("debug_exit_hides_bus_lock = false", 0xFFFF47F0)]
)
def test_t_b_4_a_single_stepper_gets_it_and_the_guest_does_not(ring_3, quirk, reported):
    guest = ring_3(*LOOP, preset=f"{INTEL}[quirks]\n{quirk}\n")
    watch(guest, KVM_GUESTDBG_SINGLESTEP)
    assert guest.run() == Exit.DEBUG
    exception, pc, dr6 = (
        int.from_bytes(guest.vcpu.run.memory[at : at + size], "little")
        for at, size in ((32, 4), (40, 8), (48, 8))
    )
    assert (exception, pc, dr6) == (DB, CODE + 3, reported)
    assert (guest.regs("r8"), guest.debug.dr6) == (0, 0xFFFF0FF0)


def test_t_b_4_software_breakpoints_alone_do_not_divert_it(ring_3):
    guest = watch(ring_3(*LOOP), KVM_GUESTDBG_USE_SW_BP)
    guest.set_regs(rcx=2)
    assert guest.run() == Exit.HLT
    assert guest.regs("r8") == 2


# -- MOV DR6, and processors without ----------------------------------------


@pytest.mark.parametrize(
    ("value", "neither", "rtm", "detect", "both"),
    [
        (0, 0xFFFF0FF0, 0xFFFE0FF0, 0xFFFF07F0, 0xFFFE07F0),
        (0xFFFF0FF0, 0xFFFF0FF0, 0xFFFF0FF0, 0xFFFF0FF0, 0xFFFF0FF0),
        (0x00000800, 0xFFFF0FF0, 0xFFFE0FF0, 0xFFFF0FF0, 0xFFFE0FF0),
        (0xFFFFFFFF, 0xFFFFEFFF, 0xFFFFEFFF, 0xFFFFEFFF, 0xFFFFEFFF),
    ],
)
def test_t_b_1_what_the_guest_writes_to_dr6(start, value, neither, rtm, detect, both):
    found = []
    for preset in (PLAIN, PLAIN_RTM, INTEL, RTM):
        guest = start(preset, "0f 23 f0", "0f 21 f3", HLT).offer_everything()
        guest.set_regs(rax=value)
        assert guest.run() == Exit.HLT
        found.append(guest.regs("rbx"))
    assert found == [neither, rtm, detect, both]


def test_a_write_of_more_than_32_bits_to_dr6_is_a_general_protection_fault(start):
    guest = start(INTEL, "0f 23 f0", HLT).offer_everything().gate(13, HLT)
    guest.set_regs(rax=1 << 32)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1


def test_a_guest_whose_cpuid_hides_it_cannot_enable_it(start):
    enable = ("b9 d9 01 00 00", "b8 04 00 00 00", "31 d2", "0f 30", HLT)
    guest = start(INTEL, *enable).gate(13, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1


def test_an_amd_guest_gets_none(ring_3):
    guest = ring_3(*LOOP, preset=AMD)
    guest.set_regs(rcx=5)
    assert guest.run() == Exit.HLT
    assert guest.regs("r8") == 0
    assert guest.vcpu.bus_locks == 5
