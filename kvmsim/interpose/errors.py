"""Why a client could not be run."""

from __future__ import annotations

from kvmsim.errors import KvmsimError


class Unavailable(KvmsimError):
    """This machine, or the situation the command was called in, does not allow it.

    The message is one line.
    """


class CommandNotRun(KvmsimError):
    """The client's program could not be executed.

    Args:
        errno: of execve(2).
        message: one line.
    """

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno
