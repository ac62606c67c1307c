"""Control registers: values they do not take, and CR4.UMIP."""

import pytest

from kvmsim.engine.base import Hlt
from kvmsim.engine.x86 import registers as r

CODE, HANDLER, STACK, DATA = 0x1000, 0x2000, 0x6000, 0x8000
HLT = "f4"


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("0f 22 c0", 0x8000_0010),  # paging without protection
        ("0f 22 c0", 0x2000_0011),  # NW without CD
        ("0f 22 c0", 0x1_8001_0011),  # the upper half
        ("0f 22 c0", 0x0001_0011),  # paging off in 64-bit code
        ("0f 22 d8", 1 << 52),
        ("0f 22 d8", 1 << 63),
        ("0f 22 e0", 0x600),  # no PAE in long mode
        ("0f 22 e0", 0x1620),  # 57-bit addresses in long mode
        ("0f 22 e0", 1 << 31 | 0x620),
    ],
)
def test_a_bad_value_is_a_general_protection_fault(guest, code, value):
    guest.long(code, HLT).gate(13, HANDLER)
    guest.put(HANDLER, HLT)
    guest.q[r.RAX] = value
    before = (guest.r.cr0, guest.r.cr3, guest.r.cr4)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == HANDLER + 1
    assert (guest.r.cr0, guest.r.cr3, guest.r.cr4) == before


@pytest.mark.parametrize("code", ["0f 22 c8", "0f 20 e8", "0f 22 f8", "44 0f 20 c8"])
@pytest.mark.parametrize("ring", [0, 3])
def test_a_control_register_that_does_not_exist_is_undefined(guest, code, ring):
    guest.long(code, HLT, ring=ring).gate(6, HANDLER)
    guest.put(HANDLER, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == HANDLER + 1


@pytest.mark.parametrize(
    "code", ["0f 01 07", "0f 01 0f", "0f 01 e0", "0f 01 27", "0f 00 c0", "0f 00 0f"]
)
@pytest.mark.parametrize(("umip", "ring", "vector"), [(1, 3, 13), (1, 0, 3), (0, 3, 3)])
def test_umip_keeps_tables_and_tasks_to_ring_0(guest, code, umip, ring, vector):
    guest.long(code, "cc", ring=ring).gate(13, HANDLER).gate(3, 0x2100, dpl=3)
    guest.put(HANDLER, HLT)
    guest.put(0x2100, HLT)
    guest.q[r.RDI] = DATA
    guest.r.cr4 |= umip << 11
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == {13: HANDLER, 3: 0x2100}[vector] + 1
