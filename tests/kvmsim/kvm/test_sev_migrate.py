from errno import EBADF, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY

import pytest

from kvmsim.abi import psp
from kvmsim.abi import sev as abi
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.system import System

INVALID_STATE, INVALID_LENGTH, CERTIFICATE, POLICY, MEASUREMENT = 2, 4, 6, 7, 11
UNTOUCHED = 77
NOSEND = 8
CERT, SESSION, HEADER = 2084, 128, 52
SEND_START = abi.KVM_SEV_SEND_START_STRUCT
SEND_DATA = abi.KVM_SEV_SEND_UPDATE_DATA_STRUCT
RECEIVE_START = abi.KVM_SEV_RECEIVE_START_STRUCT
RECEIVE_DATA = abi.KVM_SEV_RECEIVE_UPDATE_DATA_STRUCT


def pdh_of(vmm):
    """The platform's certificate, through /dev/sev."""
    file = SevFile(vmm.system)
    pdh, chain = bytearray(CERT), bytearray(3 * CERT)
    data = psp.SEV_USER_DATA_PDH_CERT_EXPORT.pack(
        pdh_cert_address=vmm.client.map(pdh),
        pdh_cert_len=len(pdh),
        cert_chain_address=vmm.client.map(chain),
        cert_chain_len=len(chain),
    )
    cmd = psp.SEV_ISSUE_CMD_STRUCT.pack(cmd=5, data=vmm.client.map(data))
    file.ioctl(psp.SEV_ISSUE_CMD, vmm.client.map(cmd), vmm.client)
    return bytes(pdh)


def send_start(vmm, vm, pdh, length=SESSION, **values):
    session, buffer = vmm.memory(bytes(max(length, 1)))
    values = {
        "pdh_cert_uaddr": vmm.memory(pdh)[0],
        "pdh_cert_len": len(pdh),
        "plat_certs_uaddr": vmm.memory(b"chain")[0],
        "plat_certs_len": 5,
        "amd_certs_uaddr": vmm.memory(b"amd")[0],
        "amd_certs_len": 3,
        "session_uaddr": session,
        "session_len": length,
    } | values
    return vmm.run(vm, abi.KVM_SEV_SEND_START, SEND_START, **values), bytes(buffer)


def send_data(vmm, vm, guest, size=4096, header=HEADER, room=4096, **values):
    values = {
        "hdr_uaddr": vmm.memory(bytes(header))[0],
        "hdr_len": header,
        "guest_uaddr": guest,
        "guest_len": size,
        "trans_uaddr": vmm.memory(bytes(room))[0],
        "trans_len": room,
    } | values
    outcome = vmm.run(vm, abi.KVM_SEV_SEND_UPDATE_DATA, SEND_DATA, **values)
    read = vmm.client.read
    if outcome.errno:
        return outcome, b"", b""
    return outcome, read(outcome["hdr_uaddr"], header), read(outcome["trans_uaddr"], room)


def receive_start(vmm, vm, pdh, session, policy=0):
    return vmm.run(
        vm,
        abi.KVM_SEV_RECEIVE_START,
        RECEIVE_START,
        policy=policy,
        pdh_uaddr=vmm.memory(pdh)[0],
        pdh_len=len(pdh),
        session_uaddr=vmm.memory(session)[0],
        session_len=len(session),
    )


def receive_data(vmm, vm, guest, header, data, size=4096, **values):
    values = {
        "hdr_uaddr": vmm.memory(header)[0],
        "hdr_len": len(header),
        "guest_uaddr": guest,
        "guest_len": size,
        "trans_uaddr": vmm.memory(data)[0],
        "trans_len": len(data),
    } | values
    return vmm.run(vm, abi.KVM_SEV_RECEIVE_UPDATE_DATA, RECEIVE_DATA, **values)


def plain(vmm, vm, address, size=16):
    target, seen = vmm.memory(bytes(size))
    outcome = vmm.run(
        vm,
        abi.KVM_SEV_DBG_DECRYPT,
        abi.KVM_SEV_DBG_STRUCT,
        src_uaddr=address,
        dst_uaddr=target,
        len=size,
    )
    assert outcome.answer == (0, 0)
    return bytes(seen)


@pytest.fixture
def sender(vmm):
    """A client with a running guest whose memory is known."""
    vmm.guest_memory, _ = vmm.memory(b"precious".ljust(4096))
    vmm.vm = vmm.running(memory=vmm.guest_memory)
    return vmm


@pytest.fixture
def sending(sender):
    """The same, on its way to its own platform."""
    outcome, sender.session = send_start(sender, sender.vm, pdh_of(sender))
    assert outcome.answer == (0, 0)
    return sender


@pytest.fixture
def elsewhere(vmm):
    """A client on another machine of the same kind."""
    other = System(vmm.system.machine, b"another chip")
    return type(vmm)(other)


# -- a whole journey -------------------------------------------------------------------------------


@pytest.mark.parametrize("same_host", [True, False])
def test_guest_arrives_with_its_memory_and_policy(sender, elsewhere, same_host):
    target = sender if same_host else elsewhere
    outcome, session = send_start(sender, sender.vm, pdh_of(target))
    assert outcome.answer == (0, 0)
    assert (outcome["policy"], outcome["session_len"]) == (0, SESSION)
    assert sender.state(sender.vm) == 4
    _, header, data = send_data(sender, sender.vm, sender.guest_memory)

    vm = target.guest()
    assert receive_start(target, vm, pdh_of(sender), session).answer == (0, 0)
    assert target.state(vm) == 5
    memory, _ = target.memory(bytes(4096))
    assert receive_data(target, vm, memory, header, data).answer == (0, 0)
    assert target.run(vm, abi.KVM_SEV_RECEIVE_FINISH).answer == (0, 0)
    assert sender.run(sender.vm, abi.KVM_SEV_SEND_FINISH).answer == (0, 0)

    assert (sender.state(sender.vm), target.state(vm)) == (6, 3)
    assert plain(target, vm, memory) == b"precious".ljust(16)


def test_stream_for_another_platform_is_refused(sender, elsewhere):
    _, session = send_start(sender, sender.vm, pdh_of(sender))
    outcome = receive_start(elsewhere, elsewhere.guest(), pdh_of(sender), session)
    assert outcome.answer == (EIO, MEASUREMENT)


def test_stream_given_with_another_policy_is_refused(sending):
    outcome = receive_start(sending, sending.guest(), pdh_of(sending), sending.session, policy=1)
    assert outcome.answer == (EIO, MEASUREMENT)


def test_packet_that_was_changed_on_the_way_is_refused(sending):
    _, header, data = send_data(sending, sending.vm, sending.guest_memory)
    vm = sending.guest()
    receive_start(sending, vm, pdh_of(sending), sending.session)
    memory, seen = sending.memory(bytes(4096))
    changed = bytes([data[0] ^ 1]) + data[1:]
    assert receive_data(sending, vm, memory, header, changed).answer == (EIO, MEASUREMENT)
    assert seen == bytes(4096)


# -- SEND_START ------------------------------------------------------------------------------------


def test_session_length_query(sender):
    outcome, _ = send_start(sender, sender.vm, b"", 0)
    assert outcome.answer == (EIO, INVALID_LENGTH)
    assert outcome["session_len"] == SESSION
    assert sender.state(sender.vm) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"pdh_cert_uaddr": 0},
        {"pdh_cert_len": 0},
        {"session_uaddr": 0},
        {"session_len": 16385},
        {"plat_certs_uaddr": 0},
        {"amd_certs_len": 0},
        {"pdh_cert_len": 16385},
    ],
)
def test_send_start_with_something_missing_is_einval(sender, values):
    outcome, _ = send_start(sender, sender.vm, pdh_of(sender), **values)
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_send_start_with_an_unreadable_certificate_is_efault(sender):
    outcome, _ = send_start(sender, sender.vm, b"x", plat_certs_uaddr=4096)
    assert outcome.errno == EFAULT


def test_send_start_with_something_else_for_a_certificate_is_refused(sender):
    outcome, _ = send_start(sender, sender.vm, b"no certificate")
    assert outcome.answer == (EIO, CERTIFICATE)


def test_send_start_against_the_policy_is_refused(vmm):
    vm = vmm.running(policy=NOSEND)
    outcome, _ = send_start(vmm, vm, pdh_of(vmm))
    assert outcome.answer == (EIO, POLICY)


def test_send_start_before_the_guest_runs_is_a_wrong_state(vmm):
    outcome, _ = send_start(vmm, vmm.started(), pdh_of(vmm))
    assert outcome.answer == (EIO, INVALID_STATE)


# -- SEND_UPDATE_DATA ------------------------------------------------------------------------------


@pytest.mark.parametrize(("header", "room"), [(0, 0), (0, 4096), (HEADER, 0)])
def test_packet_length_query(sending, header, room):
    outcome, _, _ = send_data(sending, sending.vm, 0, header=header, room=room)
    assert outcome.answer == (EIO, INVALID_LENGTH)
    assert (outcome["hdr_len"], outcome["trans_len"]) == (HEADER, 4096)


@pytest.mark.parametrize("member", ["trans_uaddr", "guest_uaddr", "guest_len", "hdr_uaddr"])
def test_packet_with_an_address_missing_is_einval(sending, member):
    outcome, _, _ = send_data(sending, sending.vm, sending.guest_memory, **{member: 0})
    assert outcome.answer == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize(("offset", "size"), [(16, 4096), (0, 4112)])
def test_packet_across_a_page_boundary_is_einval(sending, offset, size):
    outcome, _, _ = send_data(sending, sending.vm, sending.guest_memory + offset, size)
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_packet_from_unmapped_memory_is_enomem(sending):
    outcome, _, _ = send_data(sending, sending.vm, 1 << 20)
    assert outcome.errno == ENOMEM


def test_packet_before_the_session_is_a_wrong_state(sender):
    outcome, _, _ = send_data(sender, sender.vm, sender.guest_memory)
    assert outcome.answer == (EIO, INVALID_STATE)


@pytest.mark.parametrize(
    ("command", "state"), [(abi.KVM_SEV_SEND_FINISH, 6), (abi.KVM_SEV_SEND_CANCEL, 3)]
)
def test_end_of_sending(sending, command, state):
    assert sending.run(sending.vm, command).answer == (0, 0)
    assert sending.state(sending.vm) == state
    assert sending.run(sending.vm, command).answer == (EIO, INVALID_STATE)


# -- RECEIVE_* -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pdh", "session"), [(b"", b"x"), (b"x", b"")])
def test_receive_start_with_something_missing_is_einval(vmm, pdh, session):
    assert receive_start(vmm, vmm.guest(), pdh, session).answer == (EINVAL, UNTOUCHED)


def test_receive_start_with_a_short_session_is_refused(vmm):
    outcome = receive_start(vmm, vmm.guest(), pdh_of(vmm), b"short")
    assert outcome.answer == (EIO, INVALID_LENGTH)
    assert vmm.system.firmware.guests == {}


@pytest.mark.parametrize("member", ["hdr_len", "guest_uaddr", "trans_uaddr", "trans_len"])
def test_received_packet_with_something_missing_is_einval(vmm, member):
    vm = vmm.guest()
    outcome = receive_data(vmm, vm, vmm.memory(bytes(4096))[0], b"h", b"d", **{member: 0})
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_received_packet_across_a_page_boundary_is_einval(vmm):
    memory, _ = vmm.memory(bytes(8192))
    outcome = receive_data(vmm, vmm.guest(), memory + 16, b"h", b"d")
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_received_packet_before_the_session_is_a_wrong_state(vmm):
    memory, _ = vmm.memory(bytes(4096))
    vm = vmm.started()
    assert receive_data(vmm, vm, memory, b"h", b"d").answer == (EIO, INVALID_STATE)
    assert vmm.run(vm, abi.KVM_SEV_RECEIVE_FINISH).answer == (EIO, INVALID_STATE)


@pytest.mark.parametrize(
    "command",
    [
        abi.KVM_SEV_SEND_START,
        abi.KVM_SEV_SEND_UPDATE_DATA,
        abi.KVM_SEV_SEND_FINISH,
        abi.KVM_SEV_SEND_CANCEL,
        abi.KVM_SEV_RECEIVE_START,
        abi.KVM_SEV_RECEIVE_FINISH,
    ],
)
def test_migration_of_a_plain_vm_is_enotty(vmm, command):
    assert vmm.run(vmm.create(0), command).answer == (ENOTTY, UNTOUCHED)


@pytest.mark.parametrize(("quirk", "errno"), [("true", EINVAL), ("false", ENOTTY)])
def test_quirk_receive_update_einval(vmm_on, quirk, errno):
    vmm = vmm_on(f"[quirks]\nreceive_update_einval = {quirk}\n")
    assert vmm.run(vmm.create(0), abi.KVM_SEV_RECEIVE_UPDATE_DATA).answer == (errno, UNTOUCHED)


@pytest.mark.parametrize("number", [10, 14, 19, 23, 99, 103])
def test_commands_nobody_wrote_are_einval_and_not_copied_back(vmm, number):
    vm = vmm.started()
    assert vmm.run(vm, number).answer == (EINVAL, UNTOUCHED)


def test_send_through_a_closed_descriptor_is_ebadf(sender):
    del sender.client.files[sender.sev_fd]
    outcome, _ = send_start(sender, sender.vm, b"", 0)
    assert outcome.answer == (EBADF, UNTOUCHED)
