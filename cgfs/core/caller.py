"""Who asks: the credentials an open file carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The opener of a file, or the task that makes a directory.

    Attributes:
        uid: file-system user id.
        gid: file-system group id.
        pid: thread id in the server's pid namespace.
        groups: supplementary groups, where the adapter knows them.
    """

    uid: int
    gid: int
    pid: int
    groups: frozenset[int] = frozenset()


KERNEL = Caller(0, 0, 0)
