"""Structures in a client's memory: what KVM's copy_from_user and copy_to_user reach.

process_vm_readv(2) and process_vm_writev(2) honour page protections, as KVM's copies do;
/proc/PID/mem would write into read-only pages. A range that is only partly there fails, after as
much as could be written has been, again as in the kernel.
"""

from __future__ import annotations

import ctypes
from errno import EFAULT
from typing import TYPE_CHECKING, Any, Final

from kvmsim.errors import KvmError

if TYPE_CHECKING:
    import mmap

_BUFFER_BYTES: Final = 4096
_TOP: Final = 1 << 47  # first address beyond user space

_libc: Any = ctypes.CDLL(None, use_errno=True)
_readv: Any = _libc.process_vm_readv
_writev: Any = _libc.process_vm_writev
for _call in (_readv, _writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


class _Vector(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


_buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
_buffer_address = ctypes.addressof(_buffer)
_buffer_view = memoryview(_buffer).cast("B")
_local = _Vector(_buffer_address, 0)
_remote = _Vector(0, 0)
_local_address = ctypes.addressof(_local)
_remote_address = ctypes.addressof(_remote)


def read(thread: int, address: int, size_bytes: int) -> bytes:
    """Copy from the address space of a thread.

    Raises:
        KvmError: EFAULT, some of it is not readable, or the thread is gone.
    """
    if size_bytes > _BUFFER_BYTES:
        return b"".join(
            read(thread, address + offset, min(_BUFFER_BYTES, size_bytes - offset))
            for offset in range(0, size_bytes, _BUFFER_BYTES)
        )
    _aim(address, size_bytes)
    if _readv(thread, _local_address, 1, _remote_address, 1, 0) != size_bytes:
        raise KvmError(EFAULT, f"cannot read {size_bytes} bytes at {address:#x}")
    return _buffer_view[:size_bytes].tobytes()


def read_into(thread: int, address: int, target: mmap.mmap, offset: int, size_bytes: int) -> None:
    """Copy from the address space of a thread into a mapping.

    Raises:
        KvmError: EFAULT, some of it is not readable, or the thread is gone.
    """
    window = (ctypes.c_char * size_bytes).from_buffer(target, offset)
    local = _Vector(ctypes.addressof(window), size_bytes)
    remote = _Vector(address, size_bytes)
    done = _readv(thread, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    del window
    if done != size_bytes:
        raise KvmError(EFAULT, f"cannot read {size_bytes} bytes at {address:#x}")


def write(thread: int, address: int, data: bytes) -> None:
    """Copy to the address space of a thread.

    Raises:
        KvmError: EFAULT, some of it is not writable, or the thread is gone.
    """
    for offset in range(0, len(data), _BUFFER_BYTES):
        part = data[offset : offset + _BUFFER_BYTES]
        _aim(address + offset, len(part))
        _buffer_view[: len(part)] = part
        if _writev(thread, _local_address, 1, _remote_address, 1, 0) != len(part):
            raise KvmError(EFAULT, f"cannot write {len(part)} bytes at {address + offset:#x}")


def _aim(address: int, size_bytes: int) -> None:
    if address < 0 or address + size_bytes > _TOP:
        raise KvmError(EFAULT, f"{address:#x} is no address of a program")
    _local.length = _remote.length = size_bytes
    _remote.base = address
