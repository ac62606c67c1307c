"""Eventfds of clients, as far as KVM uses them.

KVM does not look at a descriptor again once it was given one: it holds the eventfd itself. Here
whoever knows the client's descriptors gives it an :class:`Eventfd` to hold; nothing is read or
written by KVM.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvmsim.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from kvmsim.kvm.client import Client


class Eventfd(Protocol):
    """One eventfd.

    Attributes:
        identity: equal for two descriptors of one eventfd.
    """

    @property
    def identity(self) -> Hashable:
        """See the class."""

    def signal(self) -> bool:
        """Add 1 to it; False: it cannot be reached."""

    def watch(self, signalled: Callable[[int], None]) -> None:
        """Call ``signalled(now_ns)`` whenever it is not 0, having made it 0."""

    def close(self) -> None:
        """Let go of it."""


@runtime_checkable
class HasEventfds(Protocol):
    """A client whose eventfds can be had."""

    def eventfd(self, fd: int) -> Eventfd:
        """The eventfd behind a descriptor; KvmError EBADF not open, EINVAL no eventfd."""


class Held:
    """An eventfd nobody can signal: of a client that has none to give.

    Args:
        fd: its descriptor.
    """

    __slots__ = ("identity",)

    def __init__(self, fd: int) -> None:
        self.identity: Hashable = fd

    def signal(self) -> bool:
        """See :class:`Eventfd`."""
        return False

    def watch(self, signalled: Callable[[int], None]) -> None:
        """See :class:`Eventfd`."""

    def close(self) -> None:
        """See :class:`Eventfd`."""


def get(client: Client, fd: int) -> Eventfd:
    """Hold the eventfd behind a client's descriptor.

    Raises:
        KvmError: EBADF not open; EINVAL something else.
    """
    if client.file(fd) is not None:
        raise KvmError(EINVAL, f"descriptor {fd} is no eventfd")
    return client.eventfd(fd) if isinstance(client, HasEventfds) else Held(fd)
