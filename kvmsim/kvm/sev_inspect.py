"""GUEST_STATUS, DBG_*, attestation: looking at a guest that was started."""

from __future__ import annotations

from errno import EINVAL
from functools import partial
from typing import TYPE_CHECKING

from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.kvm.client import copy_to_user
from kvmsim.kvm.sev_command import (
    PAGE_BYTES,
    U64,
    Params,
    firmware_of,
    info,
    issue_known,
    need_guest,
    pin,
    read_pinned,
)
from kvmsim.kvm.sev_launch import read_out

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.sev_command import SevCmd
    from kvmsim.kvm.vm import Vm


def guest_status(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_GUEST_STATUS. What is in the structure beforehand does not matter."""
    need_guest(vm)
    handle = info(vm).handle
    policy, state = issue_known(vm, cmd, client, firmware_of(vm).guest_status, handle)
    data = abi.KVM_SEV_GUEST_STATUS_STRUCT.pack(handle=handle, policy=policy, state=state)
    copy_to_user(client, cmd.data, bytes(data))


def debug_decrypt(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_DBG_DECRYPT: guest memory to plain memory."""
    _debug(vm, cmd, client, decrypt=True)


def debug_encrypt(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_DBG_ENCRYPT: plain memory to guest memory."""
    _debug(vm, cmd, client, decrypt=False)


def _debug(vm: Vm, cmd: SevCmd, client: Client, *, decrypt: bool) -> None:
    """Page by page of the source; no alignment is asked for, KVM goes through a buffer.

    The key depends on where the *guest's* bytes are: the source of a decryption, the target of an
    encryption.
    """
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_DBG_STRUCT)
    source, target, left = params["src_uaddr"], params["dst_uaddr"], params["len"]
    if not left or source + left > U64 or not target:
        raise KvmError(EINVAL, f"{left} bytes from {source:#x} to {target:#x}")
    firmware, handle = firmware_of(vm), info(vm).handle
    while left:
        size = min(PAGE_BYTES - source % PAGE_BYTES, left)
        pin(vm, client, source & -PAGE_BYTES, PAGE_BYTES, writable=False)
        pin(vm, client, target & -PAGE_BYTES, PAGE_BYTES, writable=True)
        at = source if decrypt else target
        data = read_pinned(client, source, size)
        changed = issue_known(vm, cmd, client, firmware.debug, handle, at, data, decrypt=decrypt)
        client.write(target, changed)
        source, target, left = source + size, target + size, left - size


def attestation_report(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_GET_ATTESTATION_REPORT."""
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_ATTESTATION_REPORT_STRUCT)
    nonce, handle = params.bytes_of("mnonce", 16), info(vm).handle
    read_out(vm, cmd, client, params, partial(firmware_of(vm).attestation, handle, nonce))
