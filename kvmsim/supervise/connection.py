"""The supervisor's end of the host's control socket.

KVM is synchronous, so what it asks of the host is a blocking round trip. What the host says without
being asked arrives between the replies; it is kept and delivered by a task, never from inside a
call, because a call comes from the middle of the model.

A host that is gone, or does not answer in time, is lost for good: calls fail with EIO at once.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from contextlib import suppress
from errno import EIO
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from cgfs.control.errors import CommandError, errno_word
from cgfs.control.protocol import LineBuffer, Notice, Request, decode_news, encode_line, raw
from kvmsim.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cgfs.control.protocol import Reply

T = TypeVar("T")

log = logging.getLogger(__name__)

PATIENCE_S = 20
"""How long a host may take for one answer."""

MAX_UNANSWERED = 64
"""How much may be said before its answers are waited for. They take up the socket, and a host that
cannot send does not listen: Linux holds a few hundred short messages for each side."""

_RECEIVE_BYTES = 65536
_TIMEVAL = struct.Struct("ll")


class HostConnection:
    """A connection that lasts as long as its supervisor.

    Args:
        connected: the socket.
        patience_s: how long the host may take for one answer.

    Attributes:
        lost: the host is gone; what it was asked for last may or may not have been done.
        on_lost: called once when that is found out, with nothing of the model on the stack.
    """

    def __init__(self, connected: socket.socket, patience_s: int = PATIENCE_S) -> None:
        self.lost = False
        self.on_lost: list[Callable[[], None]] = []
        self._socket = connected
        self._socket.setblocking(True)
        # Python's own timeouts would poll before each receive.
        limit = _TIMEVAL.pack(patience_s, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        self._lines = LineBuffer()
        self._last_id = 0
        self._unanswered = 0
        self._notices: list[Notice] = []
        self._handlers: dict[str, Callable[[bytes], None]] = {}
        self._news = trio.Event()

    @classmethod
    def to(cls, path: Path) -> HostConnection:
        """Connect to a host's control socket.

        Raises:
            OSError: nobody listens there, or only to others.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(os.fspath(path))
            return cls(connected)
        except BaseException:
            connected.close()
            raise

    def close(self) -> None:
        """Hang up; the host takes back what this supervisor held."""
        self.lost = True
        self._socket.close()

    # -- asking ----------------------------------------------------------------------------------

    def call(self, method: str, params: object, result: type[T]) -> T:
        """Ask and wait for the answer.

        Raises:
            KvmError: the host refuses, with its errno; EIO: the host is lost.
        """
        self._last_id += 1
        self._send(Request(self._last_id, method, raw(params)))
        reply = self._reply(self._last_id)
        if reply.problem is not None:
            raise _refused(reply.problem.errno, reply.problem.message)
        return msgspec.json.decode(bytes(reply.result) or b"null", type=result)

    def post(self, method: str, params: object) -> None:
        """Say something whose answer does not matter; nothing happens if the host is lost."""
        while self._unanswered >= MAX_UNANSWERED and not self.lost:
            self._received(0)
        try:
            self._send(Request(0, method, raw(params)))
            self._unanswered += 1
        except KvmError:
            log.debug("%s was not sent: the host is gone", method)

    def _send(self, request: Request) -> None:
        if self.lost:
            raise KvmError(EIO, "the host is gone")
        try:
            self._socket.sendall(encode_line(request))
        except OSError as error:
            self._lose()
            raise KvmError(EIO, "the host is gone") from error

    def _reply(self, number: int) -> Reply:
        while True:
            for reply in self._received(0):
                if reply.id == number:
                    return reply
            if self.lost:
                raise KvmError(EIO, "the host is gone")

    # -- hearing ---------------------------------------------------------------------------------

    def handle(self, notice: str, handler: Callable[[bytes], None]) -> None:
        """Set who is told about notices of a kind; called with the parameters as JSON."""
        self._handlers[notice] = handler

    def take(self, notice: str, params: bytes) -> bool:
        """Whether a notice has arrived and was not delivered yet; it will not be then."""
        for index, waiting in enumerate(self._notices):
            if waiting.notice == notice and bytes(waiting.params) == params:
                del self._notices[index]
                return True
        return False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver notices until cancelled, or until the host is lost."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            while not self.lost:
                await self._news.wait()
                self._news = trio.Event()
                self.deliver()
            nursery.cancel_scope.cancel()
        self.poll()

    def deliver(self) -> None:
        """Hand over what has arrived."""
        notices, self._notices = self._notices, []
        for notice in notices:
            handler = self._handlers.get(notice.notice)
            if handler is not None:
                handler(bytes(notice.params))

    def poll(self) -> None:
        """Receive what is there and deliver it, without waiting."""
        if not self.lost:
            self._received(socket.MSG_DONTWAIT)
        self.deliver()
        if self.lost:
            while self.on_lost:
                self.on_lost.pop()()

    async def _receive(self) -> None:
        while not self.lost:
            await trio.lowlevel.wait_readable(self._socket)
            self.poll()

    def _received(self, flags: int) -> list[Reply]:
        """Receive something; keep the notices, give out the replies."""
        replies: list[Reply] = []
        try:
            data = self._socket.recv(_RECEIVE_BYTES, flags)
        except OSError as error:
            if flags and isinstance(error, BlockingIOError):
                return replies
            data = b""  # without MSG_DONTWAIT, EAGAIN is the end of our patience
        if not data:
            self._lose()
            return replies
        try:
            arrived = [decode_news(line) for line in self._lines.feed(data)]
        except CommandError:
            self._lose()
            return replies
        for news in arrived:
            if isinstance(news, Notice):
                self._notices.append(news)
                self._news.set()
            elif not news.id:
                self._unanswered -= 1
                if news.problem is not None:
                    log.warning("the host says: %s", news.problem.message)
            else:
                replies.append(news)
        return replies

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            self._news.set()
            log.warning("the host is gone")
            with suppress(OSError):  # one that is only slow takes back what we held
                self._socket.shutdown(socket.SHUT_RDWR)


def _refused(errno: int, message: str) -> KvmError:
    """The host's words, without the errno that the error appends itself."""
    number = errno or EIO
    return KvmError(number, message.removesuffix(f" ({errno_word(number)})"))
