"""The system calls Python has no function for.

Every function raises OSError with the errno of the call. Numbers are those of x86-64, the only
architecture whose KVM is emulated here.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

NR_SECCOMP: Final = 317
NR_KCMP: Final = 312
NR_TGKILL: Final = 234

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18

PR_SET_NO_NEW_PRIVS: Final = 38

IN_CLOSE_WRITE: Final = 0x8
IN_CLOSE_NOWRITE: Final = 0x10
IN_Q_OVERFLOW: Final = 0x4000

KCMP_VM: Final = 1

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def checked(result: int) -> int:
    """Pass a result on.

    Raises:
        OSError: the call returned -1.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *args: int | bytes | None) -> int:
    """Make a system call by number; whole numbers are passed as 64-bit values."""
    values = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return checked(int(_libc.syscall(ctypes.c_long(number), *values)))


def seccomp(operation: int, flags: int, argument: object) -> int:
    """The seccomp system call; ``argument`` is a ctypes object passed by reference."""
    result = _libc.syscall(
        ctypes.c_long(NR_SECCOMP),
        ctypes.c_long(operation),
        ctypes.c_long(flags),
        ctypes.byref(argument),  # type: ignore[arg-type]
    )
    return checked(int(result))


def prctl(option: int, value: int) -> int:
    """The prctl system call with one argument."""
    zero = ctypes.c_ulong(0)
    return checked(int(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero)))


def unshare(flags: int) -> None:
    """Leave namespaces, as unshare does."""
    checked(int(_libc.unshare(flags)))


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system; the error names the target."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    try:
        checked(int(result))
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from None


def inotify_init() -> int:
    """An inotify descriptor that neither blocks nor survives an exec."""
    return checked(int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch an inode; the watch descriptor."""
    return checked(int(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint(mask))))


def inotify_rm_watch(fd: int, watch: int) -> None:
    """Stop watching."""
    checked(int(_libc.inotify_rm_watch(fd, watch)))


def same_address_space(pid: int, other: int) -> bool:
    """Whether two processes share their memory (kcmp(2)); False when that cannot be told."""
    try:
        return syscall(NR_KCMP, pid, other, KCMP_VM, 0, 0) == 0
    except OSError:
        return False


def tgkill(process: int, thread: int, number: int) -> None:
    """Send a signal to one thread."""
    syscall(NR_TGKILL, process, thread, number)
