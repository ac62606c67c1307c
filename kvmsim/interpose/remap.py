"""Replacing a client's private memory by pages this process shares.

While a thread of the client waits for the answer to KVM_RUN, all its other threads are stopped,
what is in the memory is copied into a memfd, the call is answered, and before the thread gets back
to its program it is made to map the memfd over the old pages and to make its call again. No write
is lost: nobody runs meanwhile. Threads that wait for answers of their own stay as they are, they
cannot run either.

Takes the right to trace the client, and that nobody traces it already; else nothing is changed.
A child of the client shares these pages afterwards instead of getting a copy at its first write,
and giving pages back with madvise(2) does not empty them.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from errno import EBUSY
from typing import TYPE_CHECKING, Final

from kvmsim.errors import KvmError
from kvmsim.interpose import memory
from kvmsim.interpose.filter import NR_IOCTL
from kvmsim.interpose.ptrace import Tracee
from kvmsim.interpose.signals import pending

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

NAME: Final = "kvm-guest-memory"
"""What /proc/PID/maps shows of replaced pages, behind ``/memfd:``."""

_NR_MMAP: Final = 9
_NR_CLOSE: Final = 3
_MAP_FIXED: Final = 0x10
_ROUNDS: Final = 10
_PAGE_BYTES: Final = 4096
_PRESENT_OR_SWAPPED: Final = 0b11 << 62
_PAGES_AT_ONCE: Final = 1 << 14

#: States of threads that have ended: a first thread stays until the others have.
_ENDED: Final = (b"Z", b"X", b"")


@dataclass(frozen=True, slots=True)
class Range:
    """Private pages of a client, within one mapping.

    Attributes:
        address: of the first.
        size_bytes: of all.
        readable: how they are mapped.
        writable: likewise.
        executable: likewise.
        anonymous: no file is behind them: pages not there yet are zero.
    """

    address: int
    size_bytes: int
    readable: bool
    writable: bool
    executable: bool
    anonymous: bool

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.address + self.size_bytes


@dataclass(frozen=True, slots=True)
class Replaced:
    """The pages that take the place of the client's.

    Attributes:
        pages: all of them, range after range.
        inode: of the memfd, as the client's mappings show it.
        done: where in them each range is that was replaced; the rest stayed as it was.
    """

    pages: mmap.mmap
    inode: int
    done: Mapping[Range, int]


@dataclass(frozen=True, slots=True)
class _Filled:
    """Pages that hold what the client's do.

    Attributes:
        ranges: where those are.
        pages: all of them, range after range.
        installed: number of their memfd in the client.
    """

    ranges: Sequence[Range]
    pages: mmap.mmap
    installed: int


class Remap:
    """One replacement, for a thread that waits for its answer.

    Args:
        pid: the client.
        thread: the waiting thread.
        waiting: further threads that wait for an answer.
        install: gives the waiting thread a copy of a descriptor; its number there.
        answer: answers the call.
        interrupted: the call is not made again: its caller hears of a signal.

    Attributes:
        answered: the call is answered, whether or not pages were replaced.
    """

    def __init__(
        self,
        pid: int,
        thread: int,
        waiting: Collection[int],
        install: Callable[[int], int],
        answer: Callable[[], object],
        interrupted: Callable[[], None],
    ) -> None:
        self.answered = False
        self._pid = pid
        self._thread = thread
        self._waiting = waiting
        self._install = install
        self._answer = answer
        self._interrupted = interrupted

    def __call__(self, find: Callable[[], Sequence[Range]]) -> Replaced | None:
        """Replace ranges; None if that cannot be done.

        Args:
            find: finds them, once nobody can change them any more.
        """
        if self._stuck_threads():
            return None
        memfd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        others: dict[int, Tracee] = {}
        repeated = False
        try:
            others[self._thread] = caller = Tracee(self._thread)
            filled = self._prepare(others, find, memfd)
            # It stops on its way back from the call, so that takes the answer in any case.
            caller.interrupt()
            self._answer()
            self.answered = True
            caller.wait()
            if filled is not None and caller.has_signal:
                filled = None  # nothing else may be made of this stop
            done = {} if filled is None else _map(caller, filled.ranges, filled.installed)
            if not caller.has_signal and not pending(_text(self._thread, "status")):
                caller.repeat(NR_IOCTL)
                repeated = True
            if filled is None:
                return None
            return Replaced(filled.pages, os.fstat(memfd).st_ino, done)
        except OSError:
            return None
        finally:
            os.close(memfd)
            if self.answered and not repeated:
                self._interrupted()
            for thread in others.values():
                thread.detach()

    def _prepare(
        self, others: dict[int, Tracee], find: Callable[[], Sequence[Range]], memfd: int
    ) -> _Filled | None:
        """Stop everybody else and copy; None if that failed."""
        try:
            self._stop_others(others)
            ranges = find()
            if not ranges:
                return None
            os.ftruncate(memfd, sum(part.size_bytes for part in ranges))
            pages = mmap.mmap(memfd, 0)
            base = 0
            for part in ranges:
                for offset, size_bytes in self._filled(part):
                    address = part.address + offset
                    memory.read_into(self._thread, address, pages, base + offset, size_bytes)
                base += part.size_bytes
            return _Filled(ranges, pages, self._install(memfd))
        except (OSError, KvmError):
            return None

    def _filled(self, part: Range) -> Iterator[tuple[int, int]]:
        if part.anonymous:
            return _filled(self._thread, part.address, part.size_bytes)
        return iter([(0, part.size_bytes)])

    def _stop_others(self, others: dict[int, Tracee]) -> None:
        """Stop every thread that could run; OSError when new ones keep coming."""
        ended: set[int] = set()
        for _ in range(_ROUNDS):
            new = [
                number
                for number in self._threads()
                if number not in others and number not in ended and number not in self._waiting
            ]
            if not new:
                return
            for number in new:
                try:
                    others[number] = thread = Tracee(number)
                    thread.interrupt()
                    thread.wait()
                except ProcessLookupError:
                    others.pop(number, None)
                except PermissionError:
                    if _state(number) not in _ENDED:
                        raise
                    ended.add(number)
        raise BlockingIOError(EBUSY, "the client makes threads faster than they are stopped")

    def _stuck_threads(self) -> bool:
        """Whether some thread waits uninterruptibly, and not for us."""
        for number in self._threads():
            if number != self._thread and number not in self._waiting and _state(number) == b"D":
                return True
        return False

    def _threads(self) -> list[int]:
        try:
            names = os.listdir(f"/proc/{self._pid}/task")  # noqa: PTH208 - names are all we want
        except OSError:
            return []
        return [int(name) for name in names]


def _map(caller: Tracee, ranges: Sequence[Range], installed: int) -> dict[Range, int]:
    """Map the new pages over the old ones; what was done of it."""
    done: dict[Range, int] = {}
    offset = 0
    for part in ranges:
        protection = (
            mmap.PROT_READ * part.readable
            | mmap.PROT_WRITE * part.writable
            | mmap.PROT_EXEC * part.executable
        )
        flags = mmap.MAP_SHARED | _MAP_FIXED
        address = part.address
        mapped = caller.call(
            _NR_MMAP, address, part.size_bytes, protection, flags, installed, offset
        )
        if mapped == address:
            done[part] = offset
        offset += part.size_bytes
    caller.call(_NR_CLOSE, installed)
    return done


def _filled(thread: int, address: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that hold something: (offset, bytes)."""
    pagemap = os.open(f"/proc/{thread}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first in range(0, size_bytes // _PAGE_BYTES, _PAGES_AT_ONCE):
            nr_pages = min(_PAGES_AT_ONCE, size_bytes // _PAGE_BYTES - first)
            data = os.pread(pagemap, nr_pages * 8, (address // _PAGE_BYTES + first) * 8)
            entries = struct.unpack(f"={len(data) // 8}Q", data)
            start = None
            for index, entry in enumerate((*entries, 0)):
                filled = bool(entry & _PRESENT_OR_SWAPPED)
                if filled and start is None:
                    start = index
                elif not filled and start is not None:
                    yield (first + start) * _PAGE_BYTES, (index - start) * _PAGE_BYTES
                    start = None
    finally:
        os.close(pagemap)


def _state(thread: int) -> bytes:
    """The state letter of a thread; empty when it is gone."""
    try:
        return _text(thread, "stat").rpartition(b")")[2].split(None, 1)[0]
    except OSError:
        return b""


def _text(thread: int, name: str) -> bytes:
    """A file of a thread's /proc directory."""
    fd = os.open(f"/proc/{thread}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        return file.read()
