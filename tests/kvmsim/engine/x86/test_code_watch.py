"""Code the host changes is translated again; what it leaves alone is not."""

import mmap

import pytest

from kvmsim.engine.base import Hlt, InKernel
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.code_watch import CodeWatch
from kvmsim.engine.x86.memory import Slot

CODE, DATA = 0x1000, 0x8000
HLT = "f4"


@pytest.fixture(params=["machine code", "python"])
def watched(request, guest):
    """A watch of 1,000 blocks of 1 to 40 bytes, their slot, and where they are."""
    native = guest.vm.unicorn.native if request.param == "machine code" else None
    if request.param == "machine code" and native is None:
        pytest.skip("needs an x86-64 host")
    slot = Slot(0x10000, memoryview(mmap.mmap(-1, 0x10000)))
    slot.memory[:] = bytes(n * 7 % 251 for n in range(0x10000))
    watch = CodeWatch(native)
    blocks = [(50 * n, n % 40 + 1) for n in range(1000)]
    for at, size in blocks:
        watch.add(slot, slot.gpa + at, bytes(slot.memory[at : at + size]))
    return watch, slot, blocks


def test_unchanged_code_is_unchanged(watched):
    assert not watched[0].changed()


@pytest.mark.parametrize("number", [0, 7, 8, 9, 500, 999])
def test_one_byte_of_any_block_is_noticed(watched, number):
    watch, slot, blocks = watched
    at, size = blocks[number]
    for place in {at, at + size // 2, at + size - 1}:
        slot.memory[place] ^= 1
        assert watch.changed()
        slot.memory[place] ^= 1
    assert not watch.changed()


def test_bytes_between_blocks_are_nobodys_business(watched):
    watch, slot, blocks = watched
    slot.memory[blocks[3][0] + blocks[3][1]] ^= 1
    assert not watch.changed()


def test_nothing_is_watched_after_clear(watched):
    watch, slot, _ = watched
    slot.memory[0] ^= 1
    watch.clear()
    assert not watch.changed()


def test_code_user_space_changes_is_executed_as_it_is(guest):
    guest.long("b0 01", HLT)
    for value in (1, 2, 3):
        guest.ram[CODE + 1] = value
        guest.r.rip = CODE
        assert isinstance(guest.run(), Hlt)
        assert guest.q[r.RAX] & 0xFF == value


def test_block_across_two_pages_is_watched_in_both(guest):
    at = 0x2000 - 3
    guest.long("b8 01 00 00 00", HLT, at=at)
    guest.run()
    guest.ram[0x2001] = 1
    guest.r.rip = at
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 0x01000001


def test_data_beside_code_is_not_taken_for_code(guest, monkeypatch):
    guest.long("ff 05 fa 00 00 00", HLT)  # inc dword [0x1100]
    guest.run()
    flushed = []
    monkeypatch.setattr(guest.vm.watch, "forget_code", lambda: flushed.append(True))
    for _ in range(3):
        guest.r.rip = CODE
        guest.run()
    assert (flushed, guest.word(0x1100)) == ([], 4)


def test_code_changed_at_a_stop_of_kvms_own_is_executed_as_it_is(make_guest):
    guest = make_guest(slice_bytes=5000).long("eb fe")
    assert isinstance(guest.run(), InKernel)
    guest.put(CODE, HLT)
    assert isinstance(guest.run(), Hlt)
