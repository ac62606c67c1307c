from errno import EBADF, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY

import pytest

from kvmsim.abi import sev as abi

DBG = abi.KVM_SEV_DBG_STRUCT
REPORT = abi.KVM_SEV_ATTESTATION_REPORT_STRUCT
DECRYPT, ENCRYPT = abi.KVM_SEV_DBG_DECRYPT, abi.KVM_SEV_DBG_ENCRYPT
UNTOUCHED = 77


@pytest.fixture
def debugged(vmm):
    """A client with a running guest whose memory is known."""
    vmm.secret = bytes(range(256)) * 32
    vmm.guest_memory, vmm.cipher = vmm.memory(vmm.secret)
    vmm.vm = vmm.started()
    vmm.load(vmm.vm, vmm.guest_memory, 8192)
    return vmm


def debug(vmm, command, source, target, length):
    return vmm.run(vmm.vm, command, DBG, src_uaddr=source, dst_uaddr=target, len=length)


def test_status_of_a_vm_that_is_no_guest_is_enotty(vmm):
    assert vmm.status(vmm.create(0)).answer == (ENOTTY, UNTOUCHED)


def test_status_before_the_start_is_ebadf(vmm):
    assert vmm.status(vmm.guest()).answer == (EBADF, UNTOUCHED)


def test_status_before_the_start_is_an_invalid_guest_when_descriptor_0_is_the_device(vmm):
    vmm.client.files[0] = vmm.client.files[vmm.sev_fd]
    assert vmm.status(vmm.guest()).answer == (EIO, 16)


def test_status_into_bad_memory_is_efault_after_the_firmware_answered(vmm):
    vm = vmm.started()
    assert vmm.run_at(vm, abi.KVM_SEV_GUEST_STATUS, 8).answer == (EFAULT, 0)


@pytest.mark.parametrize(("offset", "length"), [(0, 8192), (3, 1), (100, 5000), (4090, 20)])
def test_decryption_shows_what_was_loaded_at_any_offset(debugged, offset, length):
    target, seen = debugged.memory(bytes(3 * 4096))
    source = debugged.guest_memory + offset
    assert debug(debugged, DECRYPT, source, target + 7, length).answer == (0, 0)
    assert seen[7 : 7 + length] == debugged.secret[offset : offset + length]
    assert seen[7 + length :] == bytes(len(seen) - 7 - length)


def test_encryption_changes_what_the_guest_sees(debugged):
    source, _ = debugged.memory(b"patched")
    at = debugged.guest_memory + 4093
    assert debug(debugged, ENCRYPT, source, at, 7).answer == (0, 0)
    target, seen = debugged.memory(bytes(7))
    debug(debugged, DECRYPT, at, target, 7)
    assert seen == b"patched"


def test_debugging_against_the_policy_is_refused(vmm):
    vmm.vm = vmm.started(policy=1)
    address, _ = vmm.memory(bytes(16))
    assert debug(vmm, DECRYPT, address, address, 16).answer == (EIO, 7)


@pytest.mark.parametrize("command", [DECRYPT, ENCRYPT])
@pytest.mark.parametrize(
    ("source", "target", "length"), [(4096, 4096, 0), (2**64 - 1, 4096, 16), (4096, 0, 16)]
)
def test_debugging_nothing_is_einval(debugged, command, source, target, length):
    assert debug(debugged, command, source, target, length).answer == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize("command", [DECRYPT, ENCRYPT])
def test_debugging_unmapped_memory_is_enomem(debugged, command):
    assert debug(debugged, command, 4096, debugged.guest_memory, 16).errno == ENOMEM
    assert debug(debugged, command, debugged.guest_memory, 4096, 16).errno == ENOMEM


@pytest.mark.parametrize("command", [DECRYPT, ENCRYPT, abi.KVM_SEV_GET_ATTESTATION_REPORT])
def test_looking_into_a_plain_vm_is_enotty(vmm, command):
    assert vmm.run(vmm.create(0), command).answer == (ENOTTY, UNTOUCHED)


def report(vmm, vm, length, nonce=7):
    address, buffer = vmm.memory(b"\xff" * max(length, 1))
    outcome = vmm.run(
        vm,
        abi.KVM_SEV_GET_ATTESTATION_REPORT,
        REPORT,
        mnonce=nonce,
        uaddr=address,
        len=length,
    )
    return outcome, bytes(buffer)


def test_report_has_the_nonce_the_digest_and_the_policy(vmm):
    vm = vmm.running(policy=0x20)
    outcome, blob = report(vmm, vm, 300)
    assert outcome.answer == (0, 0)
    assert outcome["len"] == 208
    assert blob[:16] == bytes([7]) + bytes(15)
    assert blob[16:48] == vmm.system.firmware.guests[1].digest.digest()
    assert blob[48:52] == bytes([0x20, 0, 0, 0])
    assert blob[208:] == bytes(92)


def test_report_length_query(vmm):
    outcome, _ = report(vmm, vmm.running(), 0)
    assert outcome.answer == (EIO, 4)
    assert outcome["len"] == 208


def test_report_into_a_huge_buffer_is_einval(vmm):
    outcome, _ = report(vmm, vmm.running(), 16385)
    assert outcome.answer == (EINVAL, UNTOUCHED)
