"""Mounting and unmounting: the system calls, and the set-uid helper fusermount3.

The descriptor of the FUSE device is made here and handed to pyfuse3 as ``/dev/fd/N``, so that a
refusal arrives as an exception with the helper's own words and not as output of a C library.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cgfs.errors import MountError

_MS_NOSUID = 2
_MS_NODEV = 4
_MNT_DETACH = 2
_ESCAPE = re.compile(r"\\([0-7]{3})")
_HELPER = "fusermount3"
# Its standard input ends when the serving process does; a line before that says all is well.
_WATCH = 'read -r _ || fusermount3 -u -z -q -- "$1" || umount -l -- "$1"'
_HELPER_SECONDS = 10.0
# One page a request, as kernfs reads: the kernel then pins one page of a reader's buffer and not
# all of it. What is longer comes in more requests, out of one snapshot.
_COMMON = "default_permissions,max_read=4096"


@dataclass(frozen=True, slots=True)
class Options:
    """How to mount.

    Attributes:
        fsname: the source shown in /proc/self/mounts.
        subtype: the type shown there is ``fuse.`` and this.
        allow_other: users other than the mounting one may use it.
    """

    fsname: str
    subtype: str
    allow_other: bool


class Connection:
    """A mount: the device descriptor, and a process that unmounts should this one die.

    Attributes:
        fd: descriptor of the FUSE device.
        mountpoint: absolute path.
    """

    def __init__(self, fd: int, mountpoint: str) -> None:
        self.fd = fd
        self.mountpoint = mountpoint
        # fusermount3's own auto_unmount looks into the mount to see whether it is dead, which an
        # ordinary user's mount does not let the set-uid helper do.
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "cgfs-watch", mountpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def unmount(self) -> None:
        """Takes the mount out of the tree, also while it is in use; harmless if it is gone."""
        if os.geteuid() == 0:
            _libc().umount2(os.fsencode(self.mountpoint), _MNT_DETACH)
        else:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [_HELPER, "-u", "-z", "-q", "--", self.mountpoint],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=_HELPER_SECONDS,
                )

    def abort(self) -> None:
        """Ends the connection: whoever still waits for an answer gets an error.

        The number stays taken until the session is destroyed, which closes it.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, self.fd, inheritable=False)
        os.close(null)

    def dismiss(self) -> None:
        """Lets the watching process end: the mount has been taken down."""
        try:
            self._watch.communicate(b"\n", _HELPER_SECONDS)
        except subprocess.TimeoutExpired:
            self._watch.kill()
            self._watch.communicate()


def check(mountpoint: str, *, over: bool = False) -> str:
    """The absolute path of a directory one can mount on.

    Args:
        mountpoint: a directory.
        over: accept one that is a mount point already.

    Raises:
        MountError: it is missing, no directory, a mount already, or hides a dead server.
    """
    try:
        path = Path(mountpoint).resolve()
        if not path.is_dir():
            reason = "is not a directory" if path.exists() else "no such directory"
            raise MountError(f"{mountpoint}: {reason}")
    except OSError as error:
        if error.errno in {errno.ENOTCONN, errno.ECONNABORTED}:
            text = f"a dead server is mounted here; clear it with: {_HELPER} -u {mountpoint}"
            raise MountError(f"{mountpoint}: {text}") from None
        raise MountError(f"{mountpoint}: {error.strerror}") from None
    fstype = None if over else _mounted_type(str(path))
    if fstype is not None:
        raise MountError(f"{mountpoint}: already a mount point ({fstype})")
    return str(path)


def connect(mountpoint: str, options: Options) -> Connection:
    """Mounts on a directory that `check` accepted.

    Raises:
        MountError: no FUSE here, or the kernel or the helper refuses.
    """
    if not Path("/dev/fuse").exists():
        raise MountError("no /dev/fuse: load the kernel's fuse module, or pass the device in")
    helper = shutil.which(_HELPER)
    if helper is not None:
        return _by_helper(helper, mountpoint, options)
    if os.geteuid() != 0:
        raise MountError(f"{_HELPER} is not installed (Debian package fuse3)")
    return _by_mount(mountpoint, options)


def user_allow_other(configuration: Path = Path("/etc/fuse.conf")) -> bool:
    """Whether ordinary users may let others in."""
    try:
        lines = configuration.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _by_helper(helper: str, mountpoint: str, options: Options) -> Connection:
    words = [
        _COMMON,
        f"fsname={_escape(options.fsname)}",
        f"subtype={_escape(options.subtype)}",
        *(["allow_other"] if options.allow_other else []),
    ]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [helper, "-o", ",".join(words), "--", mountpoint],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
        )
        theirs.close()
        try:
            fd = _receive(ours)
        except OSError as error:
            process.wait()
            complaints.seek(0)
            lines = os.fsdecode(complaints.read()).strip().splitlines()
            reason = lines[0].rpartition(f"{_HELPER}: ")[2] if lines else str(error)
            raise MountError(f"cannot mount on {mountpoint}: {reason}") from None
        process.wait()
    return Connection(fd, mountpoint)


def _receive(channel: socket.socket) -> int:
    channel.settimeout(_HELPER_SECONDS)
    room = socket.CMSG_LEN(array.array("i").itemsize)
    _, messages, _, _ = channel.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    channel.settimeout(None)
    for level, kind, data in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return array.array("i", data)[0]
    raise OSError(errno.EIO, f"{_HELPER} gave no reason")


def _by_mount(mountpoint: str, options: Options) -> Connection:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,{_COMMON}"
    if options.allow_other:
        data += ",allow_other"
    done = _libc().mount(
        os.fsencode(options.fsname),
        os.fsencode(mountpoint),
        f"fuse.{options.subtype}".encode(),
        ctypes.c_ulong(_MS_NOSUID | _MS_NODEV),
        data.encode(),
    )
    if done != 0:
        reason = os.strerror(ctypes.get_errno())
        os.close(fd)
        raise MountError(f"cannot mount on {mountpoint}: {reason}")
    return Connection(fd, mountpoint)


def _mounted_type(path: str) -> str | None:
    found = None
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        before, _, after = line.partition(" - ")
        if _ESCAPE.sub(lambda code: chr(int(code[1], 8)), before.split(" ")[4]) == path:
            found = after.split(" ")[0]
    return found


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
