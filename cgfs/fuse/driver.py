"""The event loop that pyfuse3 sees: trio, with most requests answered without going through it.

pyfuse3 waits for each request with ``trio.lowlevel.wait_readable``, which costs more than the rest
of a request: two epoll_wait, one epoll_ctl and a pass of the scheduler. `Driver` takes the place of
the trio module inside pyfuse3, as ``pyfuse3.asyncio`` does, and asks the FUSE descriptor by poll(2)
first, with the interpreter lock released. Requests that follow each other closely are answered in
a row; other tasks of the loop get their turn

* SLICE_NS after the last turn at the latest,
* when no request has come for IDLE_MS,
* always while a handler waits for something (`Driver.waiting`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pyfuse3
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator
    from types import TracebackType

SLICE_NS = 5_000_000
IDLE_MS = 5


class Driver:
    """Stands in for the trio module inside pyfuse3.

    Args:
        direct: ask the descriptor before the loop; False waits through trio every time.
        slice_ns: longest time requests are answered without a turn for other tasks.
        idle_ms: how long a next request is awaited before the loop gets its turn.
    """

    ClosedResourceError = trio.ClosedResourceError

    def __init__(
        self, *, direct: bool = True, slice_ns: int = SLICE_NS, idle_ms: int = IDLE_MS
    ) -> None:
        self._direct = direct
        self._slice_ns = slice_ns
        self._idle_ms = idle_ms
        self._slice_end_ns = 0
        self._waiting = 0
        self._closing = False
        self._fd = -1
        self._poll = select.poll()
        self._ask = self._poll.poll
        self._now_ns = time.monotonic_ns
        self._turn = trio.Lock()
        self.lowlevel = SimpleNamespace(
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
            notify_closing=self._notify_closing,
            wait_readable=self._wait_readable,
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """pyfuse3 runs on this driver inside the block."""
        module: Any = pyfuse3
        before, module.trio = module.trio, self
        try:
            yield
        finally:
            module.trio = before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A handler waits for another task, thread or time: the loop must run meanwhile."""
        self._waiting += 1
        self._slice_end_ns = 0
        try:
            yield
        finally:
            self._waiting -= 1

    def yield_turn(self) -> None:
        """Another task became ready: it gets its turn after the present request."""
        self._slice_end_ns = 0

    def Lock(self) -> _NoLock:  # noqa: N802
        """pyfuse3 guards its wait by a lock; `_wait_turn` has its own."""
        return _NoLock()

    def open_nursery(self) -> _Nursery:
        """A nursery for pyfuse3's workers."""
        return _Nursery()

    def _notify_closing(self, fd: int) -> None:
        self._closing = True
        trio.lowlevel.notify_closing(fd)

    def _wait_readable(self, fd: int) -> Awaitable[None]:
        if self._now_ns() < self._slice_end_ns and self._ask(self._idle_ms):
            return _AT_ONCE
        return self._wait_turn(fd)

    async def _wait_turn(self, fd: int) -> None:
        if fd != self._fd:
            self._adopt(fd)
        # One waiter at a time, and the descriptor is asked again afterwards: the worker that
        # was answering requests meanwhile may have taken the one that woke us.
        async with self._turn:
            while True:
                if self._closing:
                    raise trio.ClosedResourceError
                await trio.lowlevel.wait_readable(fd)
                if self._ask(0):
                    break
        if self._direct and not self._waiting:
            self._slice_end_ns = self._now_ns() + self._slice_ns

    def _adopt(self, fd: int) -> None:
        # A request can be withdrawn between poll and read (its sender is killed). A blocking
        # read would then hold the interpreter lock until somebody else sends one.
        os.set_blocking(fd, False)
        self._poll.register(fd, select.POLLIN)
        self._fd = fd


class _AtOnce:
    """What has not to be waited for; cheaper than a coroutine, and used three times a request."""

    def __await__(self) -> Generator[None, None, None]:
        return _NOTHING_TO_WAIT_FOR


_NOTHING_TO_WAIT_FOR = cast("Generator[None, None, None]", iter(()))
_AT_ONCE = _AtOnce()


class _NoLock:
    def __aenter__(self) -> _AtOnce:
        return _AT_ONCE

    def __aexit__(self, *exc_info: object) -> _AtOnce:
        return _AT_ONCE


class _Nursery:
    """A trio nursery whose workers outlive a read that found nothing."""

    def __init__(self) -> None:
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery

    async def __aenter__(self) -> _Nursery:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._manager.__aexit__(kind, error, traceback)

    def start_soon(
        self, worker: Callable[..., Awaitable[None]], *args: object, name: object = None
    ) -> None:
        self._nursery.start_soon(_work, worker, args, name=name)


async def _work(worker: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
    while True:
        try:
            return await worker(*args)
        except OSError as error:
            # pyfuse3 raises this for a non-blocking descriptor without a request.
            if error.errno != errno.EAGAIN:
                raise
