import struct

from kvmsim.engine.base import Hlt
from kvmsim.engine.x86 import fpu

HLT, DATA = "f4", 0x8000


def test_state_after_reset(guest):
    area = fpu.legacy_area(guest.r)
    assert struct.unpack_from("<HHBxH", area) == (0x037F, 0, 0, 0)
    assert struct.unpack_from("<I", area, 24) == (0x1F80,)


def test_area_is_what_the_processor_itself_saves(guest):
    code = ("d9 e8", "d9 eb", "66 0f 76 db", "0f ae 04 25 00 80 00 00")  # fld1; fldpi; fxsave
    assert isinstance(guest.long(*code, HLT).run(), Hlt)
    saved, area = bytes(guest.ram[DATA : DATA + 416]), fpu.legacy_area(guest.r)
    assert area[:5] == saved[:5]
    assert area[24:28] == saved[24:28]
    assert area[32:160] == saved[32:160]
    assert area[160:416] == saved[160:416]


def test_registers_set_from_an_area_are_the_guests(guest):
    guest.long("de c1", "dd 1c 25 00 80 00 00", "f2 0f 58 c1", HLT)  # faddp; fstp; addsd xmm0, xmm1
    area = fpu.legacy_area(guest.r)
    struct.pack_into("<HB", area, 2, 6 << 11, 0xC0)  # two values on the stack
    one, half = bytes(7) + b"\x80\xff\x3f", bytes(7) + b"\x80\xfe\x3f"
    area[32:42], area[48:58] = one, half
    area[160:168], area[176:184] = struct.pack("<d", 2.0), struct.pack("<d", 0.25)
    fpu.set_legacy_area(guest.r, area)
    assert isinstance(guest.run(), Hlt)
    assert struct.unpack_from("<d", guest.ram, DATA) == (1.5,)
    assert struct.unpack_from("<d", fpu.legacy_area(guest.r), 160) == (2.25,)


def test_rounding_follows_the_control_words_that_are_set(guest):
    # cvtsd2si eax, xmm0; fld qword [data]; fistp dword [data+16]
    guest.long("f2 0f 2d c0", "dd 04 25 00 80 00 00", "db 1c 25 10 80 00 00", HLT)
    guest.ram[DATA : DATA + 8] = struct.pack("<d", 1.5)
    area = fpu.legacy_area(guest.r)
    struct.pack_into("<H", area, 0, 0x0F7F)  # x87: towards zero
    struct.pack_into("<I", area, 24, 0x3F80)  # SSE: down
    area[160:168] = struct.pack("<d", 1.75)
    fpu.set_legacy_area(guest.r, area)
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[0], guest.word(DATA + 16)) == (1, 1)
