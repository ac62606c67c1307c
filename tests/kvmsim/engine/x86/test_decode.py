"""The small decoder, by hand-written instructions and against a disassembler where installed."""

import random

import pytest

from kvmsim.engine.x86 import decode as d


@pytest.mark.parametrize(
    ("code", "mode", "size"),
    [
        ("f0 48 0f c1 07", 64, 8),  # lock xadd [rdi], rax
        ("f0 ff 00", 64, 4),  # lock inc dword [rax]
        ("87 03", 64, 4),  # xchg [rbx], eax
        ("86 03", 32, 1),  # xchg [ebx], al
        ("f0 66 01 03", 64, 2),  # lock add [rbx], ax
        ("f0 ff 06 00 10", 16, 2),  # lock inc word [0x1000]
        ("f0 0f c7 0f", 64, 8),  # lock cmpxchg8b [rdi]
        ("f0 48 0f c7 0f", 64, 16),  # lock cmpxchg16b [rdi]
        ("f0 0f b0 0f", 64, 1),  # lock cmpxchg [rdi], cl
        ("f0 0f ba 2f 05", 64, 4),  # lock bts dword [rdi], 5
        ("f0 0f ab 07", 64, 4),  # lock bts [rdi], eax
        ("f0 83 07 01", 64, 4),  # lock add dword [rdi], 1
        ("f0 f7 17", 64, 4),  # lock not dword [rdi]
    ],
)
def test_locked_accesses_are_known_with_their_size(code, mode, size):
    found = d.decode(bytes.fromhex(code), 0, mode)
    assert found is not None
    assert found.length == len(bytes.fromhex(code))
    assert d.is_locked_access(found)
    assert d.locked_bytes(found) == size


@pytest.mark.parametrize(
    "code",
    [
        "01 03",  # add [rbx], eax
        "87 c3",  # xchg ebx, eax
        "0f c1 07",  # xadd [rdi], eax
        "f0 89 03",  # lock mov [rbx], eax: #UD
        "f0 39 03",  # lock cmp [rbx], eax: #UD
        "f0 0f ba 27 05",  # lock bt dword [rdi], 5: #UD
        "f0 0f c1 c0",  # lock xadd eax, eax: #UD
        "f0 83 3f 01",  # lock cmp dword [rdi], 1: #UD
    ],
)
def test_other_instructions_lock_nothing(code):
    found = d.decode(bytes.fromhex(code), 0, 64)
    assert found is not None
    assert not d.is_locked_access(found)


def test_operands_have_their_parts():
    found = d.decode(bytes.fromhex("65 4b 01 84 a9 78 56 34 12"), 0, 64)
    assert found is not None
    assert found.operand == d.Operand(9, 13, 4, 0x12345678, d.GS, 64)
    assert (found.reg, found.bits) == (0, 64)


def test_addresses_relative_to_rip_and_to_the_stack_are_told():
    relative = d.decode(bytes.fromhex("01 05 fc ff ff ff"), 0, 64)
    stack = d.decode(bytes.fromhex("01 44 24 08"), 0, 64)
    short = d.decode(bytes.fromhex("01 46 fe"), 0, 16)
    assert relative is not None
    assert stack is not None
    assert short is not None
    assert relative.operand == d.Operand(d.RIP, d.NONE, 1, -4, d.DS, 64)
    assert stack.operand == d.Operand(4, d.NONE, 1, 8, d.SS, 64)
    assert short.operand == d.Operand(5, d.NONE, 1, -2, d.SS, 16)


def test_a_cut_off_and_a_too_long_instruction_are_none():
    assert d.decode(bytes.fromhex("48 c7 05 00"), 0, 64) is None
    assert d.decode(b"\x66" * 15 + b"\x90", 0, 64) is None


def test_a_rex_prefix_that_is_not_last_does_not_count():
    found = d.decode(bytes.fromhex("48 66 01 03"), 0, 64)
    assert found is not None
    assert (found.bits, found.rex) == (16, 0)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("75 00", d.Branch.CONDITIONAL),
        ("e2 fe", d.Branch.CONDITIONAL),
        ("0f 84 00 00 00 00", d.Branch.CONDITIONAL),
        ("e8 00 00 00 00", d.Branch.CALL),
        ("ff d0", d.Branch.INDIRECT_CALL),
        ("c3", d.Branch.RETURN),
        ("ff e0", d.Branch.INDIRECT_JUMP),
        ("eb fe", d.Branch.JUMP),
        ("48 cf", d.Branch.FAR),
        ("90", None),
    ],
)
def test_branches_are_told_apart(code, kind):
    found = d.decode(bytes.fromhex(code), 0, 64)
    assert found is not None
    assert d.branch_of(found) == kind


def test_every_interesting_instruction_passes_the_byte_filter():
    known = [bytes([op]) if op < 0x100 else op.to_bytes(2, "big") for op in sorted(d.SENSITIVE)]
    known += [b"\x0f\x01" + bytes([modrm]) for modrm in d.SENSITIVE_0F01]
    assert all(d.INTERESTING.search(code) for code in known)


@pytest.mark.parametrize("mode", [16, 32, 64])
def test_lengths_agree_with_a_disassembler_on_random_bytes(mode):
    capstone = pytest.importorskip("capstone")
    engine = capstone.Cs(
        capstone.CS_ARCH_X86,
        {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[mode],
    )
    stream = random.Random(mode)
    compared, wrong = 0, []
    for _ in range(20_000):
        code = stream.randbytes(15)
        theirs = next(engine.disasm(code, 0x1000, count=1), None)
        ours = d.decode(code, 0, mode)
        if theirs is None or ours is None or d.is_undefined(ours) or ours.opcode & d.EVEX:
            continue
        compared += 1
        if theirs.size != ours.length:
            wrong.append((code.hex(), theirs.mnemonic, theirs.op_str, theirs.size, ours.length))
    assert compared > 10_000
    assert wrong == []
