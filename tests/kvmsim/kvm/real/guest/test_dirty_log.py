"""Which pages a guest wrote (KVM_GET_DIRTY_LOG)."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit

LOGGED, PAGE = 0x100000, 0x1000
LOG_DIRTY = 1
HLT = "f4"
WRITE = "89 07"  # mov [rdi], eax
NR_PAGES = 8


@pytest.fixture
def logged(guest):
    """A guest with eight pages more, whose writes are logged."""
    guest.more = guest.add_memory(1, LOGGED, NR_PAGES * PAGE, LOG_DIRTY)
    return guest


def dirty(guest):
    """The numbers of the pages written since the last call."""
    address, bitmap = guest.world.pages(1)
    data = bytearray(16)
    data[0], data[8:] = 1, address.to_bytes(8, "little")
    assert guest.world.ioctl(guest.vm, ioctls.KVM_GET_DIRTY_LOG, data) == (0, 0)
    return [page for page in range(NR_PAGES) if bitmap[0] >> page & 1]


def test_pages_that_were_written_are_told_once(logged):
    logged.long(WRITE, "48 81 c7 00 20 00 00", WRITE, HLT, rdi=LOGGED + PAGE)  # add rdi, 2000h
    assert dirty(logged) == []
    assert logged.run() == Exit.HLT
    assert dirty(logged) == [1, 3]
    assert dirty(logged) == []


def test_a_page_written_again_is_told_again(logged):
    logged.long(WRITE, HLT, WRITE, HLT, rdi=LOGGED)
    assert logged.run() == Exit.HLT
    assert dirty(logged) == [0]
    assert logged.run() == Exit.HLT
    assert dirty(logged) == [0]


def test_a_read_is_not_told(logged):
    logged.long("8b 07", HLT, rdi=LOGGED)
    assert logged.run() == Exit.HLT
    assert dirty(logged) == []


def test_a_write_across_two_pages_is_told_of_both(logged):
    logged.long(WRITE, HLT, rdi=LOGGED + 3 * PAGE - 2)
    assert logged.run() == Exit.HLT
    assert dirty(logged) == [2, 3]


def test_what_a_port_brings_is_told(logged):
    logged.long("6c", HLT, rdi=LOGGED + 4 * PAGE, rdx=0x80)  # insb
    assert logged.run() == Exit.IO
    logged.answer_io(b"A")
    assert logged.run() == Exit.HLT
    assert logged.more[4 * PAGE] == 0x41
    assert dirty(logged) == [4]


def test_what_an_exception_pushes_is_told(logged):
    logged.long("0f 0b", rsp=LOGGED + 6 * PAGE)
    logged.gate(6)
    logged.put(0x2000, HLT)
    assert logged.run() == Exit.HLT
    assert dirty(logged) == [5]
