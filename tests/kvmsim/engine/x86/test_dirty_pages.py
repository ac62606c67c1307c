"""Logged memory: a byte for each page the guest writes."""

import pytest

from kvmsim.engine.base import Hlt
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.dirty_pages import DirtyPages
from kvmsim.engine.x86.memory import Slot

CODE, DATA = 0x1000, 0x8000
HLT = "f4"
PAGES = 0x40


def log(guest):
    """Log all of a guest's memory."""
    written = bytearray(PAGES + 1)
    guest.vm.set_slots([Slot(0, guest.vm.memory.slots[0].memory, written=written)])
    return written


def pages(written):
    return [page for page, byte in enumerate(written) if byte]


def go(guest):
    guest.r.rip = CODE
    assert isinstance(guest.run(), Hlt)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("89 07", [8]),  # mov [rdi], eax
        ("8b 07", []),  # mov eax, [rdi]
        ("f0 ff 07", [8]),
        ("87 07", [8]),  # xchg
        ("89 87 fe 0f 00 00", [8, 9]),  # over the end of the page
        ("88 87 ff 0f 00 00", [8]),
        ("50", [5]),  # push rax
        ("0f 11 07", [8]),  # movups [rdi], xmm0
        ("aa", [8]),  # stosb
    ],
)
def test_store_marks_the_pages_it_touches(guest, code, found):
    guest.long(code, HLT)
    guest.q[r.RDI] = DATA
    go(guest)  # so that page tables have their accessed and dirty bits
    written = log(guest)
    go(guest)
    assert pages(written) == found


def test_blocks_translated_before_the_log_began_are_seen(guest):
    guest.long("89 07", HLT)
    guest.q[r.RDI] = DATA
    go(guest)
    written = log(guest)
    go(guest)
    assert pages(written) == [8]
    written[8] = 0
    go(guest)
    assert pages(written) == [8]


def test_frame_of_an_exception_marks_the_stack(guest):
    guest.long("0f 0b").gate(6, 0x2000)
    guest.put(0x2000, HLT)
    written = log(guest)
    go(guest)
    assert 5 in pages(written)


def test_without_a_log_nothing_is_marked(guest):
    guest.long("89 07", HLT)
    guest.q[r.RDI] = DATA
    written = log(guest)
    guest.vm.set_slots([Slot(0, guest.vm.memory.slots[0].memory)])
    go(guest)
    assert pages(written) == []


def test_log_works_without_machine_code(guest):
    guest.long("89 87 fe 0f 00 00", HLT)
    guest.q[r.RDI] = DATA
    go(guest)
    guest.vm.dirty_pages = DirtyPages(guest.vm.unicorn)
    guest.vm.dirty_pages._stub = 0
    written = log(guest)
    go(guest)
    assert pages(written) == [8, 9]
