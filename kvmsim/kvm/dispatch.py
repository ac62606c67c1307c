"""From a request number to its handler.

Each kind of descriptor has a table. A handler is a function ``(file, call) -> result`` in the file
of its subsystem, entered with :func:`handles`. Everything a table does not have gets the errno
Linux gives for that kind of descriptor.
"""

from __future__ import annotations

from errno import EINVAL, ENOTTY
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, cast

from kvmsim.errors import KvmError
from kvmsim.kvm.client import Client, Pointer, copy_from_user, copy_to_user

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.run import Blocked
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import KvmEnableCap, Vm

HandlerT = TypeVar("HandlerT", bound="Callable[[Any, Call], int | KvmFile | Blocked]")


class Call:
    """One ioctl.

    Attributes:
        arg: the third argument: a number, an address, or a buffer standing for one.
        client: who calls.
        now_ns: when.
    """

    __slots__ = ("arg", "client", "now_ns")

    def __init__(self, arg: Pointer, client: Client, now_ns: int) -> None:
        self.arg = arg
        self.client = client
        self.now_ns = now_ns

    @property
    def value(self) -> int:
        """The argument as an unsigned number.

        Raises:
            KvmError: EINVAL, a buffer was given; its address is no sensible value.
        """
        if not isinstance(self.arg, int):
            raise KvmError(EINVAL, "a pointer where a number belongs")
        return self.arg & 0xFFFF_FFFF_FFFF_FFFF

    def read(self, size_bytes: int, offset: int = 0) -> bytes:
        """Copy from the structure the argument points at; KvmError EFAULT."""
        return copy_from_user(self.client, self.arg, size_bytes, offset)

    def write(self, data: bytes | bytearray, offset: int = 0) -> None:
        """Copy to the structure the argument points at; KvmError EFAULT."""
        copy_to_user(self.client, self.arg, bytes(data), offset)


class KvmFile:
    """What stands behind a KVM descriptor.

    Attributes:
        UNKNOWN_ERRNO: errno for a request the kind does not have.
        HANDLERS: request number -> handler.
    """

    __slots__ = ()

    UNKNOWN_ERRNO: ClassVar[int] = EINVAL
    HANDLERS: ClassVar[dict[int, Callable[[Any, Call], int | KvmFile | Blocked]]] = {}

    def ioctl(
        self, request: int, arg: Pointer = 0, client: Client | None = None, now_ns: int = 0
    ) -> int | KvmFile | Blocked:
        """Carry out a request.

        Args:
            request: the full 32-bit number.
            arg: as in ioctl(2); a ``bytearray`` stands for a pointer to its bytes.
            client: who calls; the creator of the object by default.
            now_ns: when.

        Raises:
            KvmError: the call fails with its errno.
        """
        caller = client if client is not None else self.creator
        self.check(caller)
        handler = self.HANDLERS.get(request & 0xFFFF_FFFF)
        if handler is None:
            raise KvmError(self.UNKNOWN_ERRNO, f"no request {request:#x}")
        return handler(self, Call(arg, caller, now_ns))

    @property
    def creator(self) -> Client:
        """Whose object this is."""
        raise NotImplementedError

    @property
    def link_name(self) -> str:
        """What ``/proc/PID/fd`` calls a descriptor of it, after ``anon_inode:``."""
        return ""

    def check(self, client: Client) -> None:
        """Refuse a caller before anything else is looked at; by default none."""


class SystemFile(KvmFile):
    """``/dev/kvm``."""

    __slots__ = ()
    HANDLERS: ClassVar[dict[int, Callable[[Any, Call], int | KvmFile | Blocked]]] = {}


class VmFile(KvmFile):
    """A VM descriptor."""

    __slots__ = ()
    UNKNOWN_ERRNO = ENOTTY
    HANDLERS: ClassVar[dict[int, Callable[[Any, Call], int | KvmFile | Blocked]]] = {}


class VcpuFile(KvmFile):
    """A vCPU descriptor."""

    __slots__ = ()
    HANDLERS: ClassVar[dict[int, Callable[[Any, Call], int | KvmFile | Blocked]]] = {}


Enabler: TypeAlias = "Callable[[Vm, KvmEnableCap, Client], int]"

#: Capability -> what KVM_ENABLE_CAP does for it on a VM.
ENABLERS: dict[int, Enabler] = {}


def enables(cap: int) -> Callable[[Enabler], Enabler]:
    """Enter a function ``(vm, enable, client) -> result`` as what enables a capability of a VM."""

    def enter(enabler: Enabler) -> Enabler:
        if cap in ENABLERS:
            msg = f"capability {cap} is enabled twice"
            raise ValueError(msg)
        ENABLERS[cap] = enabler
        return enabler

    return enter


StateT = TypeVar("StateT")


def state_of(owner: Vm | Vcpu, kind: Callable[[Any], StateT]) -> StateT:
    """The part of a VM's or vCPU's state that belongs to one subsystem; made when first used.

    Args:
        owner: the VM or vCPU.
        kind: the class of the part; it is called with the owner.
    """
    part = owner.state.get(kind)
    if part is None:
        part = owner.state[kind] = kind(owner)
    return cast("StateT", part)


def handles(kind: type[KvmFile], request: int) -> Callable[[HandlerT], HandlerT]:
    """Enter a function into the table of a kind of descriptor."""

    def enter(handler: HandlerT) -> HandlerT:
        if request in kind.HANDLERS:
            msg = f"{kind.__name__} has two handlers for {request:#x}"
            raise ValueError(msg)
        kind.HANDLERS[request] = handler
        return handler

    return enter
