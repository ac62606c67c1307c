"""The directory a file system is mounted on: is it fit, and how is it cleared again."""

import contextlib
import errno
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

from cgfs.control.errors import CommandError, from_oserror
from cgfs.control.frozen import thaw_recorded
from cgfs.control.mountpoints import Mount, User, is_dead, mount_at, resolve, unmount, users_below
from cgfs.control.protocol import printable
from cgfs.control.runtime_dir import Entry, RuntimeDir, find_entry

OUR_TYPES = ("fuse.cgfs", "fuse.kvmsim")
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """A directory to mount on, as a resolved path; ``created`` if it was made for that."""

    directory: Path
    created: bool

    def abandon(self) -> None:
        """Removes the directory again if nothing came of it."""
        if self.created:
            with contextlib.suppress(OSError):
                self.directory.rmdir()


def prepare(directory: Path, down: str, *, nonempty: bool = False) -> Place:
    """Makes sure that a file system can be mounted on a directory.

    A missing directory is created, if its parent is there.

    Args:
        directory: as the user wrote it.
        down: the command that clears a mount, for messages: ``kvmsim down``.
        nonempty: whether its present content may disappear below the mount.

    Raises:
        CommandError: it cannot; the line says why and what to do.
    """
    created = _create(directory)
    try:
        resolved = resolve(directory)
    except OSError as error:
        raise from_oserror(error, str(directory)) from error
    place = Place(resolved, created)
    if not _is_text(resolved):
        place.abandon()
        raise CommandError(f"{printable(str(directory))}: the path is not UTF-8 text", os.EX_USAGE)
    if not created:
        _check_free(resolved, down, nonempty=nonempty)
    return place


def _is_text(path: Path) -> bool:
    """Whether entries and messages, which are JSON, can say a path."""
    return printable(str(path)) == str(path)


def check_device(device: Path = Path("/dev/fuse")) -> None:
    """Makes sure that FUSE can be used here.

    Raises:
        CommandError: there is no such device (EX_UNAVAILABLE), or it is not for us (EX_NOPERM).
    """
    if not device.exists():
        raise CommandError(f"no {device}: load the kernel's fuse module, or pass the device in")
    if not os.access(device, os.R_OK | os.W_OK):
        raise CommandError(f"no permission to open {device}", os.EX_NOPERM, errno.EACCES)


def _create(directory: Path) -> bool:
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in {errno.ENOTCONN, errno.EIO}:
            return False  # the server behind it is dead, told apart later
        raise from_oserror(error, f"cannot create {directory}") from error
    return True


def _check_free(directory: Path, down: str, *, nonempty: bool) -> None:
    mount = mount_at(directory)
    if mount is not None:
        _check_mount(directory, mount, down, nonempty=nonempty)
    try:
        with os.scandir(directory) as content:
            empty = next(content, None) is None
    except OSError as error:
        raise from_oserror(error, str(directory)) from error
    if not empty and not nonempty:
        raise CommandError(f"{directory}: the directory is not empty", errno=errno.ENOTEMPTY)
    if not os.access(directory, os.W_OK):
        raise CommandError(f"{directory}: no permission to mount here", os.EX_NOPERM, errno.EACCES)


def _check_mount(directory: Path, mount: Mount, down: str, *, nonempty: bool) -> None:
    """Refuses what is mounted already, and says what to do about it."""
    found = find_entry(directory) if mount.fstype in OUR_TYPES else None
    if found is not None and found[1].alive:
        raise CommandError(
            f"{directory}: already mounted (pid {found[1].pid}); end it with: {down} {directory}",
            errno=errno.EBUSY,
        )
    if found is not None or is_dead(directory):
        raise CommandError(
            f"{directory}: the server of this mount has died; clear it with: {down} {directory}",
            errno=errno.ENOTCONN,
        )
    if mount.fstype in OUR_TYPES or not nonempty:
        raise CommandError(
            f"{directory}: something is mounted here already ({mount.fstype})", errno=errno.EBUSY
        )


@dataclass(frozen=True, slots=True)
class Cleared:
    """What was found and done when a mount was cleared.

    ``users`` still have something of it open; it goes when they let go.
    """

    directory: Path
    was_alive: bool
    users: list[User]


def clear(directory: Path, kind: str) -> Cleared:
    """Ends the server of a mount and takes away everything it leaves.

    Works whether the server is well, hangs or has died, and whether the mount is in use.

    Args:
        directory: as the user wrote it.
        kind: whose mounts are meant, ``kvmsim`` or ``cgfs``.

    Raises:
        CommandError: nothing of ours is there, or it is somebody else's.
    """
    try:
        resolved = resolve(directory)
    except OSError as error:
        raise from_oserror(error, str(directory)) from error
    found = find_entry(resolved)
    mount = mount_at(resolved)
    ours = mount is not None and mount.fstype == f"fuse.{kind}"
    if mount is not None and ours:
        check_owner(mount)
    if not ours and (found is None or found[1].kind != kind):
        raise CommandError(f"{resolved}: no {kind} is mounted here")
    users = _others(users_below(resolved), found[1].pid if found else 0) if ours else []
    was_alive = found is not None and _stop(found[1])
    _unmount_all(resolved, kind)
    if found is not None:
        forget(*found)
    return Cleared(resolved, was_alive, users)


def check_owner(mount: Mount) -> None:
    """Refuses the mount of another user, except to root.

    Raises:
        CommandError: it is somebody else's (EX_NOPERM).
    """
    if os.geteuid() not in {0, mount.uid}:
        raise CommandError(
            f"{mount.directory}: belongs to the user with uid {mount.uid}",
            os.EX_NOPERM,
            errno.EPERM,
        )


def forget(runtime: RuntimeDir, entry: Entry) -> None:
    """Takes away what an ended server has left, apart from its mount."""
    directory = Path(entry.directory)
    thaw_recorded(runtime.frozen(directory), entry.uid)
    runtime.remove(directory)
    if entry.created:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _others(users: list[User], server: int) -> list[User]:
    """Users that are not the server or ourselves."""
    return [user for user in users if user.pid not in {server, os.getpid()}]


def _unmount_all(directory: Path, kind: str) -> None:
    """Takes every mount of a kind away, and its own watcher may be as quick."""
    while _is_mounted(directory, kind):
        try:
            unmount(directory, lazy=True)
        except CommandError:
            if _is_mounted(directory, kind):
                raise


def _is_mounted(directory: Path, kind: str) -> bool:
    mount = mount_at(directory)
    return mount is not None and mount.fstype == f"fuse.{kind}"


def _stop(entry: Entry) -> bool:
    """Ends a server, gently first; returns whether there was one."""
    try:
        process = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return False
    try:
        if not entry.alive:  # checked after opening: the descriptor cannot change its process
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], STOP_SECONDS)[0]:
                return True
    except ProcessLookupError:
        return True
    except PermissionError as error:
        raise CommandError(f"pid {entry.pid} is not ours", os.EX_NOPERM) from error
    finally:
        os.close(process)
    raise CommandError(f"pid {entry.pid} does not end, not even by SIGKILL", os.EX_OSERR)
