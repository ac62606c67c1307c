import struct

import pytest

from kvmsim.engine.base import Hlt

CODE, DATA, AREA, HANDLER = 0x1000, 0x8000, 0x9000, 0x2000
HLT = "f4"
ALL = ("b8 ff ff ff ff", "ba ff ff ff ff")  # mov eax, -1; mov edx, -1
XSAVE, XRSTOR, XSAVEOPT = "0f ae 27", "0f ae 2f", "0f ae 37"  # [rdi]
X87, SSE, AVX = 1, 2, 4


@pytest.fixture
def guest(make_guest):
    """Ring 0 with XCR0 = 7 and RDI at an aligned area of 0xCC."""

    def make(*code, xcr0=7):
        guest = make_guest().long(*code)
        guest.r.cr4 |= 1 << 18
        guest.cpu.xcr0 = xcr0
        guest.q[7] = AREA
        guest.ram[AREA : AREA + 1024] = b"\xcc" * 1024
        guest.ram[AREA + 512 : AREA + 576] = bytes(64)
        return guest

    return make


def components(guest):
    return struct.unpack_from("<Q", guest.ram, AREA + 512)[0]


def test_registers_the_code_used_are_in_the_area(guest):
    guest = guest("d9 e8", "66 0f 76 c9", *ALL, XSAVE, HLT)  # fld1; pcmpeqd xmm1, xmm1
    assert isinstance(guest.run(), Hlt)
    assert components(guest) == X87 | SSE
    assert guest.ram[AREA + 160 + 16 : AREA + 160 + 32] == b"\xff" * 16
    assert guest.ram[AREA + 32 : AREA + 42] == bytes(7) + b"\x80\xff\x3f"  # 1.0
    assert guest.ram[AREA + 4] == 0x80  # the seventh physical register is in use


def test_what_is_not_asked_for_stays_as_it_was(guest):
    guest = guest("b8 02 00 00 00", "31 d2", XSAVE, HLT)  # SSE only
    assert isinstance(guest.run(), Hlt)
    assert guest.ram[AREA : AREA + 24] == b"\xcc" * 24
    assert guest.ram[AREA + 576 : AREA + 832] == b"\xcc" * 256


def test_optimised_form_leaves_out_what_is_not_in_use(guest):
    guest = guest("66 0f ef c0", *ALL, XSAVEOPT, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.ram[AREA + 160 : AREA + 176] == b"\xcc" * 16
    assert not components(guest) & AVX


def test_saved_registers_come_back(guest):
    clobber = ("66 0f ef c9", "dd d8")  # pxor xmm1, xmm1; fstp st0
    guest = guest("d9 e8", "66 0f 76 c9", *ALL, XSAVE, *clobber, XRSTOR, "dd 5f f8", HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.xmm(1) == b"\xff" * 16
    assert struct.unpack_from("<d", guest.ram, AREA - 8) == (1.0,)


def test_upper_halves_are_kept(guest):
    guest = guest(*ALL, XRSTOR, "48 81 c7 00 04 00 00", XSAVE, HLT)  # add rdi, 0x400
    image = bytes(range(256))
    guest.ram[AREA + 576 : AREA + 832] = image
    guest.ram[AREA + 24 : AREA + 28] = struct.pack("<I", 0x1F80)
    guest.ram[AREA + 512] = AVX
    assert isinstance(guest.run(), Hlt)
    assert guest.ram[AREA + 0x400 + 576 : AREA + 0x400 + 832] == image


@pytest.mark.parametrize(
    ("offset", "byte", "why"),
    [
        (512, 0x08, "a component XCR0 has not on"),
        (520, 0x01, "the compacted format"),
        (27, 0xFF, "reserved bits of MXCSR"),
    ],
)
def test_area_that_cannot_be_restored(guest, offset, byte, why):
    guest = guest(*ALL, XRSTOR, HLT).gate(13, HANDLER)
    guest.put(HANDLER, "b3 01", HLT)
    guest.ram[AREA + 24 : AREA + 28] = struct.pack("<I", 0x1F80)
    guest.ram[AREA + offset] = byte
    assert isinstance(guest.run(), Hlt)
    assert guest.q[3] & 1, why


def test_area_has_to_be_aligned(guest):
    guest = guest(*ALL, XSAVE, HLT).gate(13, HANDLER)
    guest.put(HANDLER, "b3 01", HLT)
    guest.q[7] = AREA + 16
    assert isinstance(guest.run(), Hlt)
    assert guest.q[3] & 1


def test_without_osxsave_there_is_no_such_instruction(guest):
    guest = guest(*ALL, XSAVE, HLT).gate(6, HANDLER)
    guest.put(HANDLER, "b3 01", HLT)
    guest.r.cr4 &= ~(1 << 18)
    assert isinstance(guest.run(), Hlt)
    assert guest.q[3] & 1
