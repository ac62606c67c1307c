"""Runs the v1 release agent: a program told the path of a cgroup that has become empty.

Linux 6.12 kernel/cgroup/cgroup-v1.c cgroup1_release_agent(): `<agent> <path>` with two environment
variables, as root, its result ignored.
"""

from __future__ import annotations

import logging
import math
import subprocess

import trio

log = logging.getLogger(__name__)

ENVIRONMENT = {"HOME": "/", "PATH": "/sbin:/bin:/usr/sbin:/usr/bin"}
AT_ONCE = 16  # agents that run at the same time; the kernel has its workers' number


class ReleaseAgent:
    """A queue of releases, filled by the model and emptied by `run`."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[str, str]](math.inf)

    def submit(self, agent: str, path: str) -> None:
        """Run `agent` with `path` (from the hierarchy's root, beginning with "/") soon.

        Never blocks and never raises, so that the model can call it anywhere. An empty agent is
        none.
        """
        if agent:
            self._send.send_nowait((agent, path))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what is submitted until cancelled; agents that still run then are ended."""
        limit = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for agent, path in self._receive.clone():
                nursery.start_soon(_run_agent, agent, path, limit)


async def _run_agent(agent: str, path: str, limit: trio.CapacityLimiter) -> None:
    async with limit:
        try:
            done = await trio.run_process(
                [agent, path],
                env=ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except OSError as err:
            log.warning("release agent %s: %s", agent, err.strerror)
            return
    if done.returncode:
        log.info("release agent %s %s: status %d", agent, path, done.returncode)
