"""Guest-physical memory: slots of user memory, and reading through them.

Order of the checks: kvm.md F.2 (Linux 6.12 ``__kvm_set_memory_region``). It is part of the ABI.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from errno import EEXIST, EFAULT, EINVAL
from typing import TYPE_CHECKING, Protocol

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2
from kvmsim.abi.memory import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_USERSPACE_MEMORY_REGION,
    KVM_USERSPACE_MEMORY_REGION2,
    PAGE_SIZE,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, guest_memfd
from kvmsim.kvm.dispatch import VmFile, handles, state_of

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.vm import Vm

#: First address beyond user space, with four-level paging.
USER_END = 1 << 47
#: KVM_MEM_MAX_NR_PAGES: a slot's pages are counted in 31 bits.
MAX_PAGES = (1 << 31) - 1
LONG_BITS = 64


class GuestMemory(Protocol):
    """Reads what a guest has in its memory."""

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy from guest-physical memory.

        Raises:
            KvmError: EFAULT, some of it is behind no slot, or user space took it away.
        """


@dataclass(slots=True)
class Slot:
    """One piece of user memory shown to the guest.

    Attributes:
        number: slot number, 0 to 32763.
        gpa: where the guest sees it.
        size_bytes: its size.
        hva: where it is in the VMM's memory.
        flags: ``KVM_MEM_*``.
        guest_memfd: what holds its private pages, None without.
        guest_memfd_offset: where in that.
        dirty: one bit per page written since the last look; None: not logged.
        written: a byte per page, and one more, that becomes 1 when guest code writes there: not in
            ``dirty`` yet. None: no code has executed since it is logged.
        pages: its pages where this process reaches them, as (offset, writable view), by offset and
            on page boundaries; what is between them is not there. None: nobody has looked for them.
    """

    number: int
    gpa: int
    size_bytes: int
    hva: int
    flags: int = 0
    guest_memfd: guest_memfd.GuestMemfd | None = None
    guest_memfd_offset: int = 0
    dirty: bytearray | None = None
    written: bytearray | None = None
    pages: tuple[tuple[int, memoryview], ...] | None = None

    @property
    def nr_pages(self) -> int:
        """Its size in pages."""
        return self.size_bytes // PAGE_SIZE

    def log_written(self) -> memoryview | None:
        """Where guest code is to note the pages it writes; None: they are not logged."""
        if self.dirty is None:
            return None
        if self.written is None:
            self.written = bytearray(self.nr_pages + 1)
        return memoryview(self.written)

    def has_page(self, gpa: int) -> bool:
        """Whether there is memory behind an address of it, as far as anybody has looked."""
        offset = gpa - self.gpa
        return self.pages is None or any(
            start <= offset < start + len(view) for start, view in self.pages
        )

    def note_written(self) -> None:
        """Enter what guest code has written in the log. Not while it executes."""
        written, dirty = self.written, self.dirty
        if written is None or dirty is None:
            return
        page = written.find(1)
        while 0 <= page < self.nr_pages:
            dirty[page // 8] |= 1 << page % 8
            page = written.find(1, page + 1)
        written[:] = bytes(len(written))

    def overlaps(self, other: Slot) -> bool:
        """Whether two slots claim one address."""
        return self.gpa < other.gpa + other.size_bytes and other.gpa < self.gpa + self.size_bytes


class Memslots:
    """The slots of one VM. No two of them overlap.

    Attributes:
        slots: by number.
        manual_protect: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading a log does not clear it.
        initially_set: a log starts with every page dirty.
        generation: grows with every change; whoever caches what a slot is looks here.
    """

    __slots__ = ("_by_gpa", "_starts", "generation", "initially_set", "manual_protect", "slots")

    def __init__(self, vm: Vm) -> None:
        del vm
        self.slots: dict[int, Slot] = {}
        # The same by address: a VM may have 32,764 of them.
        self._starts: list[int] = []
        self._by_gpa: list[Slot] = []
        self.manual_protect = False
        self.initially_set = False
        self.generation = 0

    def find(self, gpa: int) -> Slot | None:
        """The slot behind an address."""
        index = bisect_right(self._starts, gpa) - 1
        if index < 0:
            return None
        slot = self._by_gpa[index]
        return slot if gpa < slot.gpa + slot.size_bytes else None

    def in_the_way(self, new: Slot) -> Slot | None:
        """A slot of another number that claims an address of a new one."""
        index = max(bisect_right(self._starts, new.gpa) - 1, 0)
        # Its predecessor, itself if it moves, and the next one: more cannot be before a verdict.
        for other in self._by_gpa[index : index + 3]:
            if other.number != new.number and other.overlaps(new):
                return other
        return None

    def put(self, slot: Slot) -> None:
        """A slot is new or other than it was."""
        if slot.number in self.slots:
            self._take(slot.number)
        index = bisect_right(self._starts, slot.gpa)
        self._starts.insert(index, slot.gpa)
        self._by_gpa.insert(index, slot)
        self.slots[slot.number] = slot
        self.generation += 1

    def remove(self, number: int) -> None:
        """A slot is deleted."""
        self._take(number)
        self.generation += 1

    def _take(self, number: int) -> None:
        index = bisect_right(self._starts, self.slots.pop(number).gpa) - 1
        del self._starts[index]
        del self._by_gpa[index]

    def is_torn(self, gpa: int) -> bool:
        """Whether an address is in a slot, but its VMM has no memory there.

        If so, it is looked for again before the guest is entered once more.
        """
        slot = self.find(gpa)
        if slot is None or slot.has_page(gpa):
            return False
        slot.pages = None
        self.generation += 1
        return True

    def mark_dirty(self, gpa: int, size_bytes: int = 1) -> None:
        """The guest wrote there."""
        for page in range(gpa // PAGE_SIZE, (gpa + size_bytes - 1) // PAGE_SIZE + 1):
            slot = self.find(page * PAGE_SIZE)
            if slot is not None and slot.dirty is not None:
                index = page - slot.gpa // PAGE_SIZE
                slot.dirty[index // 8] |= 1 << index % 8


class SlotMemory:
    """Reads through the slots from the memory of the VM's creator.

    Args:
        vm: whose memory.
    """

    __slots__ = ("_vm",)

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """See :meth:`GuestMemory.read`."""
        memslots = of(self._vm)
        data = b""
        while len(data) < size_bytes:
            at = gpa + len(data)
            slot = memslots.find(at)
            if slot is None:
                raise KvmError(EFAULT, f"no memory at guest address {at:#x}")
            offset = at - slot.gpa
            length = min(size_bytes - len(data), slot.size_bytes - offset)
            data += self._vm.creator.read(slot.hva + offset, length)
        return data


def of(vm: Vm) -> Memslots:
    """The slots of a VM."""
    return state_of(vm, Memslots)


def bitmap_bytes(nr_pages: int) -> int:
    """Size of a dirty bitmap: whole longs."""
    return (nr_pages + LONG_BITS - 1) // LONG_BITS * (LONG_BITS // 8)


@handles(VmFile, KVM_SET_USER_MEMORY_REGION)
def set_user_memory_region(vm: Vm, call: Call) -> int:
    """Make, change, move or delete a slot."""
    data = call.read(KVM_USERSPACE_MEMORY_REGION.size_bytes)
    if _get(data, "flags") & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
        raise KvmError(EINVAL, "flags of a memory region")
    _set(vm, call, data)
    return 0


@handles(VmFile, KVM_SET_USER_MEMORY_REGION2)
def set_user_memory_region2(vm: Vm, call: Call) -> int:
    """The same, with private pages behind a guest_memfd."""
    _set(vm, call, call.read(KVM_USERSPACE_MEMORY_REGION2.size_bytes))
    return 0


def _get(data: bytes, name: str) -> int:
    return KVM_USERSPACE_MEMORY_REGION2.get(data, name)


def _set(vm: Vm, call: Call, data: bytes) -> None:
    """Check a region's own values, then against the slot it replaces."""
    slot = _slot(vm, data)
    flags = slot.flags
    _check(slot)
    memslots = of(vm)
    old = memslots.slots.get(slot.number)
    if slot.size_bytes == 0:
        if old is None:
            raise KvmError(EINVAL, f"no slot {slot.number}")
        if old.guest_memfd is not None:
            del old.guest_memfd.bound[slot.number]
        memslots.remove(slot.number)
        return
    if old is not None and not _changes(old, slot):
        return
    if old is None or slot.gpa != old.gpa:
        _place(vm, memslots, slot)
    if flags & KVM_MEM_GUEST_MEMFD:
        slot.guest_memfd = guest_memfd.bind(vm, call.client, slot, _get(data, "guest_memfd"))
    elif old is not None and flags & old.flags & KVM_MEM_LOG_DIRTY_PAGES:
        slot.dirty, slot.written = old.dirty, old.written
    _install(memslots, slot)


def _slot(vm: Vm, data: bytes) -> Slot:
    """The slot a region describes; KvmError EINVAL for flags that do not exist or go together."""
    flags = _get(data, "flags")
    if flags & KVM_MEM_GUEST_MEMFD:
        # Private pages can be neither read-only nor logged (6.12).
        valid = KVM_MEM_GUEST_MEMFD if guest_memfd.has_private_memory(vm) else 0
    else:
        valid = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
    if flags & ~valid:
        raise KvmError(EINVAL, f"flags {flags:#x} of a memory region")
    return Slot(
        number=_get(data, "slot"),
        gpa=_get(data, "guest_phys_addr"),
        size_bytes=_get(data, "memory_size"),
        hva=_get(data, "userspace_addr"),
        flags=flags,
        guest_memfd_offset=_get(data, "guest_memfd_offset") if flags & KVM_MEM_GUEST_MEMFD else 0,
    )


def _check(slot: Slot) -> None:
    """What is wrong with a region whatever the others are."""
    space, slot.number = slot.number >> 16, slot.number & 0xFFFF
    unaligned = (slot.size_bytes | slot.gpa | slot.hva) % PAGE_SIZE
    if unaligned or slot.size_bytes >= 1 << 63:
        raise KvmError(EINVAL, "a memory region is made of pages")
    if slot.hva + slot.size_bytes > USER_END:
        raise KvmError(EINVAL, f"{slot.hva:#x} is no address of a program")
    if slot.flags & KVM_MEM_GUEST_MEMFD and (
        slot.guest_memfd_offset % PAGE_SIZE or slot.guest_memfd_offset + slot.size_bytes >= 1 << 64
    ):
        raise KvmError(EINVAL, "offset into the guest_memfd")
    if space or slot.number >= caps.KVM_USER_MEM_SLOTS:
        raise KvmError(EINVAL, f"slot {slot.number} of address space {space}")
    if slot.gpa + slot.size_bytes >= 1 << 64:
        raise KvmError(EINVAL, "a memory region wraps")
    if slot.nr_pages > MAX_PAGES:
        raise KvmError(EINVAL, "too many pages")


def _place(vm: Vm, memslots: Memslots, slot: Slot) -> None:
    """Refuse a place that is taken or beyond what the guest can address."""
    if other := memslots.in_the_way(slot):
        raise KvmError(EEXIST, f"slot {other.number} is there")
    if slot.gpa + slot.size_bytes > 1 << cpuid.physical_bits(vm.machine):
        raise KvmError(EINVAL, f"{slot.gpa:#x} is beyond the guest-physical width")


def _changes(old: Slot, new: Slot) -> bool:
    """Whether a slot moves or changes its flags; nothing else of it can change in its life."""
    private = (old.flags | new.flags) & KVM_MEM_GUEST_MEMFD
    changed = (old.flags ^ new.flags) & KVM_MEM_READONLY
    if private or changed or new.size_bytes != old.size_bytes or new.hva != old.hva:
        raise KvmError(EINVAL, f"slot {old.number} cannot be changed so")
    return (new.gpa, new.flags) != (old.gpa, old.flags)


def _install(memslots: Memslots, slot: Slot) -> None:
    """Put a slot in place; logging starts with a clean or a full bitmap."""
    if slot.flags & KVM_MEM_LOG_DIRTY_PAGES and slot.dirty is None:
        slot.dirty = bytearray(bitmap_bytes(slot.nr_pages))
        if memslots.initially_set:
            full, rest = divmod(slot.nr_pages, 8)
            slot.dirty[:full] = b"\xff" * full
            if rest:
                slot.dirty[full] = (1 << rest) - 1
    memslots.put(slot)
