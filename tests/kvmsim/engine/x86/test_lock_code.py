"""Operands of locked instructions in every form: a bus lock exactly when they cross a line."""

import pytest

from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.lock_code import PAGES

CODE, DATA = 0x1000, 0x8000
# Code before and after the displacement-free form; what the address is made of.
FORMS_64 = {
    "base": ("f0 ff 07", {r.RDI: 0}, 0),
    "base and 8 bits": ("f0 ff 47 11", {r.RDI: -0x11}, 0),
    "base and 8 bits down": ("f0 ff 47 f0", {r.RDI: 0x10}, 0),
    "base and 32 bits": ("f0 ff 87 00 01 00 00", {r.RDI: -0x100}, 0),
    "index by 4": ("f0 ff 44 9f 08", {r.RDI: -0x48, r.RBX: 0x10}, 0),
    "index alone": ("f0 ff 04 1d 00 00 00 00", {r.RBX: 0}, 0),
    "r12": ("f0 41 ff 04 24", {12: 0}, 0),
    "r13 and r14 by 8": ("f0 43 ff 44 f5 00", {13: -0x80, 14: 0x10}, 0),
    "fs": ("f0 64 ff 07", {r.RDI: -0x300}, 0x300),
    "32-bit address": ("f0 67 ff 07", {r.RDI: 1 << 40}, 0),
}
FORMS_32 = {
    "base": ("f0 ff 07", {r.RDI: 0}, 0),
    "fs": ("f0 64 ff 47 04", {r.RDI: -0x304}, 0x300),
    "16-bit address": ("f0 67 ff 00", {r.RBX: -0x10, r.RSI: 0x10}, 0),
}


def locks(guest, registers, offset, code_bytes):
    """Whether the guest takes a bus lock, and then halts behind it."""
    values = dict(registers)
    first = next(iter(values))
    values[first] += offset + (DATA if len(values) < 3 else 0)
    for number, value in values.items():
        guest.q[number] = value & r.U64
    guest.r.rip = CODE
    stop = guest.run()
    found = isinstance(stop, BusLock)
    if found:
        stop = guest.run()
    assert isinstance(stop, Hlt)
    assert guest.r.rip == CODE + code_bytes + 1
    return found


@pytest.mark.parametrize(
    ("mode", "code", "registers", "base"),
    [
        *(("long", *form) for form in FORMS_64.values()),
        *(("protected", *form) for form in FORMS_32.values()),
    ],
    ids=[*(f"64 {name}" for name in FORMS_64), *(f"32 {name}" for name in FORMS_32)],
)
def test_lock_is_found_by_its_operand_whatever_its_form(guest, mode, code, registers, base):
    code_bytes = len(bytes.fromhex(code))
    getattr(guest, mode)(code, "f4")
    if base:
        old = guest.r.segment(r.FS)
        guest.r.set_segment(r.FS, r.Segment(old.selector, base, r.U32, old.rights))
    found = [
        offset
        for offset in (0, 60, 61, 63, 64, 125, 128)
        if locks(guest, registers, offset, code_bytes)
    ]
    assert found == [61, 63, 125]


def test_lock_relative_to_rip_is_found(guest):
    guest.long("f0 ff 05 37 70 00 00", "f4")  # lock inc [rip + 0x7037]: 0x803e
    assert isinstance(guest.run(), BusLock)
    guest.put(CODE, "f0 ff 05 35 70 00 00", "f4")
    guest.r.rip = CODE
    assert isinstance(guest.run(), Hlt)


def test_pages_that_share_a_place_in_the_table_are_told_apart(make_guest):
    guest = make_guest().long("f0 ff 07", "f4")
    for linear in (DATA, DATA + PAGES * 4096 % 0x200000):
        guest.q[r.RDI], guest.r.rip = linear, CODE
        assert isinstance(guest.run(), Hlt)


def test_page_that_becomes_uncached_is_a_bus_lock(guest):
    guest.long("f0 ff 07", "f4")
    guest.q[r.RDI] = DATA
    assert isinstance(guest.run(), Hlt)
    guest.map_page(DATA, DATA, 7 | 0x18)  # PCD, PWT
    guest.r.rip = CODE
    assert isinstance(guest.run(), BusLock)


def test_two_locks_in_a_row_are_both_looked_at(guest):
    guest.long("f0 ff 07", "f0 ff 06", "f0 ff 07", "f4")
    guest.q[r.RDI], guest.q[r.RSI] = DATA + 62, DATA + 0x100
    rips = []
    while isinstance(guest.run(), BusLock):
        rips.append(guest.r.rip - CODE)
    assert rips == [3, 9]
    assert guest.word(DATA + 0x100) == 1
