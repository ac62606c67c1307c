"""Lets the processes go on that a server had stopped when it was killed.

The server writes the record (``cgfs.procs.record``): lines ``+PID START`` and ``-PID START``.
"""

import os
import re
import signal
from pathlib import Path

from cgfs.control.runtime_dir import owner, start_time

LINE = re.compile(r"^([+-])([0-9]+) ([0-9]+)\n", re.MULTILINE)


def thaw_recorded(record: Path, uid: int) -> list[int]:
    """Continues every process that a record says is stopped, and removes the record.

    Args:
        record: the file; nothing happens without it.
        uid: whose server wrote it. Nobody else's processes are touched, unless that is root.

    Returns:
        The processes, ascending.
    """
    try:
        text = record.read_text()
    except FileNotFoundError:
        return []
    continued = [
        pid
        for pid, started in sorted(parse(text).items())
        if uid in {0, owner(pid)} and _continue(pid, started)
    ]
    record.unlink(missing_ok=True)
    return continued


def parse(text: str) -> dict[int, int]:
    """Pid to start time of those that are stopped at the end of a record.

    A last line without its end is one that the server did not finish.
    """
    stopped: dict[int, int] = {}
    for sign, pid, started in LINE.findall(text):
        if sign == "+":
            stopped[int(pid)] = int(started)
        else:
            stopped.pop(int(pid), None)
    return stopped


def _continue(pid: int, started: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(process, signal.SIGCONT)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(process)
    return True
