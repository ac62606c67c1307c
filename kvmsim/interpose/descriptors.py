"""The descriptors clients hold, and when the last one of an object is closed.

A descriptor is a memfd, opened a second time through /proc/self/fd so that the kernel reports its
closing: exactly one inotify event comes when the last copy is gone, whether duplicated, inherited,
in flight on a socket or mapped, however it went. That is when Linux calls a KVM file's release.
The event is in our queue before the close returns to the client, so whoever empties the queue
before handling a call sees everything in the client's order.

A client that opens its descriptor's /proc/PID/fd entry gets a second open file whose closing is
reported too. A lock on the file that was handed out tells the two apart: it goes with that file
only. The kernel drops it a moment after it has queued the event.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
from contextlib import suppress
from errno import EWOULDBLOCK
from typing import TYPE_CHECKING, Final

from kvmsim.interpose import libc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsim.interpose.namespace import Identity
    from kvmsim.kvm.dispatch import KvmFile

_EVENT: Final = struct.Struct("=iIII")
_READ_AT_ONCE: Final = 1 << 16
# A client that made the file shorter would take pages away under our mapping.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_WATCHED: Final = libc.IN_CLOSE_WRITE | libc.IN_CLOSE_NOWRITE


class Descriptor:
    """What stands for one object in the clients' descriptor tables.

    Attributes:
        file: the object.
        identity: (device, inode) of every descriptor of it.
        memory: its first bytes, shared with whoever maps the descriptor; None without any.
    """

    __slots__ = ("_memfd", "file", "identity", "memory", "watch")

    def __init__(self, memfd: int, watch: int) -> None:
        self.file: KvmFile | None = None
        self._memfd = memfd
        self.watch = watch
        status = os.fstat(memfd)
        self.identity: Identity = (status.st_dev, status.st_ino)
        self.memory: mmap.mmap | None = None
        if status.st_size:
            self.memory = mmap.mmap(memfd, status.st_size)

    def is_held(self) -> bool:
        """Whether the file that was handed out is still open somewhere."""
        try:
            fcntl.flock(self._memfd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != EWOULDBLOCK:
                raise
            return True
        fcntl.flock(self._memfd, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Let go of the file. The mapping stays as long as anything refers to it."""
        os.close(self._memfd)
        self.memory = None


class Descriptors:
    """Every object clients hold descriptors of.

    Attributes:
        fd: readable when something was closed.
        poll: ``select.poll().poll`` of it alone.
    """

    def __init__(self) -> None:
        self.fd = libc.inotify_init()
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        self.poll = poll.poll
        self._by_identity: dict[Identity, Descriptor] = {}
        self._by_watch: dict[int, Descriptor] = {}
        self._doubtful: dict[Descriptor, None] = {}

    def __len__(self) -> int:
        return len(self._by_identity)

    def __iter__(self) -> Iterator[Descriptor]:
        return iter(list(self._by_identity.values()))

    def find(self, identity: Identity) -> KvmFile | None:
        """The object behind a descriptor."""
        found = self._by_identity.get(identity)
        return None if found is None else found.file

    def make(self, name: str, size_bytes: int = 0, mode: int = os.O_RDWR) -> tuple[Descriptor, int]:
        """Make a descriptor for an object; ``file`` is still to be set.

        Args:
            name: what /proc/PID/fd shows.
            size_bytes: of the memory that can be mapped.
            mode: ``os.O_RDWR`` or ``os.O_RDONLY``, of the file handed out.

        Returns:
            The record, and the open file to hand out. It is to be closed here afterwards: if nobody
            got it, that is the last close.

        Raises:
            OSError: no descriptor to be had.
        """
        memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        handed = -1
        try:
            os.ftruncate(memfd, size_bytes)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
            path = f"/proc/self/fd/{memfd}"
            handed = os.open(path, mode | os.O_CLOEXEC)
            fcntl.flock(handed, fcntl.LOCK_SH)
            watch = libc.inotify_add_watch(self.fd, path, _WATCHED)
            descriptor = Descriptor(memfd, watch)
        except BaseException:
            os.close(memfd)
            if handed >= 0:
                os.close(handed)
            raise
        self._by_identity[descriptor.identity] = descriptor
        self._by_watch[watch] = descriptor
        return descriptor, handed

    def closed(self) -> list[KvmFile]:
        """Take note of everything that was closed; the objects no client can reach any more."""
        try:
            data = os.read(self.fd, _READ_AT_ONCE)
        except BlockingIOError:
            if not self._doubtful:
                return []
            data = b""
        gone: list[KvmFile] = []
        while data:
            self._note(data, gone)
            try:
                data = os.read(self.fd, _READ_AT_ONCE)
            except BlockingIOError:
                break
        released = [descriptor for descriptor in self._doubtful if not descriptor.is_held()]
        gone += [self._remove(descriptor) for descriptor in released]
        return gone

    def in_doubt(self) -> bool:
        """Whether a close was reported of a file whose lock is not gone yet."""
        return bool(self._doubtful)

    def settle(self) -> None:
        """Stop doubting: what is still locked by now was opened a second time."""
        self._doubtful.clear()

    def close(self, release: Callable[[KvmFile], None]) -> None:
        """The clients are gone: release every object."""
        for descriptor in self:
            release(self._remove(descriptor))
        os.close(self.fd)

    def _note(self, data: bytes, gone: list[KvmFile]) -> None:
        offset = 0
        while offset < len(data):
            watch, mask, _, name_bytes = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + name_bytes
            if mask & libc.IN_Q_OVERFLOW:
                for descriptor in self._by_identity.values():
                    self._doubtful[descriptor] = None
            elif mask & _WATCHED and (found := self._by_watch.get(watch)) is not None:
                if found.is_held():
                    self._doubtful[found] = None
                else:
                    gone.append(self._remove(found))

    def _remove(self, descriptor: Descriptor) -> KvmFile:
        self._doubtful.pop(descriptor, None)
        del self._by_identity[descriptor.identity]
        del self._by_watch[descriptor.watch]
        with suppress(OSError):
            libc.inotify_rm_watch(self.fd, descriptor.watch)
        descriptor.close()
        assert descriptor.file is not None
        return descriptor.file
