"""What a supervisor asks of others: of files beyond KVM's own interface, of who listens in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kvmsim.interpose.clients import Process, Thread
    from kvmsim.interpose.notify import Notification
    from kvmsim.kvm.dispatch import KvmFile


@runtime_checkable
class Releasable(Protocol):
    """A file that wants to know of its last close."""

    def release(self, now_ns: int) -> None:
        """The last descriptor was closed."""


@runtime_checkable
class Readable(Protocol):
    """A file that is read like one on a disk, as KVM's statistics are."""

    def content(self) -> bytes:
        """All of it, as it is now; its length never changes."""


class Tap(Protocol):
    """Sees every call; for traces and for faults made on purpose."""

    def called(self, file: KvmFile, request: int, arg: int, caller: Process) -> int | None:
        """A call is about to be carried out; an errno makes it fail instead."""

    def returned(
        self, file: KvmFile, request: int, arg: int, caller: Process, result: int, now_ns: int
    ) -> None:
        """A call is about to be answered: its value, or a negative errno.

        The caller still waits, so its memory is as KVM left it; only one that gets a descriptor has
        its answer already, which is how the number is known.
        """


class OtherCalls(Protocol):
    """Answers trapped calls that are no ioctls."""

    def answer(self, notification: Notification, thread: Thread) -> int | None:
        """The value, a negative errno, or None: Linux carries the call out."""
