"""From the command that mounts to a server that serves until it is told to stop."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cgfs.control.daemon import Readiness, start
from cgfs.control.errors import CommandError
from cgfs.control.frozen import thaw_recorded
from cgfs.control.place import Place, check_device, prepare
from cgfs.control.runtime_dir import Entry, RuntimeDir, start_time

DOWN = {"kvmsim": "kvmsim down", "cgfs": "cgfs umount"}


@dataclass(frozen=True, slots=True)
class Launch:
    """A server about to run: where it mounts, where it registers, whom it tells.

    ``log`` is None in the foreground.
    """

    kind: str
    place: Place
    runtime: RuntimeDir
    readiness: Readiness
    log: Path | None

    @property
    def directory(self) -> Path:
        """The directory to mount on."""
        return self.place.directory

    @property
    def socket(self) -> Path:
        """Where to listen."""
        return self.runtime.socket(self.directory)

    @property
    def frozen(self) -> Path:
        """Where to record which real processes are stopped."""
        return self.runtime.frozen(self.directory)

    def ready(self) -> None:
        """Registers the server and lets the command return."""
        pid = os.getpid()
        created = self.place.created
        started = start_time(pid) or 0
        directory = str(self.directory)
        self.runtime.write(Entry(self.kind, directory, pid, started, os.geteuid(), created))
        self.readiness.ready()

    def ended(self) -> None:
        """Takes the registration back."""
        self.runtime.remove(self.directory)
        self.place.abandon()


def launch(
    kind: str,
    directory: Path,
    serve: Callable[[Launch], None],
    *,
    foreground: bool = False,
    nonempty: bool = False,
) -> None:
    """Runs a server for a directory, in the background unless told otherwise.

    Returns once it is ready; in the foreground, once it has ended.

    Args:
        kind: ``kvmsim`` or ``cgfs``.
        directory: as the user wrote it.
        serve: mounts, calls ``ready`` and serves; returns when it has unmounted.
        foreground: stay in this process and log to standard error.
        nonempty: whether the directory's content may disappear below the mount.

    Raises:
        CommandError: it cannot be mounted; nothing is left behind.
    """
    check_device()
    runtime = RuntimeDir.mine()
    with ExitStack() as lock:
        lock.enter_context(runtime.locked())
        place = prepare(directory, DOWN[kind], nonempty=nonempty)
        before = runtime.read(place.directory)
        if before is not None and before.created:
            # Made for a server that died; it goes with this one.
            place = Place(place.directory, created=True)
        try:
            # What a server that died has left, with its mount cleared by somebody else.
            thaw_recorded(runtime.frozen(place.directory), os.geteuid())
            runtime.remove(place.directory)
        except OSError:
            place.abandon()
            raise
        if foreground:
            readiness = Readiness(when_ready=lock.close)
            _serve(serve, Launch(kind, place, runtime, readiness, None))
        else:
            log = runtime.log(place.directory)

            def in_background(readiness: Readiness) -> None:
                _serve(serve, Launch(kind, place, runtime, readiness, log))

            try:
                start(in_background, log)
            except BaseException:
                runtime.remove(place.directory)
                place.abandon()
                raise


def _serve(serve: Callable[[Launch], None], launch: Launch) -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s"
    )
    # A terminal that goes away ends a server in its foreground as Ctrl-C does.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    in_order = False
    try:
        serve(launch)
        in_order = True
    except CommandError:
        in_order = True
        raise
    finally:
        # What a bug leaves of a server in the background is its log, until somebody clears it.
        if in_order or launch.log is None:
            launch.ended()
