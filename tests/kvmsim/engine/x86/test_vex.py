import pytest

from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86 import fpu, vex

DATA, HANDLER = 0x8000, 0x2000
HLT = "f4"
LOAD_XMM, LOAD_YMM = "c5 fa 6f 07", "c5 fe 6f 07"  # vmovdqu [rdi]
STORE_YMM9 = "c5 7e 7f 4f 20"  # vmovdqu [rdi+0x20], ymm9
COPY = "c4 41 7d 28 c8"  # vmovapd ymm9, ymm8


@pytest.fixture
def guest(make_guest):
    def make(*code, xcr0=7):
        guest = make_guest().long(*code, HLT).gate(6, HANDLER).gate(13, HANDLER)
        guest.put(HANDLER, "b3 01", HLT)
        guest.r.cr4 |= 1 << 18
        guest.cpu.xcr0 = xcr0
        guest.q[7] = DATA
        guest.ram[DATA : DATA + 32] = bytes(range(32))
        return guest

    return make


def decoded(text, mode=64):
    return d.decode(bytes.fromhex(text), 0, mode)


@pytest.mark.parametrize(
    ("code", "bits", "reg", "length"),
    [
        (LOAD_XMM, 128, 0, 4),
        (LOAD_YMM, 256, 0, 4),
        ("c5 fa 6f 44 24 30", 128, 0, 6),
        (STORE_YMM9, 256, 9, 5),
        ("c4 41 7d 28 c8", 256, 9, 5),
        ("c5 f8 10 05 00 01 00 00", 128, 0, 8),
    ],
)
def test_moves_are_known_with_their_length(code, bits, reg, length):
    found = decoded(code)
    assert vex.is_move(found)
    assert (found.bits, found.reg, found.length) == (bits, reg, length)


@pytest.mark.parametrize(
    "code",
    [
        "c5 f0 58 c1",  # vaddps xmm0, xmm1, xmm1
        "c4 e2 78 f2 c1",  # andn
        "c5 f2 10 c1",  # vmovss with two sources
        "c5 f2 6f c1",  # vmovdqu that names a second source
        "66 c5 fa 6f 07",
        "62 f1 7c 48 10 07",  # EVEX
        "c5 f8 77",  # vzeroupper
    ],
)
def test_everything_else_does_not_exist(guest, code):
    assert not vex.is_move(decoded(code))
    vm = guest(code)
    assert isinstance(vm.run(), Hlt)
    assert vm.q[3] & 1


def test_wide_load_fills_the_register(guest):
    vm = guest(LOAD_YMM)
    assert isinstance(vm.run(), Hlt)
    assert fpu.ymm(vm.r, 0) == bytes(range(32))


def test_narrow_load_clears_the_upper_half(guest):
    vm = guest(LOAD_YMM, LOAD_XMM)
    assert isinstance(vm.run(), Hlt)
    assert fpu.ymm(vm.r, 0) == bytes(range(16)) + bytes(16)


def test_copy_and_store(guest):
    vm = guest("c5 7e 6f 07", COPY, STORE_YMM9)  # vmovdqu ymm8, [rdi]
    assert isinstance(vm.run(), Hlt)
    assert vm.ram[DATA + 32 : DATA + 64] == bytes(range(32))


@pytest.mark.parametrize("xcr0", [1, 3])
def test_there_are_none_without_the_state(guest, xcr0):
    vm = guest(LOAD_XMM, xcr0=xcr0)
    assert isinstance(vm.run(), Hlt)
    assert vm.q[3] & 1


def test_aligned_form_wants_its_alignment(guest):
    vm = guest("c5 fd 6f 47 10")  # vmovdqa ymm0, [rdi+16]
    assert isinstance(vm.run(), Hlt)
    assert vm.q[3] & 1


def test_bus_lock_behind_a_move_is_found(guest):
    vm = guest(LOAD_XMM, "f0 83 47 3e 01")  # lock add dword [rdi+62], 1
    assert isinstance(vm.run(), BusLock)


def test_in_32_bit_code_the_bytes_are_a_pointer_load_unless_they_name_a_register():
    assert decoded("c5 07", 32).opcode == 0xC5
    assert decoded("c5 fa 6f 07", 32).opcode >= d.VEX
