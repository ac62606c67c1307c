"""Processes held by pidfd: which of them are gone, told by one system call.

A pidfd names one process for good, so a number that the kernel hands out again is never mistaken
for the process that was watched. It becomes readable when the last thread of the process has died,
before anybody can reap it: the moment at which a process leaves its cgroup.
"""

import logging
import os
import resource
import select
import signal
from contextlib import suppress

from cgfs.procs import proc

log = logging.getLogger(__name__)


class Pidfds:
    """The held processes, in one epoll set that other descriptors may join.

    Where no descriptor is left for a process, its start time stands in for the pidfd, and `gone`
    looks at it in /proc each time.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._alarm, select.EPOLLIN)
        self._fd: dict[int, int] = {}  # by tgid
        self._tgid: dict[int, int] = {}  # by pidfd
        self._start: dict[int, int] = {}  # start ticks by tgid, of those without a pidfd
        self._refused: set[int] = set()  # tgids whose refusal was logged
        self._limit_raised = False

    def fileno(self) -> int:
        """Readable when `gone` has an answer or a descriptor that joined is readable."""
        return self._epoll.fileno()

    def wake(self) -> None:
        """Make `fileno` readable until `woken`."""
        os.eventfd_write(self._alarm, 1)

    def woken(self) -> None:
        """Whoever waits for `fileno` is awake."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._alarm)

    def join(self, fd: int) -> None:
        """Let another descriptor make `fileno` readable too."""
        self._epoll.register(fd, select.EPOLLIN)

    def leave(self, fd: int) -> None:
        """Undo `join`."""
        self._epoll.unregister(fd)

    def add(self, tgid: int) -> bool:
        """Hold a process.

        Returns:
            False if there is no such process (any more).
        """
        if tgid in self._fd or tgid in self._start:
            return True
        try:
            fd = self._open(tgid)
        except OSError as err:
            if isinstance(err, ProcessLookupError):
                return False
            return self._add_without_pidfd(tgid)
        self._fd[tgid] = fd
        self._tgid[fd] = tgid
        self._epoll.register(fd, select.EPOLLIN)
        return True

    def discard(self, tgid: int) -> None:
        """Let go of a process, if it is held."""
        self._start.pop(tgid, None)
        self._refused.discard(tgid)
        fd = self._fd.pop(tgid, None)
        if fd is not None:
            del self._tgid[fd]
            os.close(fd)  # closing also takes it out of the epoll set

    def gone(self) -> list[int]:
        """The held processes that have died, still held."""
        ready = self._epoll.poll(0, len(self._fd) + 8)
        found = [self._tgid[fd] for fd, _ in ready if fd in self._tgid]
        found += [tgid for tgid, start in self._start.items() if not _runs_since(tgid, start)]
        return found

    def alive(self, tgid: int) -> bool:
        """Whether a held process, and not a later one of the same number, has a live thread."""
        if tgid in self._start:
            return _runs_since(tgid, self._start[tgid])
        if tgid not in self._fd:
            return False
        poll = select.poll()
        poll.register(self._fd[tgid], select.POLLIN)
        return not poll.poll(0)

    def send(self, tgid: int, signum: signal.Signals) -> None:
        """Signal a process; one that is gone or not ours to signal is left alone."""
        try:
            if tgid in self._fd:
                signal.pidfd_send_signal(self._fd[tgid], signum)
            elif tgid not in self._start or self.alive(tgid):
                os.kill(tgid, signum)
        except ProcessLookupError:
            pass
        except PermissionError:
            # An ordinary user's server: Linux would need no permission beyond the file's.
            if tgid not in self._refused:
                log.warning("no permission to send %s to process %d", signum.name, tgid)
                self._refused.add(tgid)

    def close(self) -> None:
        """Let go of everything; harmless when repeated."""
        if self._epoll.closed:
            return
        for tgid in list(self._fd):
            self.discard(tgid)
        self._start.clear()
        self._epoll.close()
        os.close(self._alarm)

    def _open(self, tgid: int) -> int:
        try:
            return os.pidfd_open(tgid)
        except ProcessLookupError:
            raise
        except OSError:
            if self._limit_raised:
                raise
            self._raise_limit()
            return os.pidfd_open(tgid)

    def _raise_limit(self) -> None:
        """Use all the descriptors we may have; the usual soft limit of 1024 is soon spent."""
        self._limit_raised = True
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def _add_without_pidfd(self, tgid: int) -> bool:
        stat = proc.read_stat(tgid)
        if stat is None:
            return False
        self._start[tgid] = stat.start_ticks
        return True


def _runs_since(tgid: int, start_ticks: int) -> bool:
    stat = proc.read_stat(tgid)
    return stat is not None and stat.start_ticks == start_ticks and proc.process_alive(tgid)
