import mmap

import pytest

from kvmsim.abi.memory import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, PAGE_SIZE
from kvmsim.kvm import memslots, sev_private
from kvmsim.kvm.x86.slots import engine_slots


def pages(count):
    return memoryview(mmap.mmap(-1, count * PAGE_SIZE))


@pytest.fixture
def vm(kvm):
    return kvm().create_vm()


def put(vm, **values):
    slot = memslots.Slot(**{"number": 0, "gpa": 0, "size_bytes": 4 * PAGE_SIZE, "hva": 0, **values})
    memslots.of(vm).put(slot)
    return slot


def test_slot_nobody_has_looked_for_is_a_hole(vm):
    put(vm)
    assert engine_slots(vm) == []


def test_each_stretch_of_pages_is_a_slot_of_the_engine(vm):
    low, high = pages(1), pages(2)
    put(vm, gpa=0x10000, pages=((0, low), (2 * PAGE_SIZE, high)), flags=KVM_MEM_READONLY)
    found = engine_slots(vm)
    assert [(slot.gpa, len(slot.memory), slot.read_only) for slot in found] == [
        (0x10000, PAGE_SIZE, True),
        (0x12000, 2 * PAGE_SIZE, True),
    ]


def test_stretch_of_a_logged_slot_notes_its_own_pages(vm):
    put(
        vm,
        pages=((2 * PAGE_SIZE, pages(2)),),
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        dirty=bytearray(8),
    )
    [slot] = engine_slots(vm)
    slot.written[1] = 1
    kept = memslots.of(vm).slots[0]
    kept.note_written()
    assert kept.dirty[0] == 1 << 3


def test_encrypted_pages_are_slots_of_their_own(vm, monkeypatch):
    view, plain = pages(2), pages(1)
    vm.sev_active = True
    sides = ((0, view[:PAGE_SIZE]), (PAGE_SIZE, plain))
    monkeypatch.setattr(sev_private, "sides", lambda *_: iter(sides))
    put(vm, gpa=0x8000, pages=((0, view),))
    assert [(slot.gpa, len(slot.memory)) for slot in engine_slots(vm)] == [
        (0x8000, PAGE_SIZE),
        (0x9000, PAGE_SIZE),
    ]
