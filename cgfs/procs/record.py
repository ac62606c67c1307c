"""Real processes, with a record of the frozen ones for whoever cleans up after a crash.

A server that ends in order lets every frozen process go on. One that is killed cannot; then the
record says whom it has stopped. A line is ``+PID START`` or ``-PID START``, START being the
process's start time in clock ticks since boot (field 22 of /proc/PID/stat); the last one counts.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from cgfs.procs import proc
from cgfs.procs.processes import RealProcesses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cgfs.procs.forks import ForkSource
    from cgfs.procs.processes import Members

log = logging.getLogger(__name__)


class RecordedProcesses(RealProcesses):
    """The `Processes` of a host, as `RealProcesses`.

    Args:
        forks: where news of forks comes from.
        clock: nanoseconds, the model's `now_ns`.
        members: whom to tell.
        record: the file, made when the first process is frozen and gone when none is.
    """

    def __init__(
        self, forks: ForkSource, clock: Callable[[], int], members: Members, record: Path
    ) -> None:
        super().__init__(forks, clock, members)
        self._record = record
        self._recorded: dict[int, int] = {}

    def freeze(self, tgid: int) -> None:
        """Make a process stand still as soon as it can; one that does already is not recorded."""
        stat = proc.read_stat(tgid)
        if stat is not None and stat.state not in proc.STOPPED_STATES and not stat.kthread:
            # Written before the signal: a record of too many is harmless, of too few is not.
            self._recorded[tgid] = stat.start_ticks
            self._write(f"+{tgid} {stat.start_ticks}\n")
        super().freeze(tgid)

    def thaw(self, tgid: int) -> None:
        """Undo `freeze`."""
        super().thaw(tgid)
        self._strike(tgid)

    def _gone(self, tgid: int) -> None:
        super()._gone(tgid)
        self._strike(tgid)

    def _strike(self, tgid: int) -> None:
        """Take a process out of the record, if it is there."""
        start_ticks = self._recorded.pop(tgid, None)
        if start_ticks is None:
            return
        if self._recorded:
            self._write(f"-{tgid} {start_ticks}\n")
        else:
            self._record.unlink(missing_ok=True)

    def close(self) -> None:
        """Let all frozen processes go on, and let go of everything."""
        super().close()
        self._recorded.clear()
        self._record.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            descriptor = os.open(self._record, flags, 0o600)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            # A full disk must not stop the freezer; only the help after a crash is less.
            log.warning("%s, which lists the frozen processes: %s", self._record, error.strerror)
