"""Eventfds of clients: signalled for them, and watched.

An eventfd is taken out of its client by pidfd_getfd(2), which needs the right to trace it. Where
that is refused, writes that would signal it stay exits, which VMMs handle as well; an irqfd then
never fires.

Nothing here waits: the descriptor may be a blocking one, and its flags are the client's.
"""

from __future__ import annotations

import logging
import os
import select
from contextlib import suppress
from errno import EBADF, EINVAL, EPERM
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from kvmsim.errors import KvmError
from kvmsim.interpose import libc
from kvmsim.kvm.eventfds import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)

NR_PIDFD_GETFD: Final = 438
_LINK: Final = "anon_inode:[eventfd]"
_ID: Final = "eventfd-id:"
_ONE: Final = (1).to_bytes(8, "little")


class ClientEventfd:
    """One eventfd of a client.

    Args:
        fd: our descriptor of it.
        watcher: who looks at it.

    Attributes:
        identity: equal for two descriptors of one eventfd.
    """

    __slots__ = ("_fd", "_watcher", "identity")

    def __init__(self, fd: int, watcher: Eventfds) -> None:
        self._fd = fd
        self._watcher = watcher
        self.identity: Hashable = _identity(fd)

    def signal(self) -> bool:
        """Add 1 to it, unless it is full: then whoever reads it finds enough."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if poll.poll(0):
            os.write(self._fd, _ONE)
        return True

    def watch(self, signalled: Callable[[int], None]) -> None:
        """Call ``signalled(now_ns)`` whenever it is not 0."""
        self._watcher.add(self._fd, signalled)

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            self._watcher.remove(self._fd)
            os.close(self._fd)
            self._fd = -1


class Eventfds:
    """All eventfds of one client tree.

    Args:
        now_ns: brings the model up to the present and tells it.
    """

    __slots__ = ("_epoll", "_now_ns", "_told")

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[int], None]] = {}

    def get(self, pid: int, fd: int) -> ClientEventfd | Held:
        """The eventfd behind a descriptor of a process.

        Raises:
            KvmError: EBADF not open; EINVAL something else.
        """
        try:
            ours = _take(pid, fd)
        except OSError as error:
            if error.errno == EPERM:
                log.debug("process %d is not to be traced: its eventfds stay with it", pid)
                return Held(fd)
            raise KvmError(EBADF, f"descriptor {fd}") from error
        if str(Path(f"/proc/self/fd/{ours}").readlink()) != _LINK:
            os.close(ours)
            raise KvmError(EINVAL, f"descriptor {fd} is no eventfd")
        return ClientEventfd(ours, self)

    def add(self, fd: int, signalled: Callable[[int], None]) -> None:
        """Watch one."""
        self._told[fd] = signalled
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Watch one no more."""
        if self._told.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def serve(self) -> None:
        """Tell whoever waits, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self.look()

    def look(self) -> None:
        """Tell whoever waits for an eventfd that was signalled."""
        signalled = [fd for fd, _ in self._epoll.poll(0) if _reset(fd)]
        if not signalled:
            return
        now_ns = self._now_ns()
        for fd in signalled:
            told = self._told.get(fd)
            if told is not None:  # not taken off by the one before
                told(now_ns)

    def close(self) -> None:
        """Stop watching."""
        self._epoll.close()


def _take(pid: int, fd: int) -> int:
    """Duplicate a descriptor of another process."""
    process = os.pidfd_open(pid)
    try:
        return libc.syscall(NR_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)


def _reset(fd: int) -> bool:
    """Make an eventfd 0 without waiting; False: it is already, for it has other readers."""
    with suppress(BlockingIOError):
        return bool(os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT))
    return False


def _identity(fd: int) -> Hashable:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith(_ID):
            return line.removeprefix(_ID).strip()
    return fd
