"""Starting a server in the background.

The command that starts it returns when the server says that it is ready, and fails with the
server's own failure when it cannot get there. After that the server has nothing of the command
left: own session, no terminal, directory /, output into its log.
"""

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from cgfs.control.errors import CommandError, from_oserror
from cgfs.control.protocol import LineBuffer, Problem
from cgfs.control.runtime_dir import open_log

READY_SECONDS = 60.0


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a server tells the command that started it; ``pid`` first, then one of the others."""

    pid: int = 0
    ready: bool = False
    problem: Problem | None = None


class Readiness:
    """How a server tells the command that started it how far it is.

    Args:
        descriptor: the pipe to the command; None for a server in the foreground.
        when_ready: called once the server does its work.
    """

    def __init__(
        self, descriptor: int | None = None, when_ready: Callable[[], object] = lambda: None
    ) -> None:
        self._descriptor = descriptor
        self._when_ready = when_ready

    def ready(self) -> None:
        """Says that the server does its work; the command returns."""
        self._when_ready()
        self._send(Report(ready=True))
        self.close()

    def failed(self, failure: CommandError) -> None:
        """Says why the server gives up; a no-op once it has been ready."""
        self._send(Report(problem=Problem.of(failure)))
        self.close()

    def started(self) -> None:
        """Tells the server's pid, so that an interrupted command can end it."""
        self._send(Report(pid=os.getpid()))

    def close(self) -> None:
        """Lets go of the pipe."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def keep_only(self) -> None:
        """Closes every descriptor but the pipe and the standard three."""
        pipe = self._descriptor or 2
        os.closerange(3, pipe)
        os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))

    def _send(self, report: Report) -> None:
        if self._descriptor is not None:
            # A command that has gone (SIGKILL) does not stop the server it started.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._descriptor, msgspec.json.encode(report) + b"\n")


def start(serve: Callable[[Readiness], None], log: Path) -> int:
    """Runs ``serve`` in a background process and returns its pid once it is ready.

    Args:
        serve: runs the server until it ends; calls ``ready`` on the way. Called in the new
            process, so it had better import what is expensive itself.
        log: where the server's standard output and error go.

    Raises:
        CommandError: the server's own, or that it ended or hung before it was ready (EX_OSERR).
    """
    log_descriptor = open_log(log)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _detach(serve, Readiness(writer), log_descriptor)
    os.close(writer)
    os.close(log_descriptor)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        return _wait_ready(pipe.fileno(), log)


def _detach(serve: Callable[[Readiness], None], readiness: Readiness, log: int) -> None:
    """In the first child: leaves the session, forks the server, ends. Never returns."""
    try:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
        readiness.started()
        _redirect(log)
        readiness.keep_only()
        status = _run(serve, readiness)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    except BaseException:  # a forked copy must not return into the command
        os._exit(os.EX_OSERR)


def _run(serve: Callable[[Readiness], None], readiness: Readiness) -> int:
    try:
        serve(readiness)
    except CommandError as failure:
        _log(failure.message)
        readiness.failed(failure)
        return failure.exit_code
    except BaseException as error:  # the last chance to say what happened
        _log(traceback.format_exc())
        unexpected = _unexpected(error)
        readiness.failed(unexpected)
        return unexpected.exit_code
    return os.EX_OK


def _log(text: str) -> None:
    """Writes to standard error, which is the log; its disk may be full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)  # noqa: T201 - logging may not be set up yet


def _unexpected(error: BaseException) -> CommandError:
    """What to tell of an error that nobody has put into words."""
    if isinstance(error, OSError) and error.errno:
        return from_oserror(error, str(error.filename or "system error"))
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return CommandError(f"internal error: {last}", os.EX_SOFTWARE)


def _redirect(log: int) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    # Whatever the command made of its streams, ours are the descriptors.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # The command's choices for a terminal's signals are not the server's.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _wait_ready(pipe: int, log: Path) -> int:
    """Reads reports until the server is ready or is known not to become so."""
    pid = 0
    lines = LineBuffer()
    deadline = time.monotonic() + READY_SECONDS
    try:
        while True:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise CommandError(f"not ready after {READY_SECONDS:.0f} seconds", os.EX_OSERR)
            data = os.read(pipe, 65536)
            if not data:
                raise CommandError(f"ended before it was ready{_last_words(log)}", os.EX_OSERR)
            for line in lines.feed(data):
                report = msgspec.json.decode(line, type=Report)
                pid = report.pid or pid
                if report.problem is not None:
                    raise report.problem.failure()
                if report.ready:
                    return pid
    except BaseException:
        # Also an interrupted command (Ctrl-C) leaves no server behind.
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        raise


def _last_words(log: Path) -> str:
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    return f": {text.splitlines()[-1]}" if text else ""
