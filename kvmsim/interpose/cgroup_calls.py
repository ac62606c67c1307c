"""Calls by which programs tell a cgroup2 file system from another one.

Container runtimes ask for the magic number of /sys/fs/cgroup and attach device programs to its
directories (runc 1.1.5 and crun 1.8.1 do not work without). On the emulated tree they get the
answers of cgroup2; the device programs are taken and have no effect. Everywhere else Linux answers.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmsim.errors import KvmError
from kvmsim.interpose.filter import (
    BPF_PROG_QUERY,
    NR_BPF,
    NR_FSTATFS,
    NR_STATFS,
)

if TYPE_CHECKING:
    from kvmsim.interpose.clients import Process, Thread
    from kvmsim.interpose.notify import Notification

CGROUP2_SUPER_MAGIC: Final = 0x63677270
_PATH_MAX: Final = 4096
_PAGE_BYTES: Final = 4096

#: struct statfs: type, block size, blocks and files (none), fsid, name length, fragment, flags.
_STATFS: Final = struct.Struct("=qq 5q Q qqq 32x")
_ST_VALID: Final = 0x20

# union bpf_attr of BPF_PROG_QUERY.
_QUERY_ATTACH_FLAGS: Final = 12
_QUERY_PROG_CNT: Final = 24
_U32_ZERO: Final = bytes(4)


class CgroupCalls:
    """Answers for one emulated tree.

    Args:
        device: ``st_dev`` of its files.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def answer(self, notification: Notification, thread: Thread) -> int | None:
        """The value, a negative errno, or None: it is not about the tree."""
        _, _, nr, _, arg0, arg1, _ = notification
        process = thread.process
        process.thread = thread
        try:
            if nr == NR_STATFS and self._is_ours(_path(process, arg0)):
                return _statfs(process, arg1)
            if nr == NR_FSTATFS and self._is_ours(_fd_path(thread, arg0)):
                return _statfs(process, arg1)
            if nr == NR_BPF:
                return self._bpf(thread, arg0, arg1)
        except KvmError as error:
            return -error.errno
        return None

    def _bpf(self, thread: Thread, command: int, attr: int) -> int | None:
        process = thread.process
        (target,) = struct.unpack("=I", process.read(attr, 4))
        if not self._is_ours(_fd_path(thread, target)):
            return None
        if command & 0xFFFF_FFFF == BPF_PROG_QUERY:
            process.write(attr + _QUERY_ATTACH_FLAGS, _U32_ZERO)
            process.write(attr + _QUERY_PROG_CNT, _U32_ZERO)
        return 0

    def _is_ours(self, path: str) -> bool:
        try:
            return Path(path).stat().st_dev == self._device
        except (OSError, ValueError):
            return False


def statfs_of_cgroup2() -> bytes:
    """``struct statfs`` of a cgroup2 mount."""
    return _STATFS.pack(
        CGROUP2_SUPER_MAGIC, _PAGE_BYTES, 0, 0, 0, 0, 0, 0, 255, _PAGE_BYTES, _ST_VALID
    )


def _statfs(process: Process, address: int) -> int:
    process.write(address, statfs_of_cgroup2())
    return 0


def _fd_path(thread: Thread, fd: int) -> str:
    return f"/proc/{thread.number}/fd/{fd & 0xFFFF_FFFF}"


def _path(process: Process, address: int) -> str:
    """A path argument, as this process reaches it: through the client's root or directory."""
    data = b""
    while b"\0" not in data:
        if len(data) >= _PATH_MAX:
            return ""
        # Never across a page that need not be there.
        at = address + len(data)
        data += process.read(at, _PAGE_BYTES - at % _PAGE_BYTES)
    path = os.fsdecode(data.partition(b"\0")[0])
    if not path:
        return ""
    base = "root" if path.startswith("/") else "cwd/"
    return f"/proc/{process.thread.number}/{base}{path}"
