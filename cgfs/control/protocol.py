r"""Messages of the control socket, without any I/O.

A message is one line of JSON ended by ``\n``. The client sends requests, the server answers each
with one reply of the same ``id``, in the order of the requests::

    → {"id": 1, "method": "vm.stop", "params": {"name": "a"}}
    ← {"id": 1, "result": {...}}
    ← {"id": 1, "problem": {"message": "vm a: no such VM (ESRCH)", "exit_code": 69, "errno": 3}}

A client that asked for it is told things besides, between the replies::

    ← {"notice": "admitted", "params": {"waiter": 7}}
"""

import os
from collections.abc import Iterator

import msgspec

from cgfs.control.errors import CommandError

MAX_LINE_BYTES = 16 << 20


class Request(msgspec.Struct, frozen=True):
    """A call of one method.

    ``params`` stays undecoded until the method is known.
    """

    id: int
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")


class Problem(msgspec.Struct, frozen=True):
    """A failure on its way to the client."""

    message: str
    exit_code: int
    errno: int = 0

    @classmethod
    def of(cls, failure: CommandError) -> "Problem":
        """The message for a failure."""
        return cls(printable(failure.message), failure.exit_code, failure.errno)

    def failure(self) -> CommandError:
        """The failure that was sent."""
        return CommandError(self.message, self.exit_code, self.errno)


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to one request: a result, or the problem that prevented it.

    An empty ``result`` is null.
    """

    id: int
    result: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None


class Notice(msgspec.Struct, frozen=True):
    """Something the server says without having been asked."""

    notice: str
    params: msgspec.Raw = msgspec.Raw(b"{}")


class LineTooLongError(CommandError):
    """The other side sent more than a message may have; the connection cannot go on."""

    def __init__(self) -> None:
        super().__init__(f"a message is longer than {MAX_LINE_BYTES} bytes", os.EX_PROTOCOL)


class LineBuffer:
    """Cuts a stream of received bytes into lines."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Adds received bytes and yields every line that is now complete, without its newline.

        Raises:
            LineTooLongError: more than the limit came without a newline.
        """
        self._pending += data
        while (end := self._pending.find(b"\n")) >= 0:
            if end > self._limit:
                raise LineTooLongError
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            yield line
        if len(self._pending) > self._limit:
            raise LineTooLongError


_encoder = msgspec.json.Encoder()
_requests = msgspec.json.Decoder(Request)
_replies = msgspec.json.Decoder(Reply)
_notices = msgspec.json.Decoder(Notice)

_NOTICE_START = b'{"notice":'


def encode_line(message: Request | Reply | Notice) -> bytes:
    """One message with its newline."""
    return _encoder.encode(message) + b"\n"


def raw(value: object) -> msgspec.Raw:
    """A parameter object, encoded to go into a message.

    Raises:
        CommandError: a string came from bytes that are not UTF-8, which JSON cannot say (EX_USAGE).
    """
    try:
        return msgspec.Raw(_encoder.encode(value))
    except UnicodeEncodeError as error:
        raise CommandError(f"{printable(error.object)}: not UTF-8 text", os.EX_USAGE) from error


def encode_shown(value: object) -> bytes:
    r"""A result as JSON, for people and programs to look at.

    Names of cgroups may be any bytes; those that are not UTF-8 are shown as ``\xff``.
    """
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:
        return _encoder.encode(_printable_strings(msgspec.to_builtins(value, str_keys=True)))


def printable(text: str) -> str:
    r"""The text with bytes that were not UTF-8 as ``\xff``."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _printable_strings(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: _printable_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable_strings(item) for item in value]
    return value


def decode_request(line: bytes) -> Request:
    """A request from one line.

    Raises:
        CommandError: the line is not a request (EX_PROTOCOL).
    """
    try:
        return _requests.decode(line)
    except msgspec.DecodeError as error:
        raise CommandError(f"not a request: {error}", os.EX_PROTOCOL) from error


def decode_reply(line: bytes) -> Reply:
    """A reply from one line.

    Raises:
        CommandError: the line is not a reply (EX_PROTOCOL).
    """
    try:
        return _replies.decode(line)
    except msgspec.DecodeError as error:
        raise CommandError(f"not a reply: {error}", os.EX_PROTOCOL) from error


def decode_news(line: bytes) -> Reply | Notice:
    """What a server that may send notices has sent.

    Raises:
        CommandError: the line is neither (EX_PROTOCOL).
    """
    if not line.startswith(_NOTICE_START):
        return decode_reply(line)
    try:
        return _notices.decode(line)
    except msgspec.DecodeError as error:
        raise CommandError(f"not a notice: {error}", os.EX_PROTOCOL) from error
