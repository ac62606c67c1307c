"""Pid numbers between pid namespaces.

A request names its caller by the number our own pid namespace knows it by, whereas the numbers that
the caller writes and reads are those of its own namespace (Linux: `task_pid_vnr`). `NSpid:` of
/proc/TID/status lists a task's number in each namespace from ours down to its own.
"""

import fcntl
import os
from contextlib import suppress

from cgfs.procs import proc

NS_GET_PARENT = 0xB702  # linux/nsfs.h: _IO(0xb7, 2)


class Namespaces:
    """Translates pid numbers for callers, remembering the last caller.

    A task's pid namespace is fixed for its life, so what is remembered only has to be dropped
    before the caller's number can belong to another task: `forget` at the start of every question.
    """

    def __init__(self) -> None:
        self._own = _readlink(os.getpid())
        self._caller = 0
        self._caller_level: tuple[int, str] | None = None

    def forget(self) -> None:
        """Drop what is known about the last caller."""
        self._caller = 0

    def from_caller(self, caller_tid: int, number: int) -> int | None:
        """Our number of the task that the caller knows as `number`; None if there is none."""
        level = self._level(caller_tid)
        if level is None:
            return None
        if level[0] == 0:
            return number if proc.state(f"/proc/{number}/stat") is not None else None
        for pid in proc.all_pids():
            for tid in proc.tids(pid):
                if self._number(tid, level) == number:
                    return tid
        return None

    def to_caller(self, caller_tid: int, pid: int) -> int:
        """The caller's number of our task `pid`; 0 where the caller cannot see it."""
        level = self._level(caller_tid)
        if level is None:
            return 0
        return pid if level[0] == 0 else self._number(pid, level)

    def _level(self, caller_tid: int) -> tuple[int, str] | None:
        """How deep below ours the caller's namespace is, and its name; None: caller unknown."""
        if caller_tid != self._caller or not caller_tid:
            self._caller, self._caller_level = caller_tid, self._find_level(caller_tid)
        return self._caller_level

    def _find_level(self, caller_tid: int) -> tuple[int, str] | None:
        if caller_tid <= 0:  # the file system's name for a caller outside our namespace
            return None
        name = _readlink(caller_tid)
        if name and name == self._own:
            return 0, name
        status = proc.read_status(caller_tid)
        return (len(status.pids) - 1, name) if status else None

    def _number(self, tid: int, level: tuple[int, str]) -> int:
        """The number of one task in a namespace `level`, 0 if it is not visible there."""
        depth, name = level
        status = proc.read_status(tid)
        if status is None or len(status.pids) <= depth:
            return 0
        if _ancestor(tid, len(status.pids) - 1 - depth) != name:
            return 0
        return status.pids[depth]


def _readlink(tid: int) -> str:
    """The name of a task's pid namespace, such as `pid:[4026531836]`; empty if not permitted."""
    with suppress(OSError):
        return os.readlink(f"/proc/{tid}/ns/pid")  # noqa: PTH115
    return ""


def _ancestor(tid: int, levels: int) -> str:
    """The name of the namespace `levels` above a task's own; empty if it cannot be told."""
    if levels == 0:
        return _readlink(tid)
    try:
        fd = os.open(f"/proc/{tid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        for _ in range(levels):
            above = fcntl.ioctl(fd, NS_GET_PARENT)
            os.close(fd)
            fd = above
        return f"pid:[{os.fstat(fd).st_ino}]"
    except OSError:
        return ""
    finally:
        os.close(fd)
