"""Threads for system calls that may wait for our own answers.

Three of them, and who may wait for whom is what keeps the mount from locking itself up:

* *inodes* drops cached texts. It takes page locks, which only readers hold whose READ the serving
  loop answers without waiting. Any handler may wait for it.
* *entries* drops cached names. It takes directory locks, which mkdir, rmdir and rename hold until
  they are answered. Those handlers may wait for *inodes* but never for *entries*.
* *pokes* sets times through the mount, so it waits for lookups and setattrs. Nobody waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")


class KernelThread(Generic[_Item]):
    """Makes one system call after the other.

    Args:
        name: of the thread.
        call: what to do with each item; an OSError it raises is ignored, for the kernel may have
            let go of what the call is about.
    """

    def __init__(self, name: str, call: Callable[[_Item], object]) -> None:
        self._call = call
        self._queue: queue.SimpleQueue[tuple[Sequence[_Item], Callable[[], object]] | None] = (
            queue.SimpleQueue()
        )
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"cgfs-{name}", daemon=True)

    @property
    def native_id(self) -> int:
        """The thread id the kernel reports as the sender of its requests; 0 before the start."""
        return self._thread.native_id or 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, items: Sequence[_Item], done: Callable[[], object]) -> None:
        """Queues items; ``done`` is called in the thread after the last of them."""
        self._queue.put((items, done))

    def close(self) -> None:
        """Lets the thread end; what is still queued is skipped."""
        self._closing = True
        self._queue.put(None)

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended in this time."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            items, done = job
            for item in items:
                self._handle(item)
            done()

    def _handle(self, item: _Item) -> None:
        if self._closing:
            return
        try:
            self._call(item)
        except OSError as error:
            log.debug("%s: %r: %s", self._thread.name, item, error)
        except Exception:
            log.exception("%s: %r", self._thread.name, item)
