"""Guest memory as the engine wants it, of what a VM's memory slots are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.memory import KVM_MEM_READONLY
from kvmsim.engine.x86.memory import Slot
from kvmsim.kvm import memslots

if TYPE_CHECKING:
    from kvmsim.kvm.vm import Vm


def engine_slots(vm: Vm) -> list[Slot]:
    """The engine's slots: one for each stretch of pages this process reaches.

    What is behind a slot but not reached is a hole to the engine: an access leaves the guest.
    """
    return [
        Slot(slot.gpa + offset, view, read_only=bool(slot.flags & KVM_MEM_READONLY))
        for slot in memslots.of(vm).slots.values()
        for offset, view in slot.pages or ()
    ]
