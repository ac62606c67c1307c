"""The memory of a client's VM, where guest code executes in this process.

The slots of a VM are brought up to date when one of its vCPUs is about to enter the guest and they
have changed: a client that makes and drops many of them in between, as QEMU does at start, pays
once. Whoever is in KVM_RUN then has its private pages replaced by shared ones and makes its call
again without noticing (``kvmsim.interpose.remap``). What cannot be shared is copied: in when a
vCPU is let execute, and back what the guest changed when it has stopped.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmsim.errors import KvmError
from kvmsim.interpose import maps, memory
from kvmsim.interpose.client_memory import map_shared
from kvmsim.interpose.remap import NAME, Range
from kvmsim.kvm import memslots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping

    from kvmsim.interpose.maps import Mapping
    from kvmsim.interpose.remap import Remap, Replaced
    from kvmsim.kvm.memslots import Slot
    from kvmsim.kvm.vm import Vm

SHARED: Final = "shared"
COPIED: Final = "copied"

TRIES: Final = 4
"""How often to begin replacing pages before they are copied."""

PAGE_BYTES: Final = 4096
_COMPARED_AT_ONCE: Final = 1 << 16
_GRAIN_BYTES: Final = 64
"""What a guest changed is written back in pieces of this size: a client that writes next to it
at the same time loses nothing."""

_OURS: Final = f"/memfd:{NAME} (deleted)"
_NEVER_REPLACED: Final = ("[stack", "[v")


class Copy:
    """Pages that are copied.

    Args:
        pid: the client.
        address: of the range in its memory.
        size_bytes: of the range.
    """

    __slots__ = ("_address", "_known", "_pid", "pages")

    def __init__(self, pid: int, address: int, size_bytes: int) -> None:
        self.pages = mmap.mmap(-1, size_bytes)
        self._known = bytes(size_bytes)
        self._pid = pid
        self._address = address

    def bring(self) -> None:
        """Take what the client has there."""
        size_bytes = len(self.pages)
        memory.read_into(self._pid, self._address, self.pages, 0, size_bytes)
        self._known = self.pages[:]

    def take_back(self) -> None:
        """Give the client what the guest has changed; KvmError EFAULT when it cannot be written."""
        before, now = self._known, self.pages[:]
        self._known = now
        if before == now:
            return
        for start in range(0, len(now), _COMPARED_AT_ONCE):
            end = start + _COMPARED_AT_ONCE
            for offset in _changed(before[start:end], now[start:end]):
                at = start + offset
                memory.write(self._pid, self._address + at, now[at : at + _GRAIN_BYTES])


@dataclass(slots=True)
class Stretch:
    """Pages of a slot that are behind one mapping of the client.

    Attributes:
        offset: in the slot.
        address: in the client.
        size_bytes: of it.
        mapping: what they are in.
    """

    offset: int
    address: int
    size_bytes: int
    mapping: Mapping


class GuestMemory:
    """Memory of one VM.

    Args:
        vm: the VM.
        shared: pages that took the place of clients', of all VMs, by the inode of their memfd: two
            VMs may have the same ones.
    """

    __slots__ = ("_copies", "_generation", "_lent", "_ours", "_shared", "_tries", "_vm")

    def __init__(self, vm: Vm, shared: MutableMapping[int, mmap.mmap]) -> None:
        self._vm = vm
        self._shared = shared
        self._tries = 0
        self._generation = -1
        self._lent = False
        self._ours: dict[int, mmap.mmap] = {}
        self._copies: dict[tuple[int, int], Copy] = {}

    @property
    def is_current(self) -> bool:
        """Whether the slots are the same as at the last look."""
        return memslots.of(self._vm).generation == self._generation

    @property
    def is_copied(self) -> bool:
        """Whether some of it has to be copied at each entry and exit."""
        return bool(self._copies)

    def how(self) -> dict[str, int]:
        """How many bytes are reached in each way."""
        sizes = {SHARED: 0, COPIED: 0}
        copies = {id(copy.pages) for copy in self._copies.values()}
        for slot in memslots.of(self._vm).slots.values():
            for _, view in slot.pages or ():
                copied = id(view.obj) in copies
                sizes[COPIED if copied else SHARED] += len(view)
        return sizes

    def update(self, pid: int, text: Callable[[], str], remap: Remap | None) -> bool:
        """Find the pages of every slot that is new.

        Where replacing pages was begun and did not work out, the slots are to be looked at again
        at the client's next call; after ``TRIES`` of them pages are copied.

        Args:
            pid: the client.
            text: of its /proc/PID/maps.
            remap: replaces private pages, which answers the client's call; None: copy them.

        Returns:
            Whether they were found.
        """
        slots = memslots.of(self._vm)
        new = [slot for slot in slots.slots.values() if slot.pages is None]
        stretches: dict[int, list[Stretch]] = {}

        def find() -> list[Range]:
            mappings = list(maps.parse(text()))
            stretches.update((slot.number, list(_stretches(mappings, slot))) for slot in new)
            return self._private(stretches)

        replaced = remap(find) if find() and remap is not None else None
        if replaced is not None:
            self._ours[replaced.inode] = replaced.pages
            self._shared[replaced.inode] = replaced.pages
        elif remap is not None and remap.answered:
            self._tries += 1
            if self._tries % TRIES:
                return False
        for slot in new:
            slot.pages = tuple(self._pages(pid, stretches[slot.number], replaced))
        self._generation = slots.generation
        self._forget_copies()
        return True

    def bring(self) -> None:
        """Copy in, before guest code executes. What the client took away stays as it was."""
        self.take_back()
        self._lent = True
        for copy in self._copies.values():
            _as_far_as_possible(copy.bring)

    def take_back(self, *, executing: bool = False) -> None:
        """Copy out, after guest code has executed, or while it does. Nothing if it has not."""
        if not self._lent:
            return
        self._lent = executing
        for copy in self._copies.values():
            _as_far_as_possible(copy.take_back)

    def close(self) -> None:
        """The VM is gone."""
        for slot in memslots.of(self._vm).slots.values():
            slot.pages = None
        self._ours.clear()
        self._copies.clear()

    def _private(self, stretches: dict[int, list[Stretch]]) -> list[Range]:
        """What there is to replace."""
        return _private(
            stretch
            for found in stretches.values()
            for stretch in found
            if self._must_be_replaced(stretch.mapping)
        )

    def _known(self, mapping: Mapping) -> mmap.mmap | None:
        """The pages behind a mapping, if they took the place of the client's."""
        if mapping.name != _OURS:
            return None
        pages = self._shared.get(mapping.inode)
        if pages is not None:
            self._ours[mapping.inode] = pages
        return pages

    def _must_be_replaced(self, mapping: Mapping) -> bool:
        if mapping.name.startswith(_NEVER_REPLACED):
            return False
        if mapping.shared:
            # Ours once, let go of meanwhile; there is no other way to them.
            return mapping.name == _OURS and self._known(mapping) is None
        return True

    def _pages(
        self, pid: int, stretches: list[Stretch], replaced: Replaced | None
    ) -> Iterator[tuple[int, memoryview]]:
        for stretch in stretches:
            view = self._view(pid, stretch, replaced)
            yield stretch.offset, view[: stretch.size_bytes]

    def _view(self, pid: int, stretch: Stretch, replaced: Replaced | None) -> memoryview:
        address, size_bytes, mapping = stretch.address, stretch.size_bytes, stretch.mapping
        if replaced is not None:
            for part, base in replaced.done.items():
                if part.address <= address and address + size_bytes <= part.end:
                    return memoryview(replaced.pages)[base + address - part.address :]
        if mapping.shared:
            pages = self._known(mapping)
            if pages is not None:
                return memoryview(pages)[mapping.offset + address - mapping.start :]
            pages = map_shared(pid, mapping, address, size_bytes)
            if pages is not None:
                return memoryview(pages)
        key = (address, size_bytes)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = Copy(pid, address, size_bytes)
        return memoryview(copy.pages)

    def _forget_copies(self) -> None:
        used = {
            id(view.obj)
            for slot in memslots.of(self._vm).slots.values()
            for _, view in slot.pages or ()
        }
        self._copies = {key: copy for key, copy in self._copies.items() if id(copy.pages) in used}


def _stretches(mappings: list[Mapping], slot: Slot) -> Iterator[Stretch]:
    """What is mapped of a slot, mapping by mapping."""
    end = slot.hva + slot.size_bytes
    index = bisect_right(mappings, slot.hva, key=lambda mapping: mapping.start) - 1
    for mapping in mappings[max(index, 0) :]:
        if mapping.start >= end:
            return
        start, stop = max(mapping.start, slot.hva), min(mapping.end, end)
        if start < stop and mapping.readable:
            yield Stretch(start - slot.hva, start, stop - start, mapping)


def _private(stretches: Iterator[Stretch]) -> list[Range]:
    """The private pages among them; slots may show the same ones."""
    ranges: list[Range] = []
    for stretch in sorted(stretches, key=lambda stretch: stretch.address):
        mapping = stretch.mapping
        start, end = stretch.address, stretch.address + stretch.size_bytes
        if ranges:
            last = ranges[-1]
            if start < last.end:  # then they lie in one mapping
                start = last.address
                end = max(end, last.end)
                ranges.pop()
        ranges.append(
            Range(
                start,
                end - start,
                mapping.readable,
                mapping.writable,
                mapping.executable,
                not mapping.inode,
            )
        )
    return ranges


def _changed(before: bytes, now: bytes) -> Iterator[int]:
    """Offsets of what differs, by grain."""
    if before == now:
        return
    for page in range(0, len(now), PAGE_BYTES):
        if before[page : page + PAGE_BYTES] == now[page : page + PAGE_BYTES]:
            continue
        for at in range(page, page + PAGE_BYTES, _GRAIN_BYTES):
            if before[at : at + _GRAIN_BYTES] != now[at : at + _GRAIN_BYTES]:
                yield at


def _as_far_as_possible(function: Callable[[], None]) -> None:
    try:
        function()
    except KvmError:
        # The client has unmapped it, or made it read-only; KVM_RUN would fail with EFAULT there.
        return
