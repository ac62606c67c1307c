"""SEND_* and RECEIVE_*: a guest leaves one platform and arrives at another (kvm.md D.4).

Lengths are asked for by giving 0: the call fails with EIO and status 4, and the lengths are there.
"""

from __future__ import annotations

from errno import EINVAL, ENOMEM, ENOTTY
from typing import TYPE_CHECKING

from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.kvm import sev_private
from kvmsim.kvm.client import copy_to_user
from kvmsim.kvm.sev_command import (
    PAGE_BYTES,
    Params,
    firmware_of,
    info,
    issue,
    issue_known,
    lengths_wanted,
    need_guest,
    pin,
    read_pinned,
)
from kvmsim.kvm.sev_launch import start

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.sev_command import SevCmd
    from kvmsim.kvm.vm import Vm

#: Longest buffer the kernel's allocator gives (Linux KMALLOC_MAX_SIZE).
KMALLOC_MAX_BYTES = 4 << 20


def send_start(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SEND_START: a session for the platform whose certificates are given.

    MODEL: of the certificates only the target's PDH is looked at.
    """
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_SEND_START_STRUCT)
    firmware, handle, length = firmware_of(vm), info(vm).handle, params["session_len"]
    if not length:
        try:
            issue_known(vm, cmd, client, firmware.send_start, handle, b"", 0)
        except KvmError as refused:
            _write_lengths(params, refused, "session_len")
            raise
    no_certificate = not params["pdh_cert_uaddr"] or not params["pdh_cert_len"]
    no_room = not params["session_uaddr"] or length > abi.SEV_FW_BLOB_MAX_SIZE
    if no_certificate or no_room:
        raise KvmError(EINVAL, "certificate or session of KVM_SEV_SEND_START")
    pdh = params.blob("pdh_cert_uaddr", "pdh_cert_len")
    params.blob("plat_certs_uaddr", "plat_certs_len")
    params.blob("amd_certs_uaddr", "amd_certs_len")
    policy, session = issue_known(vm, cmd, client, firmware.send_start, handle, pdh, length)
    copy_to_user(client, params["session_uaddr"], session.ljust(length, b"\0"))
    params["policy"], params["session_len"] = policy, len(session)
    params.write_back()


def send_update_data(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SEND_UPDATE_DATA: a packet from guest memory within one page."""
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_SEND_UPDATE_DATA_STRUCT)
    firmware, handle = firmware_of(vm), info(vm).handle
    room = (params["hdr_len"], params["trans_len"])
    if not all(room):
        try:
            issue_known(vm, cmd, client, firmware.send_update_data, handle, 0, b"", 0, 0)
        except KvmError as refused:
            _write_lengths(params, refused, "hdr_len", "trans_len")
            raise
    address, length = params["guest_uaddr"], params["guest_len"]
    if not (params["trans_uaddr"] and address and length and params["hdr_uaddr"]):
        raise KvmError(EINVAL, "an address of KVM_SEV_SEND_UPDATE_DATA")
    _within_page(address, length)
    pin(vm, client, address & -PAGE_BYTES, PAGE_BYTES, writable=False)
    if max(room) > KMALLOC_MAX_BYTES:
        raise KvmError(ENOMEM, f"buffers of {room} bytes")
    encrypted = read_pinned(client, address, length)
    header, data = issue_known(
        vm,
        cmd,
        client,
        firmware.send_update_data,
        handle,
        address,
        encrypted,
        *room,
    )
    copy_to_user(client, params["trans_uaddr"], data.ljust(room[1], b"\0"))
    copy_to_user(client, params["hdr_uaddr"], header.ljust(room[0], b"\0"))


def send_finish(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SEND_FINISH."""
    need_guest(vm)
    handle = info(vm).handle
    issue_known(vm, cmd, client, firmware_of(vm).send_finish, handle)


def send_cancel(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_SEND_CANCEL."""
    need_guest(vm)
    handle = info(vm).handle
    issue_known(vm, cmd, client, firmware_of(vm).send_cancel, handle)


def receive_start(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_RECEIVE_START: a handle for a guest that arrives, bound to the ASID."""
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_RECEIVE_START_STRUCT)
    if not all(params[name] for name in ("pdh_uaddr", "pdh_len", "session_uaddr", "session_len")):
        raise KvmError(EINVAL, "certificate or session of KVM_SEV_RECEIVE_START")
    pdh = params.blob("pdh_uaddr", "pdh_len")
    session = params.blob("session_uaddr", "session_len")
    policy, shared = params["policy"], params["handle"]
    handle = issue(
        cmd,
        client,
        cmd.sev_fd,
        firmware_of(vm).receive_start,
        policy,
        shared,
        pdh,
        session,
    )
    start(vm, cmd, params, handle)


def receive_update_data(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_RECEIVE_UPDATE_DATA: a packet into guest memory within one page."""
    if not vm.sev_active:
        wrong = EINVAL if vm.machine.quirks.receive_update_einval else ENOTTY
        raise KvmError(wrong, "not an SEV guest")
    params = Params(cmd, client, abi.KVM_SEV_RECEIVE_UPDATE_DATA_STRUCT)
    if not all(params[name] for name in abi.KVM_SEV_RECEIVE_UPDATE_DATA_STRUCT.fields):
        raise KvmError(EINVAL, "an address or length of KVM_SEV_RECEIVE_UPDATE_DATA")
    address, length = params["guest_uaddr"], params["guest_len"]
    _within_page(address, length)
    header = params.blob("hdr_uaddr", "hdr_len")
    data = params.blob("trans_uaddr", "trans_len")
    pin(vm, client, address & -PAGE_BYTES, PAGE_BYTES, writable=True)
    handle = info(vm).handle
    encrypted = issue_known(
        vm,
        cmd,
        client,
        firmware_of(vm).receive_update_data,
        handle,
        address,
        length,
        header,
        data,
    )
    client.write(address, encrypted)
    sev_private.add(vm, address, length)


def receive_finish(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_RECEIVE_FINISH."""
    need_guest(vm)
    handle = info(vm).handle
    issue_known(vm, cmd, client, firmware_of(vm).receive_finish, handle)


def _within_page(address: int, length: int) -> None:
    if address % PAGE_BYTES + length > PAGE_BYTES:
        raise KvmError(EINVAL, f"{length} bytes at {address:#x} cross a page boundary")


def _write_lengths(params: Params, refused: KvmError, *names: str) -> None:
    """A query was answered: copy the lengths out."""
    for name, wanted in zip(names, lengths_wanted(refused), strict=False):
        params[name] = wanted
    params.write_back()
