"""LAUNCH_*: from an initialised VM to a guest that may run (kvm.md D.4, D.5)."""

from __future__ import annotations

from errno import EINVAL, ENOTTY
from functools import partial
from typing import TYPE_CHECKING

from kvmsim.abi import sev as abi
from kvmsim.errors import KvmError
from kvmsim.kvm import protected, sev_private, sev_vmsa
from kvmsim.kvm.client import copy_to_user
from kvmsim.kvm.sev_command import (
    Params,
    direct,
    firmware_of,
    info,
    issue,
    issue_known,
    lengths_wanted,
    need_guest,
    pin,
    transform,
)
from kvmsim.sev.errors import FirmwareError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.kvm.client import Client
    from kvmsim.kvm.sev_command import SevCmd
    from kvmsim.kvm.vm import Vm


def launch_start(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_LAUNCH_START: a handle, bound to the ASID."""
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_LAUNCH_START_STRUCT)
    dh = params.blob("dh_uaddr", "dh_len") if params["dh_uaddr"] else b""
    session = params.blob("session_uaddr", "session_len") if params["session_uaddr"] else b""
    policy, shared = params["policy"], params["handle"]
    handle = issue(
        cmd,
        client,
        cmd.sev_fd,
        firmware_of(vm).launch_start,
        policy,
        shared,
        dh,
        session,
    )
    start(vm, cmd, params, handle)


def start(vm: Vm, cmd: SevCmd, params: Params, handle: int) -> None:
    """The end of LAUNCH_START and RECEIVE_START: bind a new handle, or forget it again."""
    firmware, sev = firmware_of(vm), info(vm)
    try:
        direct(cmd, firmware.activate, handle, sev.asid)
    except KvmError:
        release_handle(vm, handle)
        raise
    params["handle"] = handle
    try:
        params.write_back()
    except KvmError:
        release_handle(vm, handle)
        raise
    sev.handle = handle
    sev.fd = cmd.sev_fd


def release_handle(vm: Vm, handle: int) -> None:
    """DEACTIVATE and DECOMMISSION. Linux ignores what the firmware says to either."""
    firmware = firmware_of(vm)
    try:
        firmware.deactivate(handle)
        firmware.decommission(handle)
    except (FirmwareError, KvmError):
        # The guest is gone for KVM; the firmware keeps the handle, as it does on hardware.
        return


def launch_update_data(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_LAUNCH_UPDATE_DATA: measure memory and encrypt it in place."""
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_LAUNCH_UPDATE_DATA_STRUCT)
    address, length = params["uaddr"], params["len"]
    pin(vm, client, address, length, writable=True)
    firmware, handle = firmware_of(vm), info(vm).handle
    load = partial(firmware.launch_update_data, handle)
    issue_known(vm, cmd, client, transform, client, address, length, load)
    sev_private.add(vm, address, length)


def launch_update_vmsa(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_LAUNCH_UPDATE_VMSA: measure the vCPUs and protect their registers, in index order.

    What was protected before one is refused stays so. vCPUs in creation cannot be met (EBUSY on
    hardware): calls into a VM do not overlap here.
    """
    if not vm.es_active:
        raise KvmError(ENOTTY, "not an SEV-ES guest")
    firmware, handle = firmware_of(vm), info(vm).handle
    for vcpu in vm.vcpus.values():
        sev_vmsa.check_can_be_protected(vcpu)
        page = sev_vmsa.page(vcpu)
        issue_known(vm, cmd, client, firmware.launch_update_vmsa, handle, page)
        protected.protect(vcpu)


def launch_secret(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_LAUNCH_SECRET: what the owner sent goes into the guest.

    The target has to be physically contiguous. MODEL: it is when it lies in one page.
    """
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_LAUNCH_SECRET_STRUCT)
    address, length = params["guest_uaddr"], params["guest_len"]
    if pin(vm, client, address, length, writable=True) > 1:
        raise KvmError(EINVAL, "the pages of a secret are not contiguous")
    data = params.blob("trans_uaddr", "trans_len")
    header = params.blob("hdr_uaddr", "hdr_len")
    handle = info(vm).handle
    secret = issue_known(
        vm,
        cmd,
        client,
        firmware_of(vm).launch_secret,
        handle,
        address,
        length,
        header,
        data,
    )
    client.write(address, secret)
    sev_private.add(vm, address, length)


def launch_measure(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_LAUNCH_MEASURE: the digest (``kvmsim.sev.firmware`` says of what)."""
    need_guest(vm)
    params = Params(cmd, client, abi.KVM_SEV_LAUNCH_MEASURE_STRUCT)
    handle = info(vm).handle
    read_out(vm, cmd, client, params, partial(firmware_of(vm).launch_measure, handle))


def read_out(
    vm: Vm,
    cmd: SevCmd,
    client: Client,
    params: Params,
    answer: Callable[[int], bytes],
) -> None:
    """A firmware answer into ``uaddr`` and ``len``; ``len`` 0 asks how long it will be.

    The whole of the client's buffer is written, zeros behind the answer. Linux 6.12
    ``sev_launch_measure``: the length is copied out also when the query "fails", and only then.
    """
    address, length = params["uaddr"], params["len"]
    if length and address and length > abi.SEV_FW_BLOB_MAX_SIZE:
        raise KvmError(EINVAL, f"a buffer of {length} bytes")
    usable = length if address else 0
    try:
        blob = issue_known(vm, cmd, client, answer, usable)
    except KvmError as refused:
        if not length and (wanted := lengths_wanted(refused)):
            params["len"] = wanted[0]
            params.write_back()
        raise
    copy_to_user(client, address, blob.ljust(length, b"\0"))
    params["len"] = len(blob)
    params.write_back()


def launch_finish(vm: Vm, cmd: SevCmd, client: Client) -> None:
    """KVM_SEV_LAUNCH_FINISH."""
    need_guest(vm)
    handle = info(vm).handle
    issue_known(vm, cmd, client, firmware_of(vm).launch_finish, handle)
