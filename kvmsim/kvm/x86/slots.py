"""Guest memory as the engine wants it, of what a VM's memory slots are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.memory import KVM_MEM_READONLY
from kvmsim.engine.x86.memory import Slot
from kvmsim.kvm import memslots, sev_private

if TYPE_CHECKING:
    from kvmsim.kvm.vm import Vm


def engine_slots(vm: Vm) -> list[Slot]:
    """The engine's slots: one for each stretch of pages this process reaches.

    What is behind a slot but not reached is a hole to the engine: an access leaves the guest.
    """
    found: list[Slot] = []
    for slot in memslots.of(vm).slots.values():
        read_only = bool(slot.flags & KVM_MEM_READONLY)
        for offset, view in slot.pages or ():
            gpa = slot.gpa + offset
            if not vm.sev_active:
                found.append(Slot(gpa, view, read_only=read_only))
                continue
            for at, side in sev_private.sides(vm, slot.hva + offset, view):
                found.append(Slot(gpa + at, side, read_only=read_only))
    return found
