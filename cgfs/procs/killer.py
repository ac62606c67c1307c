"""Killing that forks cannot outrun.

Linux compares a sequence number at the end of fork, so that a child born during a kill dies too
(kernel/cgroup/cgroup.c cgroup_post_fork()). Here a killed process is remembered until it is gone,
and a child it is reported to have made is killed like its parent. A process with SIGKILL waiting
cannot complete a fork that it has not begun, so this ends.
"""

import signal

from cgfs.procs.pidfds import Pidfds


class Killer:
    """The processes that are being killed."""

    def __init__(self, pidfds: Pidfds) -> None:
        self._pidfds = pidfds
        self._dying: set[int] = set()

    def kill(self, tgid: int) -> None:
        """Send SIGKILL. A process that is gone already is left alone."""
        self._dying.add(tgid)
        self._pidfds.send(tgid, signal.SIGKILL)

    def forked(self, parent_tgid: int, child_tgid: int) -> None:
        """A process has a child: it shares the parent's fate."""
        if parent_tgid in self._dying:
            self.kill(child_tgid)

    def forget(self, tgid: int) -> None:
        """The process is gone."""
        self._dying.discard(tgid)
