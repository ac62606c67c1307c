"""What an encrypted guest sees of its memory: plain bytes, where user space sees encrypted ones.

Memory is encrypted in place by the commands that load a guest. From then on those pages have two
sides. A guest that executes code works on plain pages kept here; before the next command of user
space looks at its memory, what the guest changed goes back, encrypted.

MODEL: on hardware a bit of the guest's page tables says page by page which side an access is to.
Here it is the page that is one or the other for good: every access of the guest to a page that was
encrypted is to plain bytes, every access to another page is to what user space has there. What user
space sees of an encrypted page is as of the last command.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from kvmsim.errors import KvmError
from kvmsim.kvm import memslots
from kvmsim.kvm.sev_command import CHUNK_BYTES, PAGE_BYTES, firmware_of, info

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsim.kvm.vm import Vm
    from kvmsim.sev.memory_key import MemoryKey


def add(vm: Vm, address: int, length: int) -> None:
    """Memory of user space was encrypted for a guest."""
    sev = info(_owner(vm))
    start, end = address & -PAGE_BYTES, -(-(address + length) // PAGE_BYTES) * PAGE_BYTES
    kept = []
    for first, last in sev.private:
        if last < start or end < first:
            kept.append((first, last))
        else:
            start, end = min(start, first), max(end, last)
    sev.private = sorted([*kept, (start, end)])
    _changed(vm)


def settle(vm: Vm) -> None:
    """User space is about to look, or to encrypt more: what the guest changed is written back."""
    owner = _owner(vm)
    sev = info(owner)
    key = _key(owner)
    plain, sev.plain = sev.plain, {}
    if not plain or key is None:
        return
    for start, pages in plain.items():
        for at in range(0, len(pages), CHUNK_BYTES):
            _write_back(owner, key, start + at, pages[at : at + CHUNK_BYTES])
    _changed(vm)


def sides(vm: Vm, hva: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """What a guest sees at some memory of user space, part by part, as (offset, bytes).

    Args:
        vm: the VM.
        hva: where user space has it.
        view: what it has there.
    """
    at, end = hva, hva + len(view)
    for start, stop in info(_owner(vm)).private:
        begin, finish = max(at, start), min(end, stop)
        if begin >= finish:
            continue
        if at < begin:
            yield at - hva, view[at - hva : begin - hva]
        yield begin - hva, memoryview(_plain(vm, start, stop))[begin - start : finish - start]
        at = finish
    if at < end:
        yield at - hva, view[at - hva :]


def _owner(vm: Vm) -> Vm:
    """Whose guest it is: a mirror has another VM's."""
    return info(vm).owner or vm


def _key(vm: Vm) -> MemoryKey | None:
    guest = firmware_of(vm).guests.get(info(vm).handle)
    return None if guest is None else guest.memory_key


def _changed(vm: Vm) -> None:
    """Whoever remembers what is behind the slots has to look again."""
    owner = _owner(vm)
    for one in (owner, *info(owner).mirrors):
        memslots.of(one).generation += 1


def _plain(vm: Vm, start: int, stop: int) -> mmap.mmap:
    """The plain side of a range; pages user space took away are zero."""
    owner = _owner(vm)
    known = info(owner).plain
    pages = known.get(start)
    if pages is None:
        pages = known[start] = mmap.mmap(-1, stop - start)
        key = _key(owner)
        for at in range(start, stop, CHUNK_BYTES):
            size = min(CHUNK_BYTES, stop - at)
            try:
                data = vm.creator.read(at, size)
            except KvmError:
                continue
            pages[at - start : at - start + size] = data if key is None else key.apply(at, data)
    return pages


def _write_back(vm: Vm, key: MemoryKey, address: int, plain: bytes) -> None:
    """Encrypt the pages that differ from what user space has."""
    try:
        before = vm.creator.read(address, len(plain))
        now = key.apply(address, plain)
        if now == before:
            return
        for at in range(0, len(now), PAGE_BYTES):
            if now[at : at + PAGE_BYTES] != before[at : at + PAGE_BYTES]:
                vm.creator.write(address + at, now[at : at + PAGE_BYTES])
    except KvmError:
        # Unmapped by now: then there is nobody to see it.
        return
