"""What all commands of KVM_MEMORY_ENCRYPT_OP share: arguments, blobs, pinned pages, the firmware.

KVM remembers the descriptor **number** of ``/dev/sev`` that started a guest, and resolves it in the
calling process each time it has something for the firmware (Linux 6.12 ``sev_issue_cmd``).
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EBADF, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from kvmsim.abi.psp import Status
from kvmsim.abi.sev import SEV_FW_BLOB_MAX_SIZE
from kvmsim.errors import KvmError
from kvmsim.kvm.client import copy_from_user, copy_to_user
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.dispatch import state_of
from kvmsim.sev.errors import FirmwareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from mmap import mmap

    from kvmsim.abi.layout import Layout
    from kvmsim.kvm.client import Client, Pointer
    from kvmsim.kvm.vm import Vm
    from kvmsim.sev.firmware import Firmware
    from kvmsim.sev.snp import SnpGuest

PAGE_BYTES = 4096
U64 = 0xFFFF_FFFF_FFFF_FFFF
#: How much guest memory goes through the firmware at a time.
CHUNK_BYTES = 1 << 20

ResultT = TypeVar("ResultT")
ArgsP = ParamSpec("ArgsP")


@dataclass(slots=True)
class SevCmd:
    """``struct kvm_sev_cmd``.

    Attributes:
        id: ``KVM_SEV_*``.
        data: the command's own structure: a buffer, or its address.
        error: out: the firmware's answer.
        sev_fd: descriptor of ``/dev/sev``.
    """

    id: int
    data: Pointer = 0
    error: int = 0
    sev_fd: int = 0


class SevInfo:
    """State of an SEV VM beyond its key: ``struct kvm_sev_info``.

    Attributes:
        asid: of the guest, also of a mirror; 0 without one.
        handle: of the guest in the firmware; 0 before its launch.
        fd: descriptor number of ``/dev/sev``, from the command that started the guest.
        snp: the firmware's context of an SNP guest.
        regions: registered ranges, (address, size), as often as they were registered.
        pages_locked: how many pages those pin.
        private: ranges that were encrypted in place, (first address, first behind it), apart and
            by address; see ``sev_private``.
        plain: what the guest sees of them, by first address, while it executes code.
        owner: the VM whose guest a mirror shares.
        mirrors: the VMs that share this one's.
    """

    __slots__ = (
        *("asid", "fd", "handle", "mirrors", "owner", "pages_locked", "plain", "private"),
        *("regions", "snp"),
    )

    def __init__(self, vm: Vm) -> None:
        del vm
        self.asid = 0
        self.handle = 0
        self.fd = 0
        self.snp: SnpGuest | None = None
        self.regions: list[tuple[int, int]] = []
        self.pages_locked = 0
        self.private: list[tuple[int, int]] = []
        self.plain: dict[int, mmap] = {}
        self.owner: Vm | None = None
        self.mirrors: list[Vm] = []


def info(vm: Vm) -> SevInfo:
    """The SEV state of a VM."""
    return state_of(vm, SevInfo)


def firmware_of(vm: Vm) -> Firmware:
    """The firmware of the machine a VM runs on."""
    return vm.system.firmware


def need_guest(vm: Vm) -> None:
    """Refuse a VM that is no SEV guest: ENOTTY."""
    if not vm.sev_active:
        raise KvmError(ENOTTY, "not an SEV guest")


class Params:
    """The structure a command's ``data`` points at; members by name.

    Raises:
        KvmError: EFAULT, also when it is written back.
    """

    def __init__(self, cmd: SevCmd, client: Client, layout: Layout) -> None:
        self._pointer = cmd.data
        self._client = client
        self._layout = layout
        self._data = bytearray(copy_from_user(client, cmd.data, layout.size_bytes))

    def __getitem__(self, name: str) -> int:
        return self._layout.get(self._data, name)

    def __setitem__(self, name: str, value: int) -> None:
        self._layout.put(self._data, name, value)

    def bytes_of(self, name: str, count: int) -> bytes:
        """A member that is an array of bytes."""
        start = self._layout.fields[name].offset
        return bytes(self._data[start : start + count])

    def blob(self, address: str, length: str) -> bytes:
        """Copy what an address and a length member describe; as :func:`copy_blob`."""
        return copy_blob(self._client, self[address], self[length])

    def write_back(self) -> None:
        """Copy the whole structure out."""
        copy_to_user(self._client, self._pointer, bytes(self._data))


def copy_blob(client: Client, address: int, length: int) -> bytes:
    """Copy a blob for the firmware (Linux ``psp_copy_user_blob``).

    Raises:
        KvmError: EINVAL no address, no length or over 16 KiB; EFAULT.
    """
    if not address or not 0 < length <= SEV_FW_BLOB_MAX_SIZE:
        raise KvmError(EINVAL, f"a blob of {length} bytes at {address:#x}")
    return client.read(address, length)


# -- the firmware --------------------------------------------------------------------------


def issue(
    cmd: SevCmd,
    client: Client,
    fd: int,
    run: Callable[ArgsP, ResultT],
    *args: ArgsP.args,
    **kwargs: ArgsP.kwargs,
) -> ResultT:
    """Have the firmware carry out a command through a descriptor of ``/dev/sev``.

    Raises:
        KvmError: EBADF not open, or something else; EIO, the firmware refused (``cmd.error``).
    """
    signed = fd - (1 << 32) if fd >> 31 else fd
    if not isinstance(client.file(signed), SevFile):
        raise KvmError(EBADF, f"descriptor {signed} is not /dev/sev")
    return direct(cmd, run, *args, **kwargs)


def issue_known(
    vm: Vm,
    cmd: SevCmd,
    client: Client,
    run: Callable[ArgsP, ResultT],
    *args: ArgsP.args,
    **kwargs: ArgsP.kwargs,
) -> ResultT:
    """The same through the descriptor number that started the guest."""
    return issue(cmd, client, info(vm).fd, run, *args, **kwargs)


def direct(
    cmd: SevCmd, run: Callable[ArgsP, ResultT], *args: ArgsP.args, **kwargs: ArgsP.kwargs
) -> ResultT:
    """Have the firmware carry out a command for the kernel itself, without a descriptor."""
    try:
        result = run(*args, **kwargs)
    except FirmwareError as refused:
        cmd.error = refused.status
        raise KvmError(EIO, str(refused)) from refused
    cmd.error = Status.SUCCESS
    return result


def lengths_wanted(refused: KvmError) -> tuple[int, ...]:
    """The sizes a firmware asked for when it refused a query; () for any other refusal."""
    cause = refused.__cause__
    return cause.lengths if isinstance(cause, FirmwareError) else ()


# -- memory --------------------------------------------------------------------------------


def pin(vm: Vm, client: Client, address: int, length: int, *, writable: bool) -> int:
    """Pin a range of the client's memory; nothing is left to release.

    Returns:
        How many pages it has.

    Raises:
        KvmError: EINVAL, empty or it wraps; ENOMEM over RLIMIT_MEMLOCK, or not mapped.
    """
    if not length or address + length > U64:
        raise KvmError(EINVAL, f"{length} bytes at {address:#x}")
    first = address & -PAGE_BYTES
    size = (address + length + PAGE_BYTES - 1 & -PAGE_BYTES) - first
    pages = size // PAGE_BYTES
    limit = client.memlock_bytes
    if limit is not None and info(vm).pages_locked + pages > limit // PAGE_BYTES:
        raise KvmError(ENOMEM, "RLIMIT_MEMLOCK")
    if not client.mapped(first, size, writable=writable):
        raise KvmError(ENOMEM, f"{length} bytes at {address:#x} cannot be pinned")
    return pages


def transform(
    client: Client, address: int, length: int, change: Callable[[int, bytes], bytes]
) -> None:
    """Read pinned memory, have it changed, write it back, piece by piece."""
    for start, size in _pieces(address, length):
        client.write(start, change(start, read_pinned(client, start, size)))


def read_pinned(client: Client, address: int, size: int) -> bytes:
    """Read memory that was pinned; ENOMEM when it vanished meanwhile."""
    try:
        return client.read(address, size)
    except KvmError as error:
        if error.errno == EFAULT:
            raise KvmError(ENOMEM, str(error)) from error
        raise


def _pieces(address: int, length: int) -> Iterator[tuple[int, int]]:
    end = address + length
    while address < end:
        size = min(CHUNK_BYTES - address % CHUNK_BYTES, end - address)
        yield address, size
        address += size
