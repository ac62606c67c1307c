"""Which pages the guest wrote: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG.

Whoever executes the guest reports writes with ``memslots.of(vm).mark_dirty``, or by
``Slot.log_written``.
"""

from __future__ import annotations

from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_CLEAR_DIRTY_LOG, KVM_GET_DIRTY_LOG
from kvmsim.abi.memory import KVM_CLEAR_DIRTY_LOG as CLEAR_DIRTY_LOG_STRUCT
from kvmsim.abi.memory import KVM_DIRTY_LOG
from kvmsim.errors import KvmError
from kvmsim.kvm import memslots
from kvmsim.kvm.client import copy_from_user, copy_to_user
from kvmsim.kvm.dispatch import VmFile, enables, handles
from kvmsim.kvm.memslots import LONG_BITS

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.memslots import Slot
    from kvmsim.kvm.vm import KvmEnableCap, Vm


@enables(caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
def enable_manual_protect(vm: Vm, enable: KvmEnableCap, client: Client) -> int:
    """Clearing becomes a call of its own; bit 1 (logs start full) needs bit 0."""
    del client
    manual = enable.arg0 & caps.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    allowed = manual | (caps.KVM_DIRTY_LOG_INITIALLY_SET if manual else 0)
    if enable.arg0 & ~allowed:
        raise KvmError(EINVAL, f"manual dirty log protection {enable.arg0:#x}")
    slots = memslots.of(vm)
    slots.manual_protect = bool(manual)
    slots.initially_set = bool(enable.arg0 & caps.KVM_DIRTY_LOG_INITIALLY_SET)
    return 0


@handles(VmFile, KVM_GET_DIRTY_LOG)
def get_dirty_log(vm: Vm, call: Call) -> int:
    """Copy a slot's bitmap out and, unless clearing is manual, start it anew."""
    data = call.read(KVM_DIRTY_LOG.size_bytes)
    slot, dirty = _logged(vm, KVM_DIRTY_LOG.get(data, "slot"))
    copy_to_user(call.client, KVM_DIRTY_LOG.get(data, "dirty_bitmap"), bytes(dirty))
    if not memslots.of(vm).manual_protect:
        slot.dirty = bytearray(len(dirty))
    return 0


@handles(VmFile, KVM_CLEAR_DIRTY_LOG)
def clear_dirty_log(vm: Vm, call: Call) -> int:
    """Clear the bits given, from a page on that is a multiple of 64."""
    data = call.read(CLEAR_DIRTY_LOG_STRUCT.size_bytes)
    get = CLEAR_DIRTY_LOG_STRUCT.get
    first, count = get(data, "first_page"), get(data, "num_pages")
    if first % LONG_BITS:
        raise KvmError(EINVAL, "first_page is a multiple of 64")
    slot, dirty = _logged(vm, get(data, "slot"))
    rest = slot.nr_pages - first
    if rest < 0 or count > rest or (count < rest and count % LONG_BITS):
        raise KvmError(EINVAL, f"{count} pages from {first} on")
    size_bytes = memslots.bitmap_bytes(count)
    wanted = copy_from_user(call.client, get(data, "dirty_bitmap"), size_bytes)
    at = first // 8
    for index, bits in enumerate(wanted):
        dirty[at + index] &= ~bits & 0xFF
    return 0


def _logged(vm: Vm, number: int) -> tuple[Slot, bytearray]:
    """A slot whose writes are logged, and its bitmap."""
    if number >> 16 or (number & 0xFFFF) >= caps.KVM_USER_MEM_SLOTS:
        raise KvmError(EINVAL, f"slot {number:#x}")
    slot = memslots.of(vm).slots.get(number)
    if slot is None or slot.dirty is None:
        raise KvmError(ENOENT, f"slot {number} is not logged")
    slot.note_written()
    return slot, slot.dirty
