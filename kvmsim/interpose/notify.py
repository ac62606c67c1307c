"""The listener of a seccomp filter: trapped calls come out, answers go in.

Plain ``fcntl.ioctl`` on fixed buffers (seccomp_unotify(2)). One reader: after POLLIN a receive
never blocks, and a caller that died in between shows as ENOENT.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from contextlib import suppress
from errno import EINTR, ENOENT
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

NOTIF_RECV: Final = 0xC0502100
NOTIF_SEND: Final = 0xC0182101
NOTIF_ID_VALID: Final = 0x40082102
NOTIF_ADDFD: Final = 0x40182103
NOTIF_SET_FLAGS: Final = 0x40082104

SYNC_WAKE_UP: Final = 1
FLAG_CONTINUE: Final = 1

BATCH: Final = 64
"""Calls answered in a row before other tasks get their turn."""

NOTIF_BYTES: Final = 80
#: id, pid, flags, nr, arch, instruction pointer, arguments 0 to 5.
NOTIF = struct.Struct("=QIIiIQ6Q")
RESPONSE = struct.Struct("=QqiI")
ADDFD = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")

#: id, thread, system call number, instruction pointer, the call's first three arguments.
Notification = tuple[int, int, int, int, int, int, int]


class Listener:
    """One end of a filter.

    Args:
        fd: the listener's descriptor; owned from here on.

    Attributes:
        fd: as given.
        poll: ``select.poll().poll`` of it alone.
        sync: callers wake up on the supervisor's CPU (Linux 6.6).
    """

    __slots__ = ("_buffer", "_zero", "fd", "poll", "sync")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray(NOTIF_BYTES)
        self._zero = bytes(NOTIF_BYTES)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self.poll = poll.poll
        self.sync = True
        try:
            fcntl.ioctl(fd, NOTIF_SET_FLAGS, SYNC_WAKE_UP)
        except OSError:
            self.sync = False

    def waiting(self) -> bool | None:
        """Whether a call waits to be received; None when no task with the filter is left."""
        ready = self.poll(0)
        if not ready:
            return False
        if ready[0][1] & select.POLLIN:
            return True
        return None

    def receive(self) -> Notification | None:
        """Take a call; None if the caller is gone already."""
        buffer = self._buffer
        buffer[:] = self._zero
        try:
            fcntl.ioctl(self.fd, NOTIF_RECV, buffer)
        except OSError as error:
            if error.errno in (ENOENT, EINTR):
                return None
            raise
        number, thread, _, nr, _, pointer, arg0, arg1, arg2, _, _, _ = NOTIF.unpack(buffer)
        return number, thread, nr, pointer, arg0, arg1, arg2

    def answer(self, number: int, value: int, error: int = 0) -> bool:
        """Let the call return; False if the caller is gone.

        Args:
            number: id of the notification.
            value: result, when ``error`` is 0.
            error: positive errno; the call then returns -1.
        """
        return self._send(RESPONSE.pack(number, value, -error, 0))

    def go_on(self, number: int) -> bool:
        """Let the kernel carry the call out; False if the caller is gone."""
        return self._send(RESPONSE.pack(number, 0, 0, FLAG_CONTINUE))

    def answer_with_descriptor(self, number: int, fd: int) -> int:
        """Install a copy of a descriptor in the caller and let the call return its number.

        In two steps. ``SECCOMP_ADDFD_FLAG_SEND`` makes it one, but a signal to this process at that
        moment leaves the call answered with 0 and nothing installed (Linux 6.18 ``seccomp.c``).

        Returns:
            That number.

        Raises:
            OSError: ENOENT the caller is gone; EMFILE and the like: it has no room, and the call
                still waits for its answer.
        """
        installed = self.install(number, fd)
        if not self.answer(number, installed):
            raise OSError(ENOENT, "the caller is gone")
        return installed

    def install(self, number: int, fd: int) -> int:
        """Give the caller a copy of a descriptor, and leave it waiting; the copy's number.

        Raises:
            OSError: as ``answer_with_descriptor``.
        """
        request = bytearray(ADDFD.pack(number, 0, fd, 0, os.O_CLOEXEC))
        while True:
            try:
                return int(fcntl.ioctl(self.fd, NOTIF_ADDFD, request))
            except InterruptedError:  # then nothing was installed
                continue

    def is_valid(self, number: int) -> bool:
        """Whether the caller still waits for the answer."""
        try:
            fcntl.ioctl(self.fd, NOTIF_ID_VALID, _ID.pack(number))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """No more; calls that wait fail with ENOSYS."""
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)
            self.fd = -1

    def _send(self, response: bytes) -> bool:
        try:
            fcntl.ioctl(self.fd, NOTIF_SEND, response)
        except OSError as error:
            if error.errno != ENOENT:
                raise
            return False
        return True


async def answer_calls(listener: Listener, answer: Callable[[Notification], None]) -> None:
    """Have calls answered as they come, until no task of the client tree is left.

    Going back to the event loop takes longer than a call, so all that wait are answered before.
    """
    while True:
        await trio.lowlevel.wait_readable(listener.fd)
        answered = 0
        while waiting := listener.waiting():
            notification = listener.receive()
            if notification is not None:
                answer(notification)
            answered += 1
            if answered % BATCH == 0:
                await trio.lowlevel.checkpoint()
        if waiting is None:
            return
