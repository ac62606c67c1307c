"""``/dev/sev``: commands for the platform itself (kvm.md D.9).

There is one request, SEV_ISSUE_CMD, with a command number inside. Several commands want the file
opened for writing. Order of the checks: Linux 6.12 ``drivers/crypto/ccp/sev-dev.c`` ``sev_ioctl``.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EINVAL, EIO, ENODEV, EPERM
from typing import TYPE_CHECKING, Any, ClassVar

from kvmsim.abi import psp
from kvmsim.abi.psp import PlatformState
from kvmsim.abi.sev import SEV_FW_BLOB_MAX_SIZE
from kvmsim.errors import KvmError
from kvmsim.kvm.dispatch import KvmFile, handles
from kvmsim.sev.errors import FirmwareError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.abi.layout import Layout
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import Call
    from kvmsim.kvm.run import Blocked
    from kvmsim.kvm.system import System
    from kvmsim.sev.platform import Platform

#: The kernel's own errno for "not supported"; user space has no name for it.
ENOTSUPP = 524


class SevFile(KvmFile):
    """``/dev/sev``, opened.

    Args:
        system: the KVM of the machine, which has the firmware.
        writable: opened for writing.
    """

    __slots__ = ("system", "writable")
    HANDLERS: ClassVar[dict[int, Callable[[Any, Call], int | KvmFile | Blocked]]] = {}

    def __init__(self, system: System, *, writable: bool = False) -> None:
        self.system = system
        self.writable = writable

    def opened(self, *, writable: bool) -> SevFile:
        """The same device as another open of it sees it."""
        return SevFile(self.system, writable=writable)

    @property
    def creator(self) -> Client:
        """Nobody in particular."""
        return self.system.creator

    def check(self, client: Client) -> None:
        """There is nothing behind the file without a secure processor: ENODEV."""
        del client
        if self.system.machine.preset.sev is None:
            raise KvmError(ENODEV, "no secure processor")


class Command:
    """One command being carried out.

    Attributes:
        platform: of the machine.
        client: who asks.
        address: of the command's own structure; 0: none.
        error: out: the firmware's answer.
    """

    def __init__(self, file: SevFile, client: Client, address: int, error: int) -> None:
        self.file = file
        self.platform: Platform = file.system.firmware.platform
        self.client = client
        self.address = address
        self.error = error
        self._data = bytearray()

    def need_writable(self) -> None:
        """Refuse a file that is open for reading only: EPERM."""
        if not self.file.writable:
            raise KvmError(EPERM, "/dev/sev is open for reading only")

    def read(self, layout: Layout) -> bytearray:
        """Copy the command's structure in; EFAULT."""
        return bytearray(self.client.read(self.address, layout.size_bytes))

    def write(self, data: bytes | bytearray) -> None:
        """Copy the command's structure out; EFAULT."""
        self.client.write(self.address, bytes(data))

    def init(self) -> None:
        """Initialise the platform if it is not."""
        self.file.system.firmware.init()


@handles(SevFile, psp.SEV_ISSUE_CMD)
def issue_cmd(file: SevFile, call: Call) -> int:
    """Carry out the command; its structure is copied back when it is one that exists."""
    layout = psp.SEV_ISSUE_CMD_STRUCT
    raw = bytearray(call.read(layout.size_bytes))
    number = layout.get(raw, "cmd")
    run = COMMANDS.get(number)
    if run is None:
        raise KvmError(EINVAL, f"no command {number}")
    command = Command(file, call.client, layout.get(raw, "data"), layout.get(raw, "error"))
    try:
        run(command)
    except FirmwareError as refused:
        command.error = refused.status
        raise KvmError(EIO, str(refused)) from refused
    else:
        command.error = psp.Status.SUCCESS
    finally:
        layout.put(raw, "error", command.error)
        call.write(raw)
    return 0


def _factory_reset(command: Command) -> None:
    command.need_writable()
    if command.platform.state == PlatformState.WORKING:
        raise KvmError(EBUSY, "guests are active")
    command.file.system.firmware.begin("FACTORY_RESET")
    command.platform.factory_reset()


def _platform_status(command: Command) -> None:
    firmware = command.file.system.firmware
    firmware.begin("PLATFORM_STATUS")
    major, minor, build = command.platform.version
    flags = psp.SEV_STATUS_FLAGS_OWNED if command.platform.owned else 0
    if command.file.system.machine.sev.sev_es:
        flags |= psp.SEV_STATUS_FLAGS_CONFIG_ES
    command.write(
        psp.SEV_USER_DATA_STATUS.pack(
            api_major=major,
            api_minor=minor,
            state=command.platform.state,
            flags=flags,
            build=build,
            guest_count=len(firmware.guests),
        )
    )


def _pek_gen(command: Command) -> None:
    _generate(command, "PEK_GEN", command.platform.pek_gen)


def _pdh_gen(command: Command) -> None:
    _generate(command, "PDH_GEN", command.platform.pdh_gen)


def _generate(command: Command, name: str, run: Callable[[], None]) -> None:
    command.need_writable()
    command.init()
    command.file.system.firmware.begin(name)
    run()


def _pek_csr(command: Command) -> None:
    command.need_writable()
    layout = psp.SEV_USER_DATA_PEK_CSR
    data = command.read(layout)
    address, length = layout.get(data, "address"), layout.get(data, "length")
    room = length if address and length else 0
    _fits(room)
    command.init()
    blob = _query(command, layout, data, ("length",), lambda: (command.platform.pek_csr(room),))
    command.client.write(address, blob[0])


def _pdh_cert_export(command: Command) -> None:
    """An uninitialised platform is initialised first, for which the file has to be writable."""
    if command.platform.state == PlatformState.UNINIT:
        command.need_writable()
        command.init()
    layout = psp.SEV_USER_DATA_PDH_CERT_EXPORT
    data = command.read(layout)
    pdh, chain = layout.get(data, "pdh_cert_address"), layout.get(data, "cert_chain_address")
    room = (layout.get(data, "pdh_cert_len"), layout.get(data, "cert_chain_len"))
    if not pdh or not room[0] or not chain:
        room = (0, 0)
    _fits(*room)
    names = ("pdh_cert_len", "cert_chain_len")
    certificates = _query(
        command, layout, data, names, lambda: command.platform.pdh_cert_export(*room)
    )
    for address, certificate in zip((pdh, chain), certificates, strict=True):
        command.client.write(address, certificate)


def _pek_cert_import(command: Command) -> None:
    command.need_writable()
    layout = psp.SEV_USER_DATA_PEK_CERT_IMPORT
    data = command.read(layout)
    blobs = []
    for name in ("pek", "oca"):
        address, length = (
            layout.get(data, f"{name}_cert_address"),
            layout.get(data, f"{name}_cert_len"),
        )
        if not address or not 0 < length <= SEV_FW_BLOB_MAX_SIZE:
            raise KvmError(EINVAL, f"{name} certificate of {length} bytes")
        blobs.append(command.client.read(address, length))
    command.init()
    command.platform.pek_cert_import(*blobs)


def _get_id(command: Command) -> None:
    """Deprecated: the ids of two sockets, the second one zeros."""
    if command.platform.version < bytes((0, 16)):
        raise KvmError(ENOTSUPP, "GET_ID needs API 0.16")
    command.write(command.platform.get_id(128).ljust(128, b"\0"))


def _get_id2(command: Command) -> None:
    if command.platform.version < bytes((0, 16)):
        raise KvmError(ENOTSUPP, "GET_ID needs API 0.16")
    layout = psp.SEV_USER_DATA_GET_ID2
    data = command.read(layout)
    address, length = layout.get(data, "address"), layout.get(data, "length")
    room = length if address and length else 0
    blob = _query(command, layout, data, ("length",), lambda: (command.platform.get_id(room),))
    command.client.write(address, blob[0])


def _snp_platform_status(command: Command) -> None:
    """Linux 6.12 ``sev_ioctl_do_snp_platform_status``: EINVAL without SNP or a structure."""
    snp = command.file.system.firmware.snp
    if not snp.initialised or not command.address:
        raise KvmError(EINVAL, "SNP is not initialised, or no structure")
    major, minor, build = command.platform.version
    command.write(
        psp.SEV_USER_DATA_SNP_STATUS.pack(
            api_major=major,
            api_minor=minor,
            state=PlatformState.INIT,
            is_rmp_initialized=1,
            build_id=build,
            flags=snp.flags,
            guest_count=len(snp.guests),
            current_tcb_version=0,
            reported_tcb_version=snp.reported_tcb,
        )
    )


def _snp(command: Command) -> None:
    if not command.file.system.firmware.snp.initialised:
        raise KvmError(ENODEV, "SNP is not initialised")


def _snp_commit(command: Command) -> None:
    _snp(command)
    command.file.system.firmware.begin("SNP_COMMIT")


def _snp_set_config(command: Command) -> None:
    _snp(command)
    if not command.address:
        raise KvmError(EINVAL, "no configuration")
    command.need_writable()
    layout = psp.SEV_USER_DATA_SNP_CONFIG
    data = command.read(layout)
    snp = command.file.system.firmware.snp
    snp.reported_tcb, snp.flags = layout.get(data, "reported_tcb"), layout.get(data, "flags")


def _snp_vlek_load(command: Command) -> None:
    _snp(command)
    if not command.address:
        raise KvmError(EINVAL, "no key")
    command.need_writable()
    layout = psp.SEV_USER_DATA_SNP_VLEK_LOAD
    data = command.read(layout)
    if layout.get(data, "len") != layout.size_bytes or layout.get(data, "vlek_wrapped_version"):
        raise KvmError(EINVAL, "length or version of a wrapped VLEK")
    size = psp.SEV_USER_DATA_SNP_WRAPPED_VLEK_HASHSTICK_BYTES
    command.client.read(layout.get(data, "vlek_wrapped_address"), size)
    command.file.system.firmware.snp.vlek = True


def _fits(*lengths: int) -> None:
    """Linux answers EFAULT to a buffer that is too long for the firmware."""
    if max(lengths) > SEV_FW_BLOB_MAX_SIZE:
        raise KvmError(EFAULT, f"buffers of {lengths} bytes")


def _query(
    command: Command,
    layout: Layout,
    data: bytearray,
    names: tuple[str, ...],
    run: Callable[[], tuple[bytes, ...]],
) -> tuple[bytes, ...]:
    """Run a command that answers with blobs; their lengths are copied out, also when refused."""
    try:
        blobs = run()
    except FirmwareError as refused:
        for name, length in zip(names, refused.lengths, strict=False):
            layout.put(data, name, length)
        command.write(data)
        raise
    for name, blob in zip(names, blobs, strict=True):
        layout.put(data, name, len(blob))
    command.write(data)
    return blobs


COMMANDS: dict[int, Callable[[Command], None]] = {
    psp.SEV_FACTORY_RESET: _factory_reset,
    psp.SEV_PLATFORM_STATUS: _platform_status,
    psp.SEV_PEK_GEN: _pek_gen,
    psp.SEV_PEK_CSR: _pek_csr,
    psp.SEV_PDH_GEN: _pdh_gen,
    psp.SEV_PDH_CERT_EXPORT: _pdh_cert_export,
    psp.SEV_PEK_CERT_IMPORT: _pek_cert_import,
    psp.SEV_GET_ID: _get_id,
    psp.SEV_GET_ID2: _get_id2,
    psp.SNP_PLATFORM_STATUS: _snp_platform_status,
    psp.SNP_COMMIT: _snp_commit,
    psp.SNP_SET_CONFIG: _snp_set_config,
    psp.SNP_VLEK_LOAD: _snp_vlek_load,
}
