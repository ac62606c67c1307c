"""Slots found by address are the slots found by looking at every one."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from kvmsim.kvm.memslots import Memslots, Slot

NUMBERS = st.integers(0, 7)
PAGES = st.integers(0, 40)
PUTS = st.tuples(NUMBERS, PAGES, st.integers(1, 12))


@given(st.lists(PUTS | NUMBERS, max_size=40), PAGES)
def test_search_by_address_agrees_with_a_search_through_all(steps, gpa):
    memslots, all_slots = Memslots(SimpleNamespace()), {}
    for step in steps:
        if isinstance(step, int):
            if all_slots.pop(step, None):
                memslots.remove(step)
            continue
        number, start, size = step
        new = Slot(number, start, size, hva=0)
        others = [slot for slot in all_slots.values() if slot.number != number]
        in_the_way = [slot for slot in others if slot.overlaps(new)]
        assert (memslots.in_the_way(new) is not None) == bool(in_the_way)
        if not in_the_way:
            memslots.put(new)
            all_slots[number] = new
    assert memslots.slots == all_slots
    behind = [slot for slot in all_slots.values() if slot.gpa <= gpa < slot.gpa + slot.size_bytes]
    assert memslots.find(gpa) is (behind[0] if behind else None)
