"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p

AT_FDCWD = -100
CLONE_INTO_CGROUP = 0x200000000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWPID = 0x20000000
MAP_FAILED = ctypes.c_void_p(-1).value
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
SYS_CLONE3 = 435
SYS_EXIT = 60


def _check(result: int, what: str = "") -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def renameat2(old: os.PathLike[str] | str, new: os.PathLike[str] | str, flags: int) -> None:
    """Renames with flags (rename(2))."""
    _check(_LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocates space; unlike posix_fallocate(3) without an emulation in the C library."""
    _check(_LIBC.fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)))


def mmap(fd: int, length: int, protection: int, flags: int) -> None:
    """Maps a file (or with fd -1 anonymous memory) and unmaps it again.

    Python's own mmap refuses a file of size 0 before the kernel is asked.
    """
    address = _LIBC.mmap(None, ctypes.c_size_t(length), protection, flags, fd, ctypes.c_longlong(0))
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))


def unshare(flags: int) -> None:
    """Leaves the namespaces named by the flags (os.unshare came with Python 3.12)."""
    _check(_LIBC.unshare(flags))


def prctl(option: int, argument: int) -> None:
    """Changes a property of the calling thread."""
    _check(_LIBC.prctl(option, argument, 0, 0, 0))


def exit_thread() -> None:
    """Ends the calling thread only, at once and without clean-up."""
    _LIBC.syscall(SYS_EXIT, 0)


def clone3_into(cgroup_fd: int) -> int:
    """Forks into the cgroup of a directory descriptor; returns like fork(2)."""
    exit_signal = 17
    arguments = struct.pack(
        "11Q", CLONE_INTO_CGROUP, 0, 0, 0, exit_signal, 0, 0, 0, 0, 0, cgroup_fd
    )
    return _check(_LIBC.syscall(SYS_CLONE3, arguments, len(arguments)))


def pause_forever() -> None:
    """Sleeps until killed."""
    while True:
        _LIBC.pause()


def statfs_type(path: os.PathLike[str] | str) -> int:
    """Returns the magic number of the file system a path is on."""
    buffer = ctypes.create_string_buffer(256)
    _check(_LIBC.statfs(os.fsencode(path), buffer))
    return int(struct.unpack_from("q", buffer)[0])


def file_handle(path: os.PathLike[str] | str) -> tuple[int, bytes]:
    """Returns type and bytes of a file handle (name_to_handle_at(2))."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 8 + 128)
    mount_id = ctypes.c_int()
    _check(_LIBC.name_to_handle_at(AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount_id), 0))
    size, kind = struct.unpack_from("Ii", buffer)
    return kind, buffer.raw[8 : 8 + size]


def inotify_init() -> int:
    """Makes a non-blocking inotify descriptor."""
    return _check(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add(fd: int, path: os.PathLike[str] | str, mask: int) -> int:
    """Watches a path; returns the watch descriptor."""
    return _check(_LIBC.inotify_add_watch(fd, os.fsencode(path), mask))


def mount(source: str, target: os.PathLike[str] | str, kind: str, flags: int, data: str) -> None:
    """Mounts a file system."""
    arguments: list[Any] = [source.encode(), os.fsencode(target), kind.encode()]
    _check(_LIBC.mount(*arguments, ctypes.c_ulong(flags), data.encode()), str(target))


def umount(target: os.PathLike[str] | str, flags: int = 0) -> None:
    """Unmounts a file system."""
    _check(_LIBC.umount2(os.fsencode(target), flags), str(target))
