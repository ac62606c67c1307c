import hashlib

import pytest

from kvmsim.abi.psp import GuestState, PlatformState, Status
from kvmsim.sev import transport
from kvmsim.sev.errors import FirmwareError
from kvmsim.sev.firmware import Firmware
from kvmsim.sev.memory_key import MemoryKey

ES_POLICY = 4


def status_of(call, *args, **kwargs):
    with pytest.raises(FirmwareError) as error:
        call(*args, **kwargs)
    return error.value.status


@pytest.fixture
def firmware():
    """ASIDs 1 to 4 are for SEV-ES."""
    firmware = Firmware(b"chip", 5)
    firmware.init()
    return firmware


def test_nothing_starts_before_init():
    assert status_of(Firmware().launch_start, 0) == Status.INVALID_PLATFORM_STATE


def test_platform_works_as_long_as_there_are_guests(firmware):
    first, second = firmware.launch_start(0), firmware.launch_start(0)
    assert firmware.platform.state == PlatformState.WORKING
    firmware.decommission(first)
    assert firmware.platform.state == PlatformState.WORKING
    firmware.decommission(second)
    assert firmware.platform.state == PlatformState.INIT


def test_handles_are_not_given_again(firmware):
    first = firmware.launch_start(0)
    firmware.decommission(first)
    assert firmware.launch_start(0) != first


def test_asid_belongs_to_one_guest(firmware):
    first, second = firmware.launch_start(0), firmware.launch_start(0)
    firmware.activate(first, 5)
    assert status_of(firmware.activate, second, 5) == Status.ASID_OWNED
    assert status_of(firmware.activate, first, 6) == Status.ACTIVE


@pytest.mark.parametrize(("policy", "asid"), [(0, 4), (ES_POLICY, 5)])
def test_asid_has_to_be_of_the_class_of_the_policy(firmware, policy, asid):
    handle = firmware.launch_start(policy)
    assert status_of(firmware.activate, handle, asid) == Status.INVALID_ASID


def test_active_guest_is_not_decommissioned(firmware):
    handle = firmware.launch_start(0)
    firmware.activate(handle, 5)
    assert status_of(firmware.decommission, handle) == Status.ACTIVE


def test_asid_is_usable_again_after_a_flush_only(firmware):
    handle = firmware.launch_start(0)
    firmware.activate(handle, 5)
    firmware.deactivate(handle)
    assert status_of(firmware.activate, handle, 5) == Status.DFFLUSH_REQUIRED
    firmware.df_flush()
    firmware.activate(handle, 5)
    assert firmware.guests[handle].asid == 5


@pytest.mark.parametrize("handle", [0, 7])
def test_unknown_handle_is_an_invalid_guest(firmware, handle):
    assert status_of(firmware.guest_status, handle) == Status.INVALID_GUEST


STATES = {
    GuestState.LAUNCH_UPDATE: (),
    GuestState.LAUNCH_SECRET: ("measure",),
    GuestState.RUNNING: ("finish",),
    GuestState.SEND_UPDATE: ("finish", "send"),
    GuestState.SENT: ("finish", "send", "send_finish"),
    GuestState.RECEIVE_UPDATE: None,
}
COMMANDS = {
    "update": {GuestState.LAUNCH_UPDATE: GuestState.LAUNCH_UPDATE},
    "vmsa": {GuestState.LAUNCH_UPDATE: GuestState.LAUNCH_UPDATE},
    "measure": {GuestState.LAUNCH_UPDATE: GuestState.LAUNCH_SECRET},
    "secret": {GuestState.LAUNCH_SECRET: GuestState.LAUNCH_SECRET},
    "finish": {
        GuestState.LAUNCH_UPDATE: GuestState.RUNNING,
        GuestState.LAUNCH_SECRET: GuestState.RUNNING,
    },
    "send": {GuestState.RUNNING: GuestState.SEND_UPDATE},
    "send_update": {GuestState.SEND_UPDATE: GuestState.SEND_UPDATE},
    "send_finish": {GuestState.SEND_UPDATE: GuestState.SENT},
    "send_cancel": {GuestState.SEND_UPDATE: GuestState.RUNNING},
    "receive_update": {GuestState.RECEIVE_UPDATE: GuestState.RECEIVE_UPDATE},
    "receive_finish": {GuestState.RECEIVE_UPDATE: GuestState.RUNNING},
}


def carry_out(firmware, handle, command):
    """A command with arguments that are all right."""
    guest = firmware.guests[handle]
    pdh = firmware.platform.pdh_cert_export(9999, 9999)[0]
    secret = transport.seal(
        guest.keys, transport.SECRET_TAG, bytes(16), bytes(16), guest.measurement
    )
    packet = transport.seal(guest.keys, transport.SEND_TAG, bytes(16), bytes(16))
    calls = {
        "update": lambda: firmware.launch_update_data(handle, 0, bytes(16)),
        "vmsa": lambda: firmware.launch_update_vmsa(handle, bytes(4096)),
        "measure": lambda: firmware.launch_measure(handle, 48),
        "secret": lambda: firmware.launch_secret(handle, 0, 16, *secret),
        "finish": lambda: firmware.launch_finish(handle),
        "send": lambda: firmware.send_start(handle, pdh, 128),
        "send_update": lambda: firmware.send_update_data(handle, 0, bytes(16), 52, 16),
        "send_finish": lambda: firmware.send_finish(handle),
        "send_cancel": lambda: firmware.send_cancel(handle),
        "receive_update": lambda: firmware.receive_update_data(handle, 0, 16, *packet),
        "receive_finish": lambda: firmware.receive_finish(handle),
    }
    return calls[command]()


def received(firmware):
    """A guest that arrives from this very platform."""
    pdh = firmware.platform.pdh_cert_export(9999, 9999)[0]
    sender = firmware.launch_start(0)
    firmware.launch_finish(sender)
    _, session = firmware.send_start(sender, pdh, 128)
    return firmware.receive_start(0, 0, pdh, session)


def guest_in(firmware, state):
    if STATES[state] is None:
        return received(firmware)
    handle = firmware.launch_start(0)
    for command in STATES[state]:
        carry_out(firmware, handle, command)
    return handle


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_every_state(firmware, command, state):
    handle = guest_in(firmware, state)
    assert firmware.guest_status(handle) == (0, state)
    after = COMMANDS[command].get(state)
    if after is None:
        assert status_of(carry_out, firmware, handle, command) == Status.INVALID_GUEST_STATE
        after = state
    else:
        carry_out(firmware, handle, command)
    assert firmware.guest_status(handle) == (0, after)


@pytest.mark.parametrize("state", STATES)
def test_debugging_and_attestation_work_in_every_state(firmware, state):
    handle = guest_in(firmware, state)
    assert firmware.debug(handle, 0, bytes(16), decrypt=True) != bytes(16)
    assert len(firmware.attestation(handle, bytes(16), 208)) == 208


def test_secret_longer_than_its_target_is_refused(firmware):
    handle = guest_in(firmware, GuestState.LAUNCH_SECRET)
    call = firmware.launch_secret
    assert status_of(call, handle, 0, 16, bytes(52), bytes(32)) == Status.INVALID_LENGTH


def test_packet_longer_than_its_target_is_refused(firmware):
    handle = received(firmware)
    call = firmware.receive_update_data
    assert status_of(call, handle, 0, 16, bytes(52), bytes(32)) == Status.INVALID_LENGTH


def test_digest_is_of_the_plaintext_in_order(firmware):
    handle = firmware.launch_start(ES_POLICY)
    firmware.launch_update_data(handle, 4096, b"a" * 16)
    firmware.launch_update_vmsa(handle, b"v" * 4096)
    expected = hashlib.sha256(b"a" * 16 + b"v" * 4096).digest()
    assert firmware.guests[handle].digest.digest() == expected


def test_guests_do_not_share_keys_or_nonces(firmware):
    first, second = firmware.launch_start(0), firmware.launch_start(0)
    blobs = [firmware.launch_update_data(handle, 0, bytes(64)) for handle in (first, second)]
    assert blobs[0] != blobs[1]
    nonces = [firmware.launch_measure(handle, 48)[32:] for handle in (first, second)]
    assert nonces[0] != nonces[1]


def test_machines_differ_and_one_machine_repeats_itself():
    chips = [Firmware(chip).platform.chip_id for chip in (b"a", b"b", b"a")]
    assert chips[0] == chips[2] != chips[1]
    assert len(chips[0]) == 64


def test_snp_needs_a_machine_set_up_for_it(firmware):
    assert status_of(firmware.snp.create) == Status.INVALID_PLATFORM_STATE


def test_snp_launch_is_over_once(firmware):
    snp = firmware.snp
    snp.initialised = True
    guest = snp.create()
    snp.launch_finish(guest, bytes(32), None)
    assert status_of(snp.launch_update, guest, 0, 1, None) == Status.INVALID_GUEST_STATE
    assert status_of(snp.launch_finish, guest, bytes(32), None) == Status.INVALID_GUEST_STATE


def test_memory_key_is_its_own_inverse_and_knows_the_offset_in_a_page():
    key = MemoryKey(b"key")
    text = bytes(range(256)) * 40
    cipher = key.apply(0x7F00_0000_0010, text)
    assert key.apply(0x10, cipher) == text
    assert key.apply(0x20, cipher) != text
    assert key.apply(0x1010 + 96, cipher[96:100]) == text[96:100]
