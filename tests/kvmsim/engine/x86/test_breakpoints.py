"""Breakpoints in debug registers, single steps and alignment checks, of the guest and outside."""

import pytest

from kvmsim.engine.base import BusLock, Debug, Executing, Hlt, Io
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.breakpoints import Debugger, dr6_after
from kvmsim.engine.x86.delivery import Event

CODE, HANDLER, DATA, STACK = 0x1000, 0x2000, 0x8000, 0x6000
HLT, NOP, IRET = "f4", "90", "48 cf"
COUNT = "ff c3"  # inc ebx
BS, BD = 1 << 14, 1 << 13
DR6 = 0xFFFF0FF0
WRITE, PORT, ACCESS = 1, 2, 3
LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}


def dr7(number, kind=0, size=1):
    return 0x400 | 2 << 2 * number | (kind | LENGTHS[size] << 2) << 16 + 4 * number


def outside(*points, **options):
    """A debugger with breakpoints: (number, address, kind, size)."""
    values, control = [0] * 4, 0x400
    for number, address, kind, size in points:
        values[number] = address
        control |= dr7(number, kind, size)
    return Debugger(registers=(*values, control), **options)


def own(guest, number, address, kind=0, size=1):
    guest.r.set_debug(number, address)
    guest.r.set_debug(7, guest.r.debug(7) | dr7(number, kind, size))


def handled(guest):
    """A handler of #DB that keeps DR6 in RCX and counts."""
    guest.gate(1, HANDLER)
    guest.put(HANDLER, "0f 21 f1", COUNT, IRET)  # mov rcx, dr6
    guest.q[r.RBX] = guest.q[r.RCX] = 0
    return guest


@pytest.mark.parametrize("number", range(4))
def test_a_breakpoint_on_code_stops_before_the_instruction(guest, number):
    guest.long(NOP, COUNT, HLT)
    guest.q[r.RBX] = 0
    guest.cpu.debugger = outside((number, CODE + 1, 0, 1))
    stop = guest.run()
    assert isinstance(stop, Debug)
    assert (guest.r.rip, guest.q[r.RBX]) == (CODE + 1, 0)
    assert (stop.dr6, stop.dr7) == (1 << number, dr7(number))
    assert guest.r.debug(6) == DR6


def test_the_same_breakpoint_stops_again_until_the_resume_flag_is_set(guest):
    guest.long(NOP, COUNT, HLT)
    guest.cpu.debugger = outside((0, CODE + 1, 0, 1))
    assert [type(guest.run()) for _ in range(2)] == [Debug, Debug]
    guest.r.flags |= r.FLAG_RF
    assert isinstance(guest.run(), Hlt)


def test_a_breakpoint_on_an_instruction_the_engine_executes_comes_first(guest):
    guest.long(NOP, "0f a2", "e6 80", "f0 ff 07", HLT)
    guest.q[r.RDI] = DATA + 62
    places = [CODE + 1, CODE + 3, CODE + 5]
    guest.cpu.debugger = outside(*((n, at, 0, 1) for n, at in enumerate(places)))
    for at in places:
        assert isinstance(guest.run(), Debug)
        assert guest.r.rip == at
        guest.r.flags |= r.FLAG_RF
        guest.cpu.abandon()
        if at == places[1]:
            assert isinstance(guest.run(), Io)
            guest.cpu.complete()
    assert isinstance(guest.run(), BusLock)
    assert guest.cpu.bus_locks == 1


@pytest.mark.parametrize(
    ("code", "kind", "size", "hits"),
    [
        ("89 07", WRITE, 4, True),
        ("8b 07", WRITE, 4, False),
        ("8b 07", ACCESS, 4, True),
        ("88 47 03", WRITE, 4, True),
        ("88 47 04", WRITE, 4, False),
        ("48 89 47 fc", WRITE, 4, True),
        ("89 47 fc", WRITE, 4, False),
        ("48 ff 07", WRITE, 8, True),
        ("f0 ff 07", WRITE, 1, True),
        ("a5", WRITE, 1, True),
    ],
)
def test_a_breakpoint_on_data_stops_behind_the_instruction(guest, code, kind, size, hits):
    length = len(bytes.fromhex(code))
    guest.long(code, NOP, HLT)
    guest.q[r.RDI], guest.q[r.RSI] = DATA, DATA + 0x100
    guest.cpu.debugger = outside((2, DATA, kind, size))
    stop = guest.run()
    if not hits:
        assert isinstance(stop, Hlt)
        return
    assert isinstance(stop, Debug)
    assert (guest.r.rip, stop.dr6) == (CODE + length, 4)
    assert isinstance(guest.run(), Hlt)


def test_a_data_breakpoint_follows_its_page(guest):
    guest.long("89 07", "0f 22 d8", "89 07", HLT)  # mov [rdi], eax; mov cr3, rax; mov [rdi], eax
    guest.map_page(0x9000, 0xA000)
    guest.q[r.RDI], guest.q[r.RAX] = 0x9010, guest.r.cr3
    guest.cpu.debugger = outside((0, 0x9010, WRITE, 4))
    assert isinstance(guest.run(), Debug)
    guest.map_page(0x9000, 0xB000)
    assert isinstance(guest.run(), Debug)
    assert guest.r.rip == CODE + 7


def test_the_guests_own_breakpoint_on_code_returns_with_the_resume_flag(guest):
    handled(guest.long(NOP, COUNT, HLT))
    own(guest, 1, CODE + 1)
    assert isinstance(guest.run(), Hlt)
    # Once for the breakpoint, once for the instruction.
    assert guest.q[r.RBX] == 2
    assert guest.q[r.RCX] == DR6 | 2
    assert guest.word(STACK - 24) & r.FLAG_RF


def test_the_guests_own_breakpoint_in_a_loop_hits_every_time(guest):
    handled(guest.long("b8 05 00 00 00", NOP, "ff c8", "75 fb", HLT))
    own(guest, 0, CODE + 5)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 5


def test_the_guests_own_breakpoint_on_data_is_a_trap(guest):
    handled(guest.long("89 07", NOP, HLT))
    guest.q[r.RDI] = DATA
    own(guest, 3, DATA, ACCESS, 4)
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RBX], guest.q[r.RCX]) == (1, DR6 | 8)
    assert guest.word(STACK - 40, 8) == CODE + 2


def test_pushf_does_not_show_that_the_guest_is_stepped(guest):
    guest.long("9c 58", HLT)
    guest.r.flags = 2
    own(guest, 0, DATA, WRITE, 1)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 2


def test_a_breakpoint_on_a_port_needs_cr4_de(guest):
    handled(guest.long("e6 80", "e6 80", HLT))
    own(guest, 0, 0x80, PORT, 1)
    assert isinstance(guest.run(), Io)
    guest.cpu.complete()
    guest.r.cr4 |= 1 << 3
    assert isinstance(guest.run(), Io)
    guest.cpu.complete()
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RBX], guest.q[r.RCX]) == (1, DR6 | 1)


@pytest.mark.parametrize("code", ["e6 80", "e4 80", "6e", "0f a2", "0f 31"])
def test_the_guest_steps_over_what_the_engine_executes(guest, code):
    handled(guest.long("9d", code, NOP, HLT))  # popf
    guest.q[r.RSP] -= 8
    guest.set_word(guest.q[r.RSP], 0x102)
    guest.put(HANDLER, "41 ff c0", "48 cf")  # inc r8d; iretq
    guest.q[8], guest.q[r.RSI] = 0, DATA
    stop = guest.run()
    while isinstance(stop, Io):
        guest.cpu.complete(b"\1")
        stop = guest.run()
    assert isinstance(stop, Hlt)
    assert guest.q[8] == 2  # behind the instruction and behind NOP


def test_general_detect_is_a_fault_that_clears_itself(guest):
    handled(guest.long("0f 21 c0", HLT))  # mov rax, dr0
    guest.r.set_debug(7, 0x400 | BD)
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RBX], guest.q[r.RCX]) == (1, DR6 | BD)
    assert guest.r.debug(7) == 0x400


def test_general_detect_of_a_debugger_is_its(guest):
    guest.long("0f 21 c0", HLT)
    guest.cpu.debugger = Debugger(registers=(0, 0, 0, 0, 0x400 | BD))
    stop = guest.run()
    assert isinstance(stop, Debug)
    assert (stop.dr6, stop.dr7, guest.r.rip) == (BD, 0x400 | BD, CODE)


def test_int3_is_the_debuggers_if_it_asked(guest):
    guest.long(NOP, "cc", HLT)
    guest.cpu.debugger = Debugger(int3=True)
    stop = guest.run()
    assert isinstance(stop, Debug)
    assert (stop.exception, guest.r.rip) == (3, CODE + 1)


def test_int_3_of_two_bytes_is_the_guests(guest):
    guest.long("cd 03", HLT).gate(3, HANDLER, dpl=3)
    guest.put(HANDLER, HLT)
    guest.cpu.debugger = Debugger(int3=True)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == HANDLER + 1


def test_interrupts_wait_while_a_debugger_blocks_them(guest):
    guest.long("fb", NOP, NOP, HLT).gate(0x30, HANDLER)
    guest.put(HANDLER, HLT)
    guest.cpu.interrupt = 0x30
    guest.cpu.debugger = Debugger(single_step=True, blocks_interrupts=True)
    rips = []
    while isinstance(guest.run(), Debug):
        rips.append(guest.r.rip - CODE)
    assert rips == [1, 2, 3]
    guest.cpu.debugger = None
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == HANDLER + 1


def test_a_step_that_hits_a_data_breakpoint_is_one_exception(guest):
    guest.long("89 07", HLT)
    guest.q[r.RDI] = DATA
    guest.cpu.debugger = outside((0, DATA, WRITE, 4), single_step=True)
    stop = guest.run()
    assert stop.dr6 == BS | 1


def test_a_bus_lock_and_a_step_are_reported_together(guest):
    guest.long("f0 ff 07", HLT)
    guest.q[r.RDI] = DATA + 62
    guest.r.flags |= r.FLAG_TF
    assert isinstance(guest.run(), BusLock)
    assert guest.cpu.traps == BS


@pytest.mark.parametrize(
    ("flags", "am", "ring", "code", "faults"),
    [
        (r.FLAG_AC, True, 3, "8b 47 01", True),
        (r.FLAG_AC, True, 3, "8b 07", False),
        (r.FLAG_AC, True, 3, "8a 47 01", False),
        (r.FLAG_AC, True, 3, "89 47 02", True),
        (r.FLAG_AC, False, 3, "8b 47 01", False),
        (0, True, 3, "8b 47 01", False),
        (r.FLAG_AC, True, 0, "8b 47 01", False),
    ],
)
def test_alignment_is_checked_at_ring_3_if_asked(guest, flags, am, ring, code, faults):
    guest.long(code, "cd 80", HLT, ring=ring).gate(17, HANDLER).gate(0x80, 0x2100, dpl=3)
    guest.put(HANDLER, HLT)
    guest.put(0x2100, HLT)
    guest.q[r.RDI] = DATA
    guest.r.cr0 |= (1 << 18) if am else 0
    guest.r.flags |= flags
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == (HANDLER if faults else 0x2100) + 1
    assert guest.ram[DATA + 2 : DATA + 6] == bytes(4)


def test_alignment_is_checked_from_the_popf_on_that_asks_for_it(guest):
    guest.long("8b 47 01", "68 02 00 04 00", "9d", "8b 47 01", HLT, ring=3).gate(17, HANDLER)
    guest.put(HANDLER, HLT)
    guest.q[r.RDI] = DATA
    guest.r.cr0 |= 1 << 18
    for _ in range(3):
        guest.r.rip = CODE
        assert isinstance(guest.run(), Hlt)
        assert guest.r.rip == HANDLER + 1
        guest.long(ring=3)
        guest.r.flags = 2
        guest.r.cr0 |= 1 << 18


@pytest.mark.parametrize(
    ("before", "payload", "after"),
    [
        (0xFFFF0FF0, 0x4800, 0xFFFF47F0),
        (0xFFFF07F0, 0x1001, 0xFFFF07F1),
        (0xFFFF0FFF, 0x4000, 0xFFFF4FF0),
    ],
)
def test_dr6_after_a_payload(before, payload, after):
    assert dr6_after(before, payload) == after


def test_an_event_queued_with_a_trap_comes_behind_it(guest):
    handled(guest.long(NOP, HLT)).gate(2, 0x2100)
    guest.put(0x2100, COUNT, IRET)
    guest.cpu.traps = BS
    guest.cpu.queue(Event(2, external=True))
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 2


@pytest.mark.parametrize(
    ("code", "traps"),
    [
        ("8e d0 90", 1),  # mov ss, eax; nop
        ("fb 90", 2),  # sti; nop
        ("90 90", 2),
    ],
)
def test_loading_ss_holds_off_the_trap_of_single_steps(guest, code, traps):
    handled(guest.long(code, HLT))
    guest.put(HANDLER, COUNT, IRET)
    guest.q[r.RAX] = 0x10
    guest.r.flags |= r.FLAG_TF
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == traps


def test_a_single_step_into_int1_is_one_exception(guest):
    handled(guest.long("f1", HLT))
    guest.r.flags |= r.FLAG_TF
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 1


def test_a_far_return_of_real_mode_is_right_behind_a_guest_that_was_watched(guest):
    guest.long("89 07", HLT)
    guest.q[r.RDI] = DATA
    guest.cpu.debugger = outside((0, DATA, WRITE, 4))
    assert isinstance(guest.run(), Debug)
    guest.cpu.debugger = None
    assert isinstance(guest.run(), Hlt)
    guest.cpu.reset()
    guest.real(NOP, "cb", HLT)
    guest.set_word(STACK, HANDLER, 4)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == HANDLER + 1


@pytest.mark.parametrize("rounds", [0, 200])
def test_a_guest_that_executes_nothing_inline_gets_to_a_watched_access(make_guest, rounds):
    """Its steps are executed inline all the same, some at a time."""
    guest = make_guest(inline_bytes=0, paced=False)
    guest.long("e2 fe", "89 07", NOP, HLT)  # loop on itself; mov [rdi], eax
    guest.q[r.RCX], guest.q[r.RDI] = rounds + 1, DATA
    guest.cpu.debugger = outside((0, DATA, WRITE, 4))
    stop = guest.run()
    turns = 0
    while isinstance(stop, Executing):
        stop.work()
        stop = guest.run()
        turns += 1
    assert isinstance(stop, Debug)
    assert guest.r.rip == CODE + 4
    assert turns == rounds // 50


def test_a_popf_that_ends_alignment_checks_ends_the_steps_unseen(guest):
    handled(guest.long("9d", NOP, "cd 80", ring=3)).gate(0x80, 0x2100, dpl=3)
    guest.put(0x2100, HLT)
    guest.q[r.RSP] -= 8
    guest.set_word(guest.q[r.RSP], 2)
    guest.r.cr0 |= 1 << 18
    guest.r.flags |= r.FLAG_AC
    assert isinstance(guest.run(), Hlt)
    assert (guest.r.rip, guest.q[r.RBX]) == (0x2101, 0)
