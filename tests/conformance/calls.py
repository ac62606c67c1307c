"""System calls that answer with a value: bytes or numbers, or the name of the errno."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# errno 95 has two names on Linux; the specification uses this one.
_NAMES = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def name_of(error: OSError) -> str:
    """Returns the symbolic name of the error's number."""
    return _NAMES.get(error.errno or 0, f"errno {error.errno}")


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a call; returns its result ("ok" for None) or the errno's name."""
    try:
        result = call(*args, **kwargs)
    except OSError as error:
        return name_of(error)
    return "ok" if result is None else result


@contextlib.contextmanager
def opened(path: AnyPath, flags: int = os.O_RDONLY, **kwargs: Any) -> Iterator[int]:
    """Opens a path for the length of a block and gives its descriptor."""
    fd = os.open(path, flags | os.O_CLOEXEC, **kwargs)
    try:
        yield fd
    finally:
        os.close(fd)


def open_and_close(path: AnyPath, flags: int, **kwargs: Any) -> None:
    """Opens a path and closes it at once, to see whether it can be opened."""
    os.close(os.open(path, flags, **kwargs))


def write(path: AnyPath, text: bytes, flags: int = 0) -> int | str:
    """Opens, makes one write(2), closes; the count, or the errno of whichever call failed."""
    try:
        with opened(path, os.O_WRONLY | flags) as fd:
            return os.write(fd, text)
    except OSError as error:
        return name_of(error)


def read_all(fd: int) -> bytes:
    """Reads a descriptor up to the end of file."""
    text = b""
    while chunk := os.read(fd, 65536):
        text += chunk
    return text


def read(path: AnyPath) -> bytes | str:
    """Opens, reads up to the end of file, closes."""
    try:
        with opened(path) as fd:
            return read_all(fd)
    except OSError as error:
        return name_of(error)


def numbers(path: AnyPath) -> list[int] | str:
    """Reads a file of decimal numbers, one per line."""
    text = read(path)
    return text if isinstance(text, str) else [int(line) for line in text.split()]


def flat(path: AnyPath, key: str) -> int | None:
    """Reads one key of a file of "key value" lines; None if it is not there."""
    text = read(path)
    if isinstance(text, str):
        raise OSError(getattr(errno, text), text, path)
    values = dict(line.split() for line in text.decode().splitlines())
    return int(values[key]) if key in values else None


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> bool:
    """Waits until a condition holds; False if it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
