"""The client's end of the control socket, blocking: what a command line needs.

It imports nothing that takes long to load.
"""

import os
import socket
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from cgfs.control.errors import CommandError, from_oserror
from cgfs.control.protocol import LineBuffer, Reply, Request, decode_reply, encode_line, raw

T = TypeVar("T")

TIMEOUT_SECONDS = 60.0
RECEIVE_BYTES = 65536


class Client:
    """A connection to a server; a context manager that closes it."""

    def __init__(self, path: Path, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Connects.

        Raises:
            CommandError: nobody listens at ``path`` (EX_UNAVAILABLE) or it is not ours (EX_NOPERM).
        """
        self._lines = LineBuffer()
        self._next_id = 1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            if isinstance(error, ConnectionRefusedError | FileNotFoundError):
                raise CommandError(f"nobody answers at {path}") from error
            raise from_oserror(error, str(path)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def call(self, method: str, params: object, result: type[T]) -> T:
        """Calls a method and returns its result as an object of type ``result``.

        Raises:
            CommandError: what the server answered, or that it went away or takes too long.
        """
        request = Request(self._next_id, method, raw(params))
        self._next_id += 1
        try:
            self._socket.sendall(encode_line(request))
            reply = self._reply()
        except TimeoutError as error:
            raise CommandError("the host does not answer", os.EX_TEMPFAIL) from error
        except OSError as error:
            raise from_oserror(error, "the connection to the host broke") from error
        if reply.problem is not None:
            raise reply.problem.failure()
        return msgspec.json.decode(bytes(reply.result) or b"null", type=result)

    def _reply(self) -> Reply:
        while data := self._socket.recv(RECEIVE_BYTES):
            for line in self._lines.feed(data):
                return decode_reply(line)
        raise CommandError("the host hung up before it answered")
