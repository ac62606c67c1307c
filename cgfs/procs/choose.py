"""Picks the best way to follow forks that this machine and this user allow."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from cgfs.procs.connector import ProcConnector
from cgfs.procs.forks import Fork
from cgfs.procs.processes import Members, RealProcesses
from cgfs.procs.scan import ForkScan

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.procs.forks import ForkSource

log = logging.getLogger(__name__)


def open_processes(tasks: Members | None, clock: Callable[[], int]) -> RealProcesses:
    """The real processes of this machine.

    Args:
        tasks: the model's task table; may be set later as `members`.
        clock: the model's `now_ns`.
    """
    return RealProcesses(best_source(), clock, tasks)


def best_source() -> ForkSource:
    """The process connector if it works here, else looking at /proc."""
    try:
        connector = ProcConnector()
    except OSError as err:
        log.info("no process connector: %s", err.strerror)
        return ForkScan()
    try:
        heard = _hears_us(connector)
    except OSError as err:  # EPERM: an ordinary user before Linux 6.6
        log.info("no process connector: %s", err.strerror)
        heard = False
    if heard:
        return connector
    # In a container the kernel takes the subscription and then sends nothing, or sends pids of the
    # initial namespace, which are not ours.
    connector.close()
    return ForkScan()


def _hears_us(connector: ProcConnector) -> bool:
    """Whether the connector reports a thread that we start, by the numbers we know."""
    us = os.getpid()
    born: list[int] = []
    connector.start()
    thread = threading.Thread(target=lambda: born.append(threading.get_native_id()))
    thread.start()
    thread.join()
    news = list(connector.read({us: 0}))
    connector.stop()
    return Fork(us, us, born[0], us) in news
