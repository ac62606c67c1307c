"""The two worlds a test runs in: the machine's own cgroup2 and a mount of ours."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.calls import attempt, eventually, numbers, opened, read, write

if TYPE_CHECKING:
    from collections.abc import Iterator

CLEANUP_S = 10.0
# What our machine has of the one resource it has.
CAPACITY = 10


@dataclass(frozen=True)
class World:
    """One hierarchy under test, with the controller that has files in it.

    `hugetlb` stands in for our controllers on a real kernel: it is the one a cgroup2 nearly always
    has. `limit`, `current`, `events` and `events_local` are the corresponding file names.
    """

    kind: str
    root: Path
    controller: str
    limit: str
    current: str
    events: str
    events_local: str

    @property
    def is_linux(self) -> bool:
        """Whether the real kernel answers."""
        return self.kind == "linux"

    def path_of(self, cgrp: Path) -> bytes:
        """The path of a cgroup as /proc/PID/cgroup shows it."""
        return b"/" + os.fsencode(cgrp.relative_to(self.root))

    def limit_text(self, amount: int) -> bytes:
        """What to write into the limit file; `amount` in units (hugetlb: pages of 2 MiB)."""
        return b"%d" % (amount << 21) if self.is_linux else b"sev %d" % amount

    def controllers(self, cgrp: Path) -> set[str]:
        """Controllers enabled for the children of a cgroup."""
        return set((cgrp / "cgroup.subtree_control").read_text().split())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs of these tests away: all share the root's subtree_control."""
        with opened(self.root) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)

    @contextmanager
    def root_controller(self, *, on: bool) -> Iterator[None]:
        """Enables or disables the controller at the root for a block.

        Raises:
            OSError: Somebody else's cgroups use it.
        """
        control = self.root / "cgroup.subtree_control"
        was_on = self.controller in self.controllers(self.root)
        self._switch(control, on=on)
        try:
            yield
        finally:
            self._restore(control, on=was_on)

    def _restore(self, control: Path, *, on: bool) -> None:
        """Somebody else may have begun to use the controller of the machine's own hierarchy."""
        try:
            self._switch(control, on=on)
        except OSError as error:
            if not self.is_linux or error.errno != errno.EBUSY:
                raise

    def _switch(self, control: Path, *, on: bool) -> None:
        if on != (self.controller in self.controllers(control.parent)):
            control.write_text(("+" if on else "-") + self.controller)


LINUX = {
    "controller": "hugetlb",
    "limit": "hugetlb.2MB.max",
    "current": "hugetlb.2MB.current",
    "events": "hugetlb.2MB.events",
    "events_local": "hugetlb.2MB.events.local",
}
CGFS = {
    "controller": "misc",
    "limit": "misc.max",
    "current": "misc.current",
    "events": "misc.events",
    "events_local": "misc.events.local",
}


def cgroup2_root() -> Path | str:
    """Finds a writable cgroup2 mount with the stand-in controller; otherwise says why not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind != "cgroup2":
            continue
        if "rw" not in options.split(",") or not os.access(where, os.W_OK):
            return f"the cgroup2 at {where} is not writable"
        if LINUX["controller"] not in Path(where, "cgroup.controllers").read_text().split():
            return f"the cgroup2 at {where} does not have {LINUX['controller']}"
        return Path(where)
    return "no cgroup2 is mounted"


def below(cgrp: Path) -> list[Path]:
    """All cgroups below one, children before their parents, the cgroup itself last."""
    return [Path(where) for where, _, _ in os.walk(cgrp, topdown=False)]


@contextmanager
def fresh(root: Path) -> Iterator[Path]:
    """Makes a cgroup with a name of its own for a block."""
    cgrp = root / f"oracle-{os.getpid()}-{time.monotonic_ns()}"
    cgrp.mkdir()
    try:
        yield cgrp
    finally:
        clear(cgrp)


def clear(cgrp: Path) -> None:
    """Kills everything in a cgroup and removes it with everything below.

    Raises:
        OSError: Something in it would not go.
    """
    if not cgrp.exists():
        return
    _kill_all(cgrp)
    for directory in below(cgrp):
        # Mode and sticky tests may leave a directory nobody but root can change; root can.
        eventually(lambda it=directory: attempt(os.rmdir, it) in {"ok", "ENOENT"}, CLEANUP_S)
    if cgrp.exists():
        raise OSError(f"{cgrp} would not go: {read(cgrp / 'cgroup.procs')!r}")


def _kill_all(cgrp: Path) -> None:
    # A test that goes wrong may have moved the tests themselves into it.
    if any(os.getpid() in _listed(directory / "cgroup.procs") for directory in below(cgrp)):
        write(cgrp.parent / "cgroup.procs", b"%d" % os.getpid())
    write(cgrp / "cgroup.kill", b"1")
    # Linux 6.18: cgroup.kill does not reach threads whose leader has exited; kill(2) does.
    for directory in below(cgrp):
        for pid in [*_listed(directory / "cgroup.procs"), *_listed(directory / "cgroup.threads")]:
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _listed(path: Path) -> list[int]:
    pids = numbers(path)
    return [] if isinstance(pids, str) else [pid for pid in pids if pid]
