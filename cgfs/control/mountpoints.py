r"""Which file systems are mounted where, and how to take one away.

Nothing here asks the mounted file system itself, so that a dead or stuck server behind a mount
cannot stop us: paths are resolved with O_PATH, mounts are found in ``/proc/self/mountinfo``.
"""

import ctypes
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cgfs.control.errors import CommandError, from_oserror

MNT_DETACH = 2
_USER_ID = re.compile(r"(?:^|,)user_id=([0-9]+)")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: where, which type (``fuse.kvmsim``), from what, whose.

    ``uid`` is the user who mounted a FUSE file system; 0 for any other.
    """

    directory: Path
    fstype: str
    source: str
    uid: int = 0


def resolve(directory: str | os.PathLike[str]) -> Path:
    """The absolute path of a directory, without asking what is mounted there.

    Raises:
        OSError: it does not exist or cannot be reached.
    """
    descriptor = os.open(directory, os.O_PATH)
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    finally:
        os.close(descriptor)


def parse_mountinfo(text: str) -> Iterator[Mount]:
    """The mounts of a mountinfo text, oldest first (proc(5))."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        owner = _USER_ID.search(tail[2])
        uid = int(owner[1]) if owner else 0
        yield Mount(Path(_plain(fields[4])), tail[0], _plain(tail[1]), uid)


def mount_at(directory: Path) -> Mount | None:
    """The newest mount on a directory (a resolved path); None if it is no mount point."""
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    found = [mount for mount in parse_mountinfo(text) if mount.directory == directory]
    return found[-1] if found else None


def is_dead(directory: Path) -> bool:
    """Whether the server behind a FUSE mount has gone.

    The kernel may answer stat(2) from what it remembers; statfs(2) it always passes on.
    """
    try:
        os.statvfs(directory)
    except OSError as error:
        return error.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    return False


def unmount(directory: Path, *, lazy: bool = True) -> None:
    """Takes a FUSE mount away: as root by umount2, else through the set-uid fusermount3.

    Args:
        directory: a resolved path.
        lazy: also when it is in use; users keep what they have open until they let go of it.

    Raises:
        CommandError: it is busy (EX_TEMPFAIL), not ours (EX_NOPERM), or the helper is missing.
    """
    if os.geteuid() == 0:
        _umount2(directory, MNT_DETACH if lazy else 0)
    else:
        _fusermount(directory, lazy=lazy)


def _umount2(directory: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(directory), flags) != 0:
        number = ctypes.get_errno()
        raise from_oserror(OSError(number, os.strerror(number)), f"cannot unmount {directory}")


def _fusermount(directory: Path, *, lazy: bool) -> None:
    helper = shutil.which("fusermount3")
    if helper is None:
        raise CommandError("fusermount3 is not installed (Debian package fuse3)")
    options = ["-u", "-q"] + (["-z"] if lazy else [])
    done = subprocess.run([helper, *options, "--", directory], check=False, capture_output=True)
    if done.returncode != 0:
        reason = os.fsdecode(done.stderr).strip() or f"fusermount3 exited with {done.returncode}"
        raise CommandError(f"cannot unmount {directory}: {reason}", os.EX_OSERR)


@dataclass(frozen=True, slots=True)
class User:
    """A process that has its directory or an open file below a mount."""

    pid: int
    name: str


def users_below(directory: Path) -> list[User]:
    """Processes that still use something at or below a directory, as far as we may look.

    Only symbolic links in /proc are read, which does not reach the mounted file system.
    """
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if any(_is_below(link, directory) for link in _links(proc)):
                found.append(User(int(proc.name), (proc / "comm").read_text().strip()))
        except OSError:
            continue  # it ended, or belongs to somebody else
    return sorted(found, key=lambda user: user.pid)


def _links(proc: Path) -> Iterator[str]:
    for link in (proc / "cwd", proc / "root", *(proc / "fd").glob("*")):
        try:
            yield os.readlink(link)  # noqa: PTH115 - Path would normalise "socket:[1]"
        except FileNotFoundError:
            continue


def _is_below(target: str, directory: Path) -> bool:
    return target == str(directory) or target.startswith(f"{directory}/")


def _plain(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)
