"""Exceptions of real code, up to the triple fault."""

import pytest

from kvmsim.abi.exits import Exit

CODE, HANDLER, IDT, STACK, DATA, TABLES = 0x1000, 0x2000, 0x4000, 0x6000, 0x8000, 0x10000
HLT = "f4"


@pytest.mark.parametrize(
    ("code", "vector", "error", "at"),
    [
        ("31 c9 f7 f1", 0, None, 2),  # xor ecx, ecx; div ecx
        ("0f 0b", 6, None, 0),
        ("8e d8", 13, 0x50, 0),  # mov ds, ax: a selector beyond the GDT's limit
        ("0f 22 e0", 13, 0, 0),  # mov cr4, rax: reserved bits
        ("48 8b 06", 13, 0, 0),  # mov rax, [rsi]: not canonical
        ("b9 78 56 34 12 0f 32", 13, 0, 5),  # rdmsr of 12345678
        ("f0 0f 0b", 6, None, 0),
    ],
)
def test_an_exception_goes_through_the_guests_table(guest, code, vector, error, at):
    guest.long(code, HLT, rax=0x8000000000050, rsi=0x8000000000000000)
    assert error_code(guest, vector, at) == error


@pytest.mark.usefixtures("on_hardware")
@pytest.mark.parametrize(("code", "vector", "at"), [("cc", 3, 1), ("cd 30", 0x30, 2)])
def test_an_interrupt_instruction_goes_through_the_guests_table(guest, code, vector, at):
    guest.long(code, HLT)
    assert error_code(guest, vector, at) is None


def error_code(guest, vector, at):
    """The error code of the exception that a guest's first instructions raise; None without."""
    guest.gate(vector)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1
    frame, code = guest.regs("rsp"), None
    if STACK - frame == 48:
        code, frame = guest.word(frame), frame + 8
    words = [guest.word(frame + number * 8) for number in range(5)]
    assert words[:2] == [CODE + at, 8]
    assert words[3:] == [STACK, 0x10]
    return code


@pytest.mark.parametrize(
    ("code", "entry", "error"),
    [
        ("8b 07", 0, 0),  # a read of nothing
        ("89 07", 0, 2),
        ("89 07", 0x1003, 2),  # present, but the address lies in a page of a different kind
        ("ff e7", 0, 0x10),  # jmp rdi
    ],
)
def test_a_page_fault_tells_address_and_access(guest, code, entry, error):
    guest.long(code, HLT, rdi=0x9008)
    guest.word(TABLES + 3 * 4096 + 9 * 8, entry if not entry & 1 else 0x9001)
    guest.set_sregs({"cr0": 0x80010033})
    guest.gate(14)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.sregs("cr2") == 0x9008
    assert guest.word(guest.regs("rsp")) == error | entry & 1


def test_the_handler_returns_and_the_instruction_is_tried_again(guest):
    guest.long("8b 07", HLT, rdi=0x9000, rsi=TABLES + 3 * 4096 + 9 * 8)
    guest.ram[0x9000:0x9004] = b"\x2a\0\0\0"
    guest.word(TABLES + 3 * 4096 + 9 * 8, 0)
    guest.gate(14)
    guest.put(HANDLER, "48 c7 06 07 90 00 00", "48 83 c4 08", "48 cf")  # map it; iretq
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x2A
    assert (guest.regs("rip"), guest.regs("rsp")) == (CODE + 3, STACK)


@pytest.mark.usefixtures("on_hardware")
def test_ring_3_comes_back_from_ring_0(guest):
    guest.long("cd 30", "90", "0f 0b", ring=3)
    guest.gate(0x30, dpl=3)
    guest.gate(6, 0x2100)
    guest.put(HANDLER, "ff c3", "48 cf")  # inc ebx; iretq
    guest.put(0x2100, HLT)
    assert guest.run() == Exit.HLT
    words = [guest.word(guest.regs("rsp") + number * 8) for number in range(5)]
    assert words[0:2] == [CODE + 3, 0x1B]
    assert words[3:] == [0x7000, 0x23]
    assert guest.regs("rbx") == 1


@pytest.mark.usefixtures("on_hardware")
def test_an_int_to_a_gate_of_ring_0_is_refused_in_ring_3(guest):
    guest.long("cd 30", ring=3)
    guest.gate(0x30)
    guest.gate(13)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.word(guest.regs("rsp")) == 0x30 << 3 | 2


@pytest.mark.usefixtures("on_hardware")
def test_a_gate_that_is_not_present_is_a_fault_of_its_own(guest):
    """#UD is benign: the #NP of its delivery comes instead, with the bits IDT and EXT."""
    guest.long("0f 0b", HLT)
    guest.word(IDT + 6 * 16, 8 << 16 | 0x0E00 << 32)
    guest.gate(11)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.word(guest.regs("rsp")) == 6 << 3 | 3


def test_a_page_fault_without_a_handler_is_a_double_fault(guest):
    guest.long("8b 07", rdi=0x9000)
    guest.word(TABLES + 3 * 4096 + 9 * 8, 0)
    guest.gate(8)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.word(guest.regs("rsp")) == 0


@pytest.mark.parametrize("limit", [0, 0xFFF])
def test_nothing_that_handles_it_is_a_shutdown(guest, limit):
    guest.long("0f 0b", HLT)
    guest.set_sregs({"idt.limit": limit})
    assert guest.run() == Exit.SHUTDOWN


def test_page_tables_that_lead_nowhere_are_a_shutdown(guest):
    guest.long("0f 22 d8", HLT, rax=TABLES + 0x8000)  # mov cr3, rax
    assert guest.run() == Exit.SHUTDOWN


def test_a_guest_installs_a_table_of_its_own(guest):
    guest.long("0f 01 1e", "0f 0b", rsi=DATA)  # lidt [rsi]
    guest.word(DATA, 0xFFF, 2)
    guest.word(DATA + 2, 0x9000)
    guest.word(0x9000 + 6 * 16, HANDLER & 0xFFFF | 8 << 16 | 0x8E00 << 32)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert (guest.sregs("idt.base"), guest.sregs("idt.limit")) == (0x9000, 0xFFF)


def test_real_mode_goes_through_the_vector_table(guest):
    guest.real("cd 21", HLT)
    guest.word(0x21 * 4, HANDLER, 4)
    guest.put(HANDLER, "43", "cf")  # inc bx; iret
    assert guest.run() == Exit.HLT
    assert (guest.regs("rbx") & 0xFFFF, guest.regs("rip")) == (1, CODE + 3)


def test_real_mode_division_by_zero_returns_to_the_division(guest):
    guest.real("31 c9", "f7 f1", HLT)
    guest.word(0, HANDLER, 4)
    guest.put(HANDLER, HLT)
    assert guest.run() == Exit.HLT
    assert guest.word(STACK - 6, size_bytes=2) == CODE + 2


def test_the_first_instruction_is_at_the_top_of_memory(guest):
    """F000:FFF0 with a base of FFFF0000, until the first far jump."""
    rom = guest.add_memory(1, 0xFFFFF000, 4096)
    rom[0xFF0:0xFF5] = bytes.fromhex("ea 00 10 00 00")  # jmp 0:1000
    guest.put(CODE, "8c c8", HLT)  # mov ax, cs
    assert guest.run() == Exit.HLT
    assert (guest.regs("rip"), guest.regs("rax")) == (CODE + 3, 0)
    assert guest.sregs("cs.base") == 0


def test_accessed_and_dirty_bits_are_set(guest):
    guest.long("89 07", "8b 06", HLT, rdi=0x9000, rsi=0xA000)
    assert guest.run() == Exit.HLT
    entries = [guest.word(TABLES + 3 * 4096 + page * 8) & 0x60 for page in (9, 10)]
    assert entries == [0x60, 0x20]


@pytest.mark.usefixtures("on_hardware")
def test_from_real_mode_to_long_mode(guest):
    """By the guest's own code: CR4.PAE, EFER.LME, CR0.PG, far jump."""
    guest.set_cpuid((0x80000001, 0, 0, 0, 0, 0, 1 << 29))  # long mode
    guest.long(HLT)
    guest.set_sregs({"cr0": 0x60000010, "efer": 0, "cr4": 0, **real_segments()})
    guest.put(
        CODE,
        "66 b8 20 00 00 00 0f 22 e0",  # mov eax, 20h; mov cr4, eax
        "66 b8 00 00 01 00 0f 22 d8",  # mov eax, 10000h; mov cr3, eax
        "66 b9 80 00 00 c0 0f 32 66 0d 00 01 00 00 0f 30",  # EFER |= 100h
        "0f 20 c0 66 0d 01 00 00 80 0f 22 c0",  # CR0 |= PG | PE
        "66 ea 00 20 00 00 08 00",  # jmp 8:2000
    )
    guest.put(HANDLER, "48 b8 88 77 66 55 44 33 22 11", HLT)  # mov rax, 1122334455667788h
    guest.set_regs(rip=CODE)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x1122334455667788
    assert (guest.sregs("efer") & 0x500, guest.sregs("cs.l")) == (0x500, 1)


def real_segments():
    values = {}
    for name in ("cs", "ds", "es", "ss", "fs", "gs"):
        parts = {"selector": 0, "base": 0, "limit": 0xFFFF, "type": 3, "s": 1, "present": 1}
        parts |= {"dpl": 0, "g": 0, "l": 0, "db": 0, "unusable": 0}
        parts["type"] = 11 if name == "cs" else 3
        values |= {f"{name}.{part}": value for part, value in parts.items()}
    return values
