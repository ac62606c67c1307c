"""KVM_X86_SET_MSR_FILTER: which registers the guest itself may access.

User space's own KVM_GET_MSRS and KVM_SET_MSRS pass every filter. Whoever executes the guest asks
:func:`allows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING

from kvmsim.abi.ioctls import KVM_X86_SET_MSR_FILTER
from kvmsim.abi.structs import (
    KVM_MSR_FILTER,
    KVM_MSR_FILTER_DEFAULT_DENY,
    KVM_MSR_FILTER_MAX_BITMAP_SIZE,
    KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_RANGE,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import memslots
from kvmsim.kvm.client import copy_from_user
from kvmsim.kvm.dispatch import VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

_RANGES_OFFSET = 8
_X2APIC = range(0x800, 0x900)


@dataclass(frozen=True, slots=True)
class Range:
    """Some registers in a row.

    Attributes:
        flags: accesses it decides about, ``KVM_MSR_FILTER_READ`` and ``_WRITE``.
        base: the first register.
        count: how many.
        bitmap: 1 allows, 0 denies.
    """

    flags: int
    base: int
    count: int
    bitmap: bytes


class MsrFilter:
    """The filter of one VM; none at first.

    Attributes:
        ranges: looked through in order.
        default_allow: what holds for registers in no range.
    """

    __slots__ = ("default_allow", "ranges")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.ranges: tuple[Range, ...] = ()
        self.default_allow = True


def allows(vm: Vm, index: int, *, write: bool) -> bool:
    """Whether a guest may read or write a register; x2APIC's are never filtered."""
    if index in _X2APIC:
        return True
    access = KVM_MSR_FILTER_WRITE if write else KVM_MSR_FILTER_READ
    current = state_of(vm, MsrFilter)
    for part in current.ranges:
        position = index - part.base
        if 0 <= position < part.count and part.flags & access:
            return bool(part.bitmap[position // 8] >> position % 8 & 1)
    return current.default_allow


@handles(VmFile, KVM_X86_SET_MSR_FILTER)
def set_msr_filter(vm: Vm, call: Call) -> int:
    """Replace the filter."""
    data = call.read(KVM_MSR_FILTER.size_bytes)
    flags = KVM_MSR_FILTER.get(data, "flags")
    if flags & ~KVM_MSR_FILTER_DEFAULT_DENY:
        raise KvmError(EINVAL, "flags of KVM_X86_SET_MSR_FILTER")
    size = KVM_MSR_FILTER_RANGE.size_bytes
    raw = [
        data[_RANGES_OFFSET + number * size : _RANGES_OFFSET + (number + 1) * size]
        for number in range(KVM_MSR_FILTER_MAX_RANGES)
    ]
    raw = [part for part in raw if KVM_MSR_FILTER_RANGE.get(part, "nmsrs")]
    if not raw and flags & KVM_MSR_FILTER_DEFAULT_DENY:
        raise KvmError(EINVAL, "a filter that denies everything")
    ranges = tuple(_range(call, part) for part in raw)
    current = state_of(vm, MsrFilter)
    current.ranges = ranges
    current.default_allow = not flags & KVM_MSR_FILTER_DEFAULT_DENY
    return 0


def _range(call: Call, raw: bytes) -> Range:
    get = KVM_MSR_FILTER_RANGE.get
    flags, count = get(raw, "flags"), get(raw, "nmsrs")
    size_bytes = memslots.bitmap_bytes(count)
    if not flags or flags & ~(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE):
        raise KvmError(EINVAL, f"flags {flags:#x} of a range")
    if size_bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE:
        raise KvmError(EINVAL, f"{count} MSRs in a range")
    bitmap = copy_from_user(call.client, get(raw, "bitmap"), size_bytes)
    return Range(flags, get(raw, "base"), count, bitmap)
