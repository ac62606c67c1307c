"""Serves the control socket with trio.

Every connection is one task; its requests are done one after the other, in their order. Who may
connect is decided by the kernel's word for the peer (SO_PEERCRED), not by anything it says.

A client that stays connected can be told things it did not ask for (:meth:`Connection.notify`).
Notices and replies leave in the order in which they came about.
"""

import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from cgfs.control.errors import CommandError
from cgfs.control.protocol import (
    LineBuffer,
    LineTooLongError,
    Notice,
    Problem,
    Reply,
    Request,
    decode_request,
    encode_line,
    encode_shown,
)

log = logging.getLogger(__name__)

RECEIVE_BYTES = 65536
MAX_BACKLOG_BYTES = 16 << 20
"""What may wait for a client that does not read; then it is cut off."""

_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel recorded it at connect."""

    pid: int
    uid: int
    gid: int


class Connection:
    """One connected client.

    Args:
        stream: the way to it.

    Attributes:
        peer: who it is.
        on_close: called once when the client is gone, whatever the reason, last one first.
        scope: its life; cancelled to cut it off.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.peer = peer_of(stream)
        self.on_close: list[Callable[[], None]] = []
        self.scope = trio.CancelScope()
        self._stream = stream
        self._backlog = bytearray()
        self._news = trio.Event()
        self._sending = trio.Lock()

    def notify(self, notice: str, params: object) -> None:
        """Tells the client something; does not wait until it has read that."""
        self.queue(encode_line(Notice(notice, msgspec.Raw(encode_shown(params)))))
        self._news.set()
        if len(self._backlog) > MAX_BACKLOG_BYTES:
            log.warning("pid %d does not read what it is told", self.peer.pid)
            self.scope.cancel()

    def queue(self, line: bytes) -> None:
        """Puts a message behind those that wait; ``flush`` sends it."""
        self._backlog += line

    async def flush(self) -> None:
        """Sends what waits.

        Raises:
            trio.BrokenResourceError: the client is gone.
        """
        async with self._sending:
            while self._backlog:
                data = bytes(self._backlog)
                self._backlog.clear()
                await self._stream.send_all(data)

    async def send_notices(self) -> None:
        """Sends notices as they come, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await self.flush()

    def closed(self) -> None:
        """The client is gone; what goes wrong over it concerns nobody else."""
        while self.on_close:
            try:
                self.on_close.pop()()
            except Exception:
                log.exception("the end of pid %d", self.peer.pid)


@dataclass(frozen=True, slots=True)
class Method:
    """One thing that can be asked for.

    Attributes:
        name: by which it is asked for.
        params: type of its parameters.
        call: does it; called with the parameters and who asks.
        connected: ``call`` gets the connection instead of the peer: what it does lasts as long.
    """

    name: str
    params: type[Any]
    call: Callable[[Any, Any], Awaitable[object]]
    connected: bool = False


def explain_nothing(_error: Exception) -> CommandError | None:
    """Knows no exceptions beside CommandError."""
    return None


class Server:
    """Answers requests with a set of methods.

    Args:
        methods: what can be called.
        may_use: says for a peer whether it is served at all.
        explain: turns an exception of the model into a CommandError, None for one that is a bug.
    """

    def __init__(
        self,
        methods: Iterable[Method],
        may_use: Callable[[Peer], bool],
        explain: Callable[[Exception], CommandError | None] = explain_nothing,
    ) -> None:
        self._methods = {method.name: method for method in methods}
        self._may_use = may_use
        self._explain = explain

    async def serve(
        self,
        path: Path,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listens at ``path`` until cancelled; clients can connect when the task has started."""
        with bound_socket(path) as listener:
            try:
                task_status.started()
                await trio.serve_listeners(
                    self.connection,
                    [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
                )
            finally:
                path.unlink(missing_ok=True)  # noqa: ASYNC240 - one call on a tmpfs

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serves one client until it hangs up; nothing a client does ends the server."""
        async with stream:
            try:
                client = Connection(stream)
            except OSError:  # it has gone already
                return
            try:
                with client.scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(client.send_notices)
                        await self._converse(stream, client)
                        client.scope.cancel()
            except* trio.BrokenResourceError:
                log.debug("pid %d went before its answer", client.peer.pid)
            finally:
                client.closed()

    async def _converse(self, stream: trio.SocketStream, client: Connection) -> None:
        lines = LineBuffer()
        try:
            while data := await stream.receive_some(RECEIVE_BYTES):
                for line in lines.feed(data):
                    client.queue(encode_line(await self.answer(line, client)))
                    await client.flush()
        except LineTooLongError as failure:
            client.queue(encode_line(Reply(0, problem=Problem.of(failure))))
            await client.flush()

    async def answer(self, line: bytes, client: Connection) -> Reply:
        """Does what one line asks for; failures become replies."""
        number = 0
        try:
            request = decode_request(line)
            number = request.id
            result = await self._call(request, client)
            return Reply(number, result=msgspec.Raw(encode_shown(result)))
        except CommandError as failure:
            return Reply(number, problem=Problem.of(failure))
        except Exception as error:  # the connection goes on whatever a method raises
            known = self._explain(error) or _our_bug(error)
            return Reply(number, problem=Problem.of(known))

    async def _call(self, request: Request, client: Connection) -> object:
        peer = client.peer
        if not self._may_use(peer):
            raise CommandError(f"uid {peer.uid} may not use this socket", os.EX_NOPERM)
        method = self._methods.get(request.method)
        if method is None:
            raise CommandError(f"no method {request.method!r}", os.EX_PROTOCOL)
        try:
            params = msgspec.json.decode(request.params, type=method.params)
        except msgspec.DecodeError as error:
            raise CommandError(f"{request.method}: {error}", os.EX_USAGE) from error
        return await method.call(params, client if method.connected else peer)


def owner_and_root(peer: Peer) -> bool:
    """The rule for who may use a socket: root, and the user the server runs as."""
    return peer.uid in {0, os.geteuid()}


def peer_of(stream: trio.SocketStream) -> Peer:
    """The process that connected."""
    data = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(data))


def bound_socket(path: Path) -> socket.socket:
    """A listening socket at ``path`` that only its owner (and root) can connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        # The directory is 0700 as well; the umask closes the moment between bind and chmod.
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


def _our_bug(error: Exception) -> CommandError:
    log.error("a request failed", exc_info=error)
    return CommandError(f"internal error: {type(error).__name__}: {error}", os.EX_SOFTWARE)
