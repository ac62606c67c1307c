"""Guest memory as the engine wants it, of what a VM's memory slots are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.memory import KVM_MEM_READONLY, PAGE_SIZE
from kvmsim.engine.x86.memory import Slot
from kvmsim.kvm import memslots, sev_private

if TYPE_CHECKING:
    from kvmsim.kvm.vm import Vm


def engine_slots(vm: Vm) -> list[Slot]:
    """The engine's slots: one for each stretch of pages this process reaches.

    What is behind a slot but not reached is a hole to the engine: an access leaves the guest.
    """
    found: list[Slot] = []

    def add(slot: memslots.Slot, offset: int, view: memoryview) -> None:
        written = slot.log_written()
        if written is not None:
            first = offset // PAGE_SIZE
            written = written[first : first + len(view) // PAGE_SIZE + 1]
        read_only = bool(slot.flags & KVM_MEM_READONLY)
        found.append(Slot(slot.gpa + offset, view, read_only=read_only, written=written))

    for slot in memslots.of(vm).slots.values():
        for offset, view in slot.pages or ():
            if not vm.sev_active:
                add(slot, offset, view)
                continue
            for at, side in sev_private.sides(vm, slot.hva + offset, view):
                add(slot, offset + at, side)
    return found
