"""Mount, ready, unmount."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pyfuse3
import trio

from cgfs.errors import MountError
from cgfs.fuse import fusermount
from cgfs.fuse.attributes import Owner
from cgfs.fuse.driver import Driver
from cgfs.fuse.operations import Operations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from cgfs.fuse.gate import Gate
    from cgfs.views.tree import Tree

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# A parked request keeps its worker, and there must always be one left to answer READ.
_MAX_WORKERS = 1_000_000

_UNMOUNT_S = 5.0
_session_taken = False


class Mount:
    """A mount that is being served.

    Attributes:
        mountpoint: its absolute path.
        ended: set when requests are no longer served, for whatever reason.
    """

    def __init__(self, mountpoint: str, operations: Operations) -> None:
        self.mountpoint = mountpoint
        self.ended = trio.Event()
        self._operations = operations

    async def change(self, rows: Sequence[str], act: Callable[[], _Result]) -> _Result:
        """Changes texts of CONFIG files from inside the process.

        After it returns no reader sees an older text. Changes made without it reach readers too,
        shortly after.

        Args:
            rows: names of the files whose text may change, such as "misc.capacity".
            act: makes the change in the model; must not wait.

        Returns:
            What ``act`` returned.
        """
        return await self._operations.change(rows, act)


@contextlib.asynccontextmanager
async def mounted(tree: Tree, mountpoint: str, **options: Any) -> AsyncIterator[Mount]:  # noqa: ANN401
    """Serves a tree inside the block; arguments as `serve`.

    The block is cancelled when somebody else unmounts the file system.

    Raises:
        MountError: as `serve`.
    """
    with _single_error():
        async with trio.open_nursery() as nursery:
            mount: Mount = await nursery.start(_serve_options, tree, mountpoint, options)
            nursery.start_soon(_cancel_at_end, mount, nursery.cancel_scope)
            yield mount
            nursery.cancel_scope.cancel()


async def serve(
    tree: Tree,
    mountpoint: str,
    *,
    fsname: str = "cgfs",
    subtype: str = "cgfs",
    allow_other: bool | None = None,
    owner: tuple[int, int] | None = None,
    over: bool = False,
    direct: bool = True,
    gate: Gate | None = None,
    now_ns: Callable[[], int] = time.time_ns,
    task_status: trio.TaskStatus[Mount] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mounts a tree and serves it until cancelled or unmounted by somebody else.

    One mount per process: pyfuse3 keeps its session in global variables.

    Args:
        tree: what to serve; its ``listener`` and ``known`` are set here.
        mountpoint: a directory.
        fsname: the source in /proc/self/mounts.
        subtype: the type there is ``fuse.`` and this.
        allow_other: let other users in; None: as root yes, else if /etc/fuse.conf allows it.
        owner: (uid, gid) who plays the model's root; None: whoever mounts.
        over: accept a directory that is a mount point already.
        direct: ask the FUSE device directly between turns of the event loop.
        gate: with other times than the default ones.
        now_ns: the model's time.
        task_status: started with the `Mount` once it can be used.

    Raises:
        MountError: one line for a person.
    """
    global _session_taken  # noqa: PLW0603 - mirrors pyfuse3's own
    if _session_taken:
        raise MountError(f"{mountpoint}: this process serves a mount already")
    path = fusermount.check(mountpoint, over=over)
    if allow_other is None:
        allow_other = os.geteuid() == 0 or fusermount.user_allow_other()
    uid, gid = (os.geteuid(), os.getegid()) if owner is None else owner
    driver = Driver(direct=direct)
    operations = Operations(tree, driver, owner=Owner(uid, gid), gate=gate, now_ns=now_ns)
    connection = fusermount.connect(path, fusermount.Options(fsname, subtype, allow_other))
    _session_taken = True
    try:
        with driver.installed(), _single_error():
            await _run(Mount(path, operations), operations, connection, task_status)
    finally:
        _session_taken = False


async def _run(
    mount: Mount,
    operations: Operations,
    connection: fusermount.Connection,
    task_status: trio.TaskStatus[Mount],
) -> None:
    try:
        pyfuse3.init(cast("Any", operations), f"/dev/fd/{connection.fd}", set())
    except RuntimeError as error:
        connection.unmount()
        connection.abort()
        connection.dismiss()
        raise MountError(f"{mount.mountpoint}: {error}") from None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_answer_requests, mount)
        operations.notifier.start(os.fsencode(mount.mountpoint))
        nursery.start_soon(operations.notifier.run)
        try:
            await _first_request(mount)
            task_status.started(mount)
            await mount.ended.wait()
        finally:
            with trio.CancelScope(shield=True):
                await _unmount(mount, operations, connection)
            nursery.cancel_scope.cancel()


async def _answer_requests(mount: Mount) -> None:
    # Requests are answered until the very end of unmounting, which needs answers itself.
    with trio.CancelScope(shield=True):
        try:
            await pyfuse3.main(max_tasks=_MAX_WORKERS)
        finally:
            mount.ended.set()


async def _first_request(mount: Mount) -> None:
    """Waits until the kernel and the session have agreed; from a thread, for we must answer."""
    try:
        await trio.to_thread.run_sync(os.stat, mount.mountpoint)
    except OSError as error:
        raise MountError(f"{mount.mountpoint}: {error.strerror}") from None


async def _unmount(mount: Mount, operations: Operations, connection: fusermount.Connection) -> None:
    """Ends everything in the order in which nothing waits for what has already ended."""
    quiet = await operations.notifier.stop()
    with trio.move_on_after(_UNMOUNT_S):
        await trio.to_thread.run_sync(connection.unmount, abandon_on_cancel=True)
    connection.abort()
    if not quiet and not operations.notifier.join(1.0):
        log.error("a thread is stuck in the kernel; leaving the session to the process's end")
        return
    if not mount.ended.is_set():
        pyfuse3.terminate()
        await mount.ended.wait()
    operations.close()
    pyfuse3.close(unmount=False)
    await trio.to_thread.run_sync(connection.dismiss)


@contextlib.contextmanager
def _single_error() -> Iterator[None]:
    """Raises the one error of a group as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise


async def _serve_options(
    tree: Tree,
    mountpoint: str,
    options: dict[str, Any],
    *,
    task_status: trio.TaskStatus[Mount],
) -> None:
    await serve(tree, mountpoint, task_status=task_status, **options)


async def _cancel_at_end(mount: Mount, scope: trio.CancelScope) -> None:
    await mount.ended.wait()
    scope.cancel()
