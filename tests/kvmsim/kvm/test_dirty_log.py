"""Pages that guest code wrote; everything else of the log is in test_memslots."""

import pytest

from kvmsim.abi.memory import PAGE_SIZE
from kvmsim.kvm.memslots import Slot


@pytest.fixture
def slot():
    return Slot(number=0, gpa=0, size_bytes=70 * PAGE_SIZE, hva=0, dirty=bytearray(16))


def test_pages_that_code_wrote_are_in_the_log_once(slot):
    written = slot.log_written()
    written[0] = written[69] = 1
    slot.note_written()
    assert slot.dirty == b"\1" + bytes(7) + b"\x20" + bytes(7)
    slot.dirty = bytearray(16)
    slot.note_written()
    assert slot.dirty == bytes(16)


def test_byte_behind_the_last_page_is_no_page(slot):
    slot.log_written()[70] = 1
    slot.note_written()
    assert slot.dirty == bytes(16)


def test_slot_that_is_not_logged_has_nowhere_to_note_pages():
    slot = Slot(number=0, gpa=0, size_bytes=PAGE_SIZE, hva=0)
    assert slot.log_written() is None
    slot.note_written()
