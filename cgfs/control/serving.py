"""The life of a serving process: it starts, is asked to stop, and says why if it cannot go on."""

import logging
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVarTuple

import trio

from cgfs.control.errors import CommandError
from cgfs.errors import MountError

log = logging.getLogger(__name__)

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Args = TypeVarTuple("Args")


def run(serve: Callable[[*Args], Awaitable[None]], *args: *Args) -> None:
    """Runs a server to its end under trio.

    Raises:
        CommandError: it cannot mount, or what it says itself.
        Exception: the error that ended it; a group if there were several.
    """
    try:
        trio.run(serve, *args)
    except BaseExceptionGroup as group:
        error = single(group)
        if isinstance(error, MountError):
            raise CommandError(str(error)) from error
        raise error from group


def single(error: BaseException) -> BaseException:
    """The one error in a group of one, however deep; else the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def stop_on_signal(
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Cancels a scope at the first SIGTERM, SIGINT or SIGHUP.

    A second one is ignored: the server is unmounting by then.
    """
    with trio.open_signal_receiver(*ASKING) as received:
        task_status.started()
        async for number in received:
            log.info("%s", signal.Signals(number).name)
            scope.cancel()
