"""What a call asks for, in words: the names and members of the ABI tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmsim.abi import caps, ioctls, sev, structs
from kvmsim.abi.arguments import ARGUMENTS
from kvmsim.abi.exits import Exit
from kvmsim.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmsim.abi.layout import Layout
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.page import KvmRun

SEV_ISSUE_CMD = 0xC0105300

_NAMES: Mapping[str, Mapping[int, str]] = {
    kind: {number: name for name, number in table.items()}
    for kind, table in {
        "system": ioctls.SYSTEM,
        "vm": ioctls.VM,
        "vcpu": ioctls.VCPU,
        "sev": {"SEV_ISSUE_CMD": SEV_ISSUE_CMD},
    }.items()
}
_ALL_NAMES = {number: name for table in _NAMES.values() for number, name in table.items()}
_CAPS = {value: name for name, value in vars(caps).items() if name.startswith("KVM_CAP_")}
_MSRS = (structs.KVM_MSRS, "nmsrs", structs.KVM_MSR_ENTRY)
_CPUID = (structs.KVM_CPUID2, "nent", structs.KVM_CPUID_ENTRY2)
# Tables whose entries follow their header: header, member with their number, entry.
_TABLES = {
    ioctls.KVM_GET_MSRS: _MSRS,
    ioctls.KVM_SET_MSRS: _MSRS,
    ioctls.KVM_SET_CPUID2: _CPUID,
    ioctls.KVM_GET_CPUID2: _CPUID,
    ioctls.KVM_GET_SUPPORTED_CPUID: _CPUID,
}
_SEV_COMMANDS = {number: name for name, number in sev.COMMANDS.items()}

MAX_ENTRIES = 64
"""Entries of a table that are shown."""

MAX_ELEMENTS = 16
"""Elements of an array that are shown as numbers; a longer one is shown as bytes."""

_MAX_SHOWN_BYTES = 256


def request_name(kind: str, request: int) -> str:
    """What a request is called on a kind of descriptor; its number if it has no name there."""
    name = _NAMES.get(kind, {}).get(request) or _ALL_NAMES.get(request)
    return name or f"{request:#x}"


def reads_back(request: int) -> bool:
    """Whether the kernel writes to the structure a request points at."""
    return bool(request >> 31)


def argument(request: int, arg: int, client: Client) -> Any:  # noqa: ANN401 - goes to JSON
    """The third argument: a number, or the structure it points at.

    A pointer that cannot be read is ``{"address": N}``.
    """
    layout = ARGUMENTS.get(request)
    if request == ioctls.KVM_CHECK_EXTENSION and arg in _CAPS:
        return {"cap": arg, "name": _CAPS[arg]}
    if layout is None:
        return arg
    try:
        return _pointed_at(request, layout, arg, client)
    except KvmError:
        return {"address": arg}


def run_exit(page: KvmRun) -> dict[str, object]:
    """Why KVM_RUN returned."""
    reason = page.exit_reason
    try:
        shown: dict[str, object] = {"reason": Exit(reason).name}
    except ValueError:
        shown = {"reason": reason}
    if page.flags:
        shown["flags"] = page.flags
    if reason == Exit.IO:
        direction, size, port, count = page.io
        shown |= {"port": port, "size": size, "count": count}
        if direction:
            shown["data"] = page.io_data().hex()
    elif reason == Exit.MMIO:
        address, data, is_write = page.mmio
        shown |= {"address": address, "size": len(data), "write": bool(is_write)}
        if is_write:
            shown["data"] = data.hex()
    return shown


def members(layout: Layout, data: bytes) -> dict[str, object]:
    """The members of a structure; padding is left out."""
    shown: dict[str, object] = {}
    for name, member in layout.fields.items():
        if name.startswith(("pad", "reserved")):
            continue
        if member.count == 1:
            shown[name] = layout.get(data, name)
        elif member.count <= MAX_ELEMENTS:
            shown[name] = [layout.get(data, name, index) for index in range(member.count)]
        else:
            end = min(len(data), member.offset + _MAX_SHOWN_BYTES)
            shown[name] = data[member.offset : end].hex()
    return shown


def _pointed_at(request: int, layout: Layout, arg: int, client: Client) -> dict[str, object]:
    data = client.read(arg, layout.size_bytes)
    shown = members(layout, data)
    if request == ioctls.KVM_ENABLE_CAP:
        shown["name"] = _CAPS.get(layout.get(data, "cap"), "?")
    elif request == ioctls.KVM_MEMORY_ENCRYPT_OP:
        _add_command(shown, data, client)
    elif request in _TABLES:
        header, number, entry = _TABLES[request]
        count = min(header.get(data, number), MAX_ENTRIES)
        table = client.read(arg + header.size_bytes, count * entry.size_bytes)
        step = entry.size_bytes
        shown["entries"] = [
            members(entry, table[at : at + step]) for at in range(0, len(table), step)
        ]
    return shown


def _add_command(shown: dict[str, object], data: bytes, client: Client) -> None:
    """The command of KVM_MEMORY_ENCRYPT_OP with its own structure."""
    number = sev.KVM_SEV_CMD.get(data, "id")
    shown["command"] = _SEV_COMMANDS.get(number, number)
    layout = sev.PARAMETERS.get(number)
    if layout is not None:
        try:
            address = sev.KVM_SEV_CMD.get(data, "data")
            shown["parameters"] = members(layout, client.read(address, layout.size_bytes))
        except KvmError:
            shown["parameters"] = None
