"""A debugger on the outside: single steps and breakpoints (kvm.md G row 92)."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit

CODE, HANDLER, DATA = 0x1000, 0x2000, 0x8000
HLT, NOP = "f4", "90"
ENABLE, STEP, SOFTWARE, HARDWARE = 1, 2, 1 << 16, 2 << 16
BS = 1 << 14


def debug(guest, control, **registers):
    """KVM_SET_GUEST_DEBUG; registers by name dr0 to dr7."""
    words = [registers.get(f"dr{number}", 0x400 if number == 7 else 0) for number in range(8)]
    data = control.to_bytes(8, "little") + b"".join(w.to_bytes(8, "little") for w in words)
    assert guest.ioctl(ioctls.KVM_SET_GUEST_DEBUG, bytearray(data)) == (0, 0)


def seen(guest):
    """Run up to a debug exit: (exception, address, DR6)."""
    assert guest.run() == Exit.DEBUG
    return guest.field(32), guest.field(40, 8), guest.field(48, 8)


def step(guest):
    exception, address, dr6 = seen(guest)
    assert (exception, dr6) == (1, 0xFFFF0FF0 | BS)
    return address - CODE


def test_row_92_every_instruction_is_a_stop(guest):
    guest.long(NOP, "ff c0", "eb 02", NOP, NOP, "89 07", HLT)
    debug(guest, ENABLE | STEP)
    assert [step(guest) for _ in range(4)] == [1, 3, 7, 9]
    debug(guest, 0)
    assert guest.run() == Exit.HLT


def test_steps_in_real_mode(guest):
    guest.real(NOP, "40", "eb 01", NOP, HLT)
    debug(guest, ENABLE | STEP)
    assert [step(guest) for _ in range(3)] == [1, 2, 5]


def test_the_guest_does_not_see_that_it_is_stepped(guest):
    guest.long("9c", "58", HLT)  # pushfq; pop rax
    debug(guest, ENABLE | STEP)
    assert [step(guest) for _ in range(2)] == [1, 2]
    assert guest.regs("rax") & 0x100 == 0
    assert guest.regs("rflags") & 0x100 == 0


@pytest.mark.usefixtures("on_hardware")
def test_a_repeated_instruction_is_a_stop_for_each_round(guest):
    guest.long("f3 aa", HLT, rcx=3, rax=0x41)
    debug(guest, ENABLE | STEP)
    assert [step(guest) for _ in range(3)] == [0, 0, 2]
    assert bytes(guest.ram[DATA : DATA + 4]) == b"AAA\0"


@pytest.mark.usefixtures("on_hardware")
def test_a_step_over_a_port(guest):
    guest.long("e6 80", NOP, HLT, rax=0x41)
    debug(guest, ENABLE | STEP)
    assert guest.run() == Exit.IO
    assert guest.io() == (True, 1, 0x80, b"A")
    assert step(guest) == 2
    assert step(guest) == 3


def test_a_step_over_cpuid(guest):
    guest.long("0f a2", NOP, HLT)
    debug(guest, ENABLE | STEP)
    assert [step(guest) for _ in range(2)] == [2, 3]


def test_a_step_behind_sti(guest):
    guest.long("fb", NOP, HLT)
    debug(guest, ENABLE | STEP)
    assert [step(guest) for _ in range(2)] == [1, 2]


@pytest.mark.usefixtures("on_hardware")
def test_int3_is_the_debuggers(guest):
    guest.long(NOP, "cc", HLT)
    debug(guest, ENABLE | SOFTWARE)
    assert seen(guest)[:2] == (3, CODE + 1)
    assert guest.regs("rip") == CODE + 1


@pytest.mark.usefixtures("on_hardware")
def test_int3_is_the_guests_without_one(guest):
    """Its delivery clears TF: the handler is not stepped."""
    guest.long(NOP, "cc", HLT)
    guest.gate(3)
    guest.put(HANDLER, HLT)
    debug(guest, ENABLE | STEP)
    assert step(guest) == 1
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1


@pytest.mark.parametrize("number", range(4))
def test_a_breakpoint_stops_before_its_instruction(guest, number):
    guest.long(NOP, "ff c0", HLT)
    debug(guest, ENABLE | HARDWARE, **{f"dr{number}": CODE + 1}, dr7=0x400 | 2 << 2 * number)
    assert seen(guest) == (1, CODE + 1, 0xFFFF0FF0 | 1 << number)
    assert guest.regs("rax") == 0
    debug(guest, 0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 1


@pytest.mark.usefixtures("on_hardware")
@pytest.mark.parametrize(
    ("code", "kind", "size"),
    [("89 07", 1, 4), ("8b 07", 3, 4), ("88 47 03", 1, 4), ("48 89 07", 1, 8)],
)
def test_a_watched_access_stops_behind_its_instruction(guest, code, kind, size):
    length = {4: 3, 8: 2}[size]
    guest.long(NOP, code, NOP, HLT)
    debug(guest, ENABLE | HARDWARE, dr0=DATA, dr7=0x402 | kind << 16 | length << 18)
    assert seen(guest) == (1, CODE + 1 + len(bytes.fromhex(code)), 0xFFFF0FF1)


@pytest.mark.parametrize("code", ["8b 07", "89 47 04", "88 47 ff"])
def test_what_is_not_watched_does_not_stop(guest, code):
    """A read, and writes beside the four watched bytes."""
    guest.long(code, HLT)
    debug(guest, ENABLE | HARDWARE, dr0=DATA, dr7=0x402 | 0xD << 16)
    assert guest.run() == Exit.HLT


def test_row_89_the_guest_reads_and_writes_its_own_registers(guest):
    """DR6 keeps its fixed bits; DR0 is a plain register."""
    guest.long("31 c0", "0f 23 f0", "0f 21 f0", "0f 23 c7", "0f 21 c3", HLT)
    assert guest.run() == Exit.HLT
    assert (guest.regs("rax"), guest.regs("rbx")) == (0xFFFF0FF0, DATA)
    data = bytearray(128)
    assert guest.ioctl(ioctls.KVM_GET_DEBUGREGS, data) == (0, 0)
    assert int.from_bytes(data[:8], "little") == DATA


def test_the_guest_steps_itself(guest):
    """POPF sets TF: #DB behind the instruction after it."""
    guest.long("68 02 01 00 00", "9d", NOP, NOP, HLT)  # push 102h; popfq
    guest.gate(1)
    guest.put(HANDLER, "0f 21 f0", HLT)  # mov rax, dr6
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0xFFFF4FF0
    assert guest.word(guest.regs("rsp")) == CODE + 7


def test_the_guests_own_breakpoint_is_its_own(guest):
    guest.long(
        "0f 23 c6",  # mov dr0, rsi
        "b8 02 04 00 00 0f 23 f8",  # mov eax, 402h; mov dr7, rax
        NOP,
        "ff c3",
        HLT,
        rsi=CODE + 12,
    )
    guest.gate(1)
    guest.put(HANDLER, "0f 21 f0", HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0xFFFF0FF1
    assert (guest.regs("rbx"), guest.word(guest.regs("rsp"))) == (0, CODE + 12)
