"""The program that makes a call, as far as KVM looks at it.

This is the seam at which real processes come in. KVM knows its caller only as a :class:`Client`:
who is charged, whose address space it is, and how to reach memory behind a pointer. A front end for
other processes implements the members; code in this process uses :class:`LocalClient`, or gives a
Python buffer wherever the ABI has a pointer.
"""

from __future__ import annotations

from errno import EBADF, EFAULT
from typing import TYPE_CHECKING, Protocol, cast

from kvmsim.errors import KvmError

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import KvmFile

#: Where an argument points: an address in the client's memory, or a buffer of this process.
Pointer = int | bytes | bytearray


class Client(Protocol):
    """A calling thread.

    Attributes:
        pid: whose cgroup is charged for what the call takes.
        mm: identity of its address space. Objects made in one refuse calls from another.
        memlock_bytes: how much memory it may pin: RLIMIT_MEMLOCK, or None with CAP_IPC_LOCK.
    """

    @property
    def pid(self) -> int:
        """See the class."""

    @property
    def mm(self) -> object:
        """See the class."""

    @property
    def memlock_bytes(self) -> int | None:
        """See the class."""

    def mapped(self, address: int, size_bytes: int, *, writable: bool) -> bool:
        """Whether a whole range of the client's memory is mapped, so that it could be pinned."""

    def read(self, address: int, size_bytes: int) -> bytes:
        """Copy from the client's memory; KvmError EFAULT when it cannot be read."""

    def write(self, address: int, data: bytes) -> None:
        """Copy to the client's memory; KvmError EFAULT when it cannot be written."""

    def file(self, fd: int) -> KvmFile | None:
        """What is behind a descriptor; None: nothing of KVM's. KvmError EBADF: not open."""


class LocalClient:
    """A caller in this process.

    Args:
        pid: whose cgroup is charged.

    Attributes:
        pid: as given.
        mm: the pid; two local clients of one pid share an address space.
        memlock_bytes: as a process with CAP_IPC_LOCK has it, until set.
        files: its descriptors.
    """

    __slots__ = ("_end", "_mapped", "files", "memlock_bytes", "mm", "pid")

    _FIRST_ADDRESS = 0x7F00_0000_0000

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.mm: object = pid
        self.memlock_bytes: int | None = None
        self.files: dict[int, object] = {}
        self._mapped: dict[int, bytes | bytearray | memoryview] = {}
        self._end = self._FIRST_ADDRESS

    def file(self, fd: int) -> KvmFile | None:
        """See :meth:`Client.file`."""
        if fd not in self.files:
            raise KvmError(EBADF, f"descriptor {fd}")
        return cast("KvmFile | None", self.files[fd])

    def map(self, data: bytes | bytearray | memoryview) -> int:
        """Give a buffer an address, for structures that contain pointers; bytes are read-only."""
        address = self._end
        self._mapped[address] = data
        # A gap after each buffer, so that running over its end is a fault.
        self._end += (len(data) // 4096 + 2) * 4096
        return address

    def open(self, file: object) -> int:
        """Give an object the lowest free descriptor from 3 on; None stands for a foreign one."""
        number = 3
        while number in self.files:
            number += 1
        self.files[number] = file
        return number

    def mapped(self, address: int, size_bytes: int, *, writable: bool) -> bool:
        """See :meth:`Client.mapped`. A buffer maps the whole of every page it touches."""
        for start, data in self._mapped.items():
            end = start + -(-len(data) // 4096) * 4096
            if start <= address and address + size_bytes <= end:
                return not (writable and isinstance(data, bytes))
        return False

    def read(self, address: int, size_bytes: int) -> bytes:
        """See :meth:`Client.read`."""
        data, offset = self._find(address, size_bytes)
        return bytes(data[offset : offset + size_bytes])

    def write(self, address: int, data: bytes) -> None:
        """See :meth:`Client.write`."""
        target, offset = self._find(address, len(data))
        if isinstance(target, bytes):
            raise KvmError(EFAULT, f"read-only at {address:#x}")
        target[offset : offset + len(data)] = data

    def _find(self, address: int, size_bytes: int) -> tuple[bytes | bytearray | memoryview, int]:
        for start, data in self._mapped.items():
            if start <= address and address + size_bytes <= start + len(data):
                return data, address - start
        raise KvmError(EFAULT, f"nothing at {address:#x}")


def copy_from_user(client: Client, pointer: Pointer, size_bytes: int, offset: int = 0) -> bytes:
    """Read a structure.

    Raises:
        KvmError: EFAULT.
    """
    if isinstance(pointer, int):
        return client.read(pointer + offset, size_bytes)
    if len(pointer) < offset + size_bytes:
        raise KvmError(EFAULT, f"{len(pointer)} bytes given, {offset + size_bytes} read")
    return bytes(pointer[offset : offset + size_bytes])


def copy_to_user(client: Client, pointer: Pointer, data: bytes, offset: int = 0) -> None:
    """Write a structure.

    Raises:
        KvmError: EFAULT.
    """
    if isinstance(pointer, int):
        client.write(pointer + offset, data)
    elif isinstance(pointer, bytes) or len(pointer) < offset + len(data):
        raise KvmError(EFAULT, f"{len(data)} bytes do not fit")
    else:
        pointer[offset : offset + len(data)] = data
