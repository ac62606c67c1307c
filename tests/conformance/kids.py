"""Child processes that do what the test tells them, and die with it."""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance import syscalls
from conformance.calls import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

ANSWER_S = 20.0
NOBODY = 65534
_PR_SET_PDEATHSIG = 1
_parent_ends: set[int] = set()


class Kid:
    """A forked child that runs functions on request.

    Functions and arguments travel as pickles, so a function must be a module's own. What the
    function raises is raised in the parent. The child dies with the parent, or on `end`.
    """

    def __init__(self) -> None:
        request_r, self._requests = os.pipe()
        self._answers, answer_w = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(request_r, answer_w, {self._requests, self._answers} | _parent_ends)
        os.close(request_r)
        os.close(answer_w)
        _parent_ends.update({self._requests, self._answers})
        self._reaped = False

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in the child and returns its result."""
        self.start(function, *args)
        return self.finish()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Asks the child to run a function without waiting for the answer."""
        request = pickle.dumps((function, args))
        os.write(self._requests, struct.pack("I", len(request)) + request)

    def finish(self, timeout_s: float = ANSWER_S) -> Any:
        """Waits for the answer of what was started.

        Raises:
            TimeoutError: The child did not answer.
        """
        if not select.select([self._answers], [], [], timeout_s)[0]:
            raise TimeoutError(f"child {self.pid} did not answer in {timeout_s} s")
        error, result = pickle.loads(_receive(self._answers))
        if error is not None:
            raise error
        return result

    @property
    def state(self) -> str:
        """The state letter of /proc/PID/stat, "-" once reaped."""
        return state_of(self.pid)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal and, if it is SIGKILL, waits until the child is a zombie."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            eventually(lambda: self.state in "ZX-")

    def died_by(self, timeout_s: float = 5.0) -> int | None:
        """Reaps the child and returns the signal that ended it, None if it did not end."""
        if not eventually(lambda: self.state in "ZX-", timeout_s):
            return None
        self._reaped = True
        return os.WTERMSIG(os.waitpid(self.pid, 0)[1])

    def reap(self) -> None:
        """Collects a dead child."""
        self.died_by()

    def end(self) -> None:
        """Kills and reaps the child, whatever it is doing."""
        for fd in (self._requests, self._answers):
            if fd in _parent_ends:
                _parent_ends.discard(fd)
                os.close(fd)
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
            self._reaped = True
            os.waitpid(self.pid, 0)


def state_of(tid: int) -> str:
    """Returns the state letter of a task, "-" if there is none."""
    try:
        stat = Path(f"/proc/{tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "-"
    return stat.rpartition(")")[2].split()[0]


def _receive(fd: int) -> bytes:
    header = os.read(fd, 4)
    if len(header) < 4:
        raise EOFError("the other side is gone")
    wanted = struct.unpack("I", header)[0]
    data = b""
    while len(data) < wanted:
        data += os.read(fd, wanted - len(data))
    return data


def _serve(requests: int, answers: int, not_mine: set[int]) -> None:
    try:
        syscalls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for fd in not_mine:
            os.close(fd)
        _parent_ends.clear()
        while True:
            function, args = pickle.loads(_receive(requests))
            answer = pickle.dumps(_run(function, args))
            os.write(answers, struct.pack("I", len(answer)) + answer)
    finally:
        os._exit(0)


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[BaseException | None, Any]:
    try:
        return None, function(*args)
    except Exception as error:
        return error, None


# Functions for Kid.do


def become(uid: int, gid: int | None = None) -> None:
    """Gives up root for good."""
    os.setgroups([])
    os.setresgid(*[uid if gid is None else gid] * 3)
    os.setresuid(uid, uid, uid)


def seteuid(uid: int) -> None:
    """Changes the effective user only."""
    os.seteuid(uid)


def start_thread() -> int:
    """Starts a thread that sleeps for ever; returns its TID."""
    ready = threading.Event()
    thread = threading.Thread(target=_park, args=(ready,), daemon=True)
    thread.start()
    ready.wait(ANSWER_S)
    return thread.native_id or 0


def _park(ready: threading.Event) -> None:
    ready.set()
    syscalls.pause_forever()


def call_in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function in a new thread, which then sleeps for ever; returns (TID, result)."""
    results: list[Any] = []
    ready = threading.Event()

    def body() -> None:
        results.append(_run(function, args))
        _park(ready)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    ready.wait(ANSWER_S)
    error, result = results[0]
    if error is not None:
        raise error
    return thread.native_id, result


def end_leader() -> None:
    """Ends the main thread while the other threads go on; there is no answer."""
    syscalls.exit_thread()


def fork_sleeper() -> int:
    """Forks a child that sleeps until it or its parent is killed; returns its pid."""
    return _child_that_sleeps(os.getpid(), os.fork())


def clone_sleeper(cgroup_fd: int) -> int:
    """Clones a sleeping child into the cgroup of a directory descriptor; returns its pid."""
    return _child_that_sleeps(os.getpid(), syscalls.clone3_into(cgroup_fd))


def _child_that_sleeps(parent: int, pid: int) -> int:
    if pid == 0:
        syscalls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before it was asked for.
        if os.getppid() == parent:
            syscalls.pause_forever()
        os._exit(0)
    return pid


def in_pid_namespace(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function in a child that is the first process of a new pid namespace."""
    syscalls.unshare(syscalls.CLONE_NEWPID)
    kid = Kid()
    try:
        return kid.do(function, *args)
    finally:
        kid.end()


def own_cgroup() -> bytes:
    """Returns the v2 line of /proc/self/cgroup."""
    return cgroup_of("self")


def cgroup_of(pid: int | str) -> bytes:
    """Returns the v2 line of /proc/PID/cgroup."""
    lines = Path(f"/proc/{pid}/cgroup").read_bytes().splitlines()
    return next(line for line in lines if line.startswith(b"0::"))
