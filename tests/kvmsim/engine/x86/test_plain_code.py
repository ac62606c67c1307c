"""The expression that skips plain instructions, against the decoder."""

import random

import pytest

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import plain_code, sites


def skipped(code):
    """Decode what the expression skips: its instructions."""
    end, at = plain_code.end(code, 0), 0
    while at < end:
        found = d.decode(code, at, 64)
        assert found is not None, code[:end].hex()
        yield found
        at += found.length
    assert at == end, code[: max(at, end)].hex()


@pytest.mark.parametrize(
    "code",
    [
        "48 89 e5",  # mov rbp, rsp
        "8b 44 24 08",  # mov eax, [rsp+8]
        "48 8d 3d 01 02 03 04",  # lea rdi, [rip+...]
        "65 48 8b 04 25 28 00 00 00",  # mov rax, gs:[0x28]
        "48 b8 01 02 03 04 05 06 07 08",  # mov rax, imm64
        "41 b8 01 02 03 04",  # mov r8d, imm32
        "48 c7 c0 ff ff ff ff",  # mov rax, -1
        "0f 84 00 00 00 00",  # jz
        "48 0f b6 44 8b 80",  # movzx rax, byte [rbx+rcx*4-0x80]
        "66 2e 0f 1f 84 00 00 00 00 00",  # nop
        "f3 0f 1e fa",  # endbr64
        "66 89 0c 25 00 10 00 00",  # mov [0x1000], cx
        "ff 15 00 00 00 00",  # call [rip]
    ],
)
def test_common_instructions_are_skipped_to_their_end(code):
    code = bytes.fromhex(code)
    assert plain_code.end(code + b"\xf4", 0) == len(code)


@pytest.mark.parametrize(
    "code",
    [
        "f0 ff 07",  # lock inc
        "87 07",  # xchg [rdi], eax
        "0f 05",  # syscall
        "48 0f 20 c0",  # mov rax, cr0
        "c7 0f 00 00 00 00",  # c7 /1
        "8f c8",  # pop /1
        "8e d8",  # mov ds, eax
        "ec",  # in
        "66 b8 01 02",  # its immediate is narrow
        "ff 1f",  # call far
    ],
)
def test_what_may_be_of_interest_is_not_skipped(code):
    assert plain_code.end(bytes.fromhex(code) + bytes(16), 0) == 0


def test_nothing_that_is_skipped_is_of_interest_and_all_lengths_are_right():
    chance = random.Random(5)
    seen = set()
    for _ in range(20_000):
        code = chance.randbytes(24)
        for found in skipped(code):
            assert sites.kind_of(found) is None, found.code.hex()
            seen.add(found.opcode)
    assert len(seen) > 150


def test_a_cut_off_instruction_is_not_skipped():
    assert plain_code.end(bytes.fromhex("90 48 8b 84 24 00"), 0) == 1
