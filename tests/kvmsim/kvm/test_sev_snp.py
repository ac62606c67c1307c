import hashlib
from errno import EBADF, EFAULT, EINVAL, EIO, ENOTTY, EPERM

import pytest

from kvmsim.abi import sev as abi

SEV, SEV_ES, SNP = 2, 3, 4
UNTOUCHED = 77
POLICY = 3 << 16
MEMFD, REGION2 = 0xC040AED4, 0x40A0AE49
START, UPDATE, FINISH = 100, 101, 102


def start(vmm, vm, policy=POLICY, sev_fd=None, **values):
    layout = abi.KVM_SEV_SNP_LAUNCH_START_STRUCT
    return vmm.run(vm, START, layout, policy=policy, sev_fd=sev_fd, **values)


def private_memory(vmm, vm, pages=4):
    """A slot of private memory at guest page frame 16."""
    memfd = bytearray(64)
    memfd[0:8] = (pages * 4096).to_bytes(8, "little")
    fd = vmm.client.open(vm.ioctl(MEMFD, memfd, vmm.client))
    region = bytearray(160)
    region[4] = 4  # KVM_MEM_GUEST_MEMFD
    region[8:16] = (16 * 4096).to_bytes(8, "little")
    region[16:24] = (pages * 4096).to_bytes(8, "little")
    region[24:32] = vmm.memory(bytes(pages * 4096))[0].to_bytes(8, "little")
    region[40:44] = fd.to_bytes(4, "little")
    assert vm.ioctl(REGION2, region, vmm.client) == 0


def update(vmm, vm, address, length=4096, page_type=1, gfn=16, **values):
    return vmm.run(
        vm,
        UPDATE,
        abi.KVM_SEV_SNP_LAUNCH_UPDATE_STRUCT,
        gfn_start=gfn,
        uaddr=address,
        len=length,
        type=page_type,
        **values,
    )


def finish(vmm, vm, **values):
    return vmm.run(vm, FINISH, abi.KVM_SEV_SNP_LAUNCH_FINISH_STRUCT, **values)


def page_info(digest, contents, page_type, gpa):
    info = digest + contents + b"\x70\0" + bytes([page_type, 0, 0, 0, 0, 0])
    return hashlib.sha384(info + gpa.to_bytes(8, "little")).digest()


@pytest.fixture
def launched(vmm):
    """A client with a started SNP guest that has private memory."""
    vmm.vm = vmm.guest(SNP, vcpus=1)
    private_memory(vmm, vmm.vm)
    assert start(vmm, vmm.vm).answer == (0, 0)
    return vmm


def test_guest_takes_an_asid_of_the_es_pool(vmm, accounting):
    vm = vmm.guest(SNP)
    assert vm.key.asid == 1
    assert accounting.charged == {"sev_es": 1}


@pytest.mark.parametrize("number", [0, 1, 2, 16, 22, 99])
def test_other_commands_are_eperm_and_not_copied_back(vmm, number):
    assert vmm.run(vmm.guest(SNP), number).answer == (EPERM, UNTOUCHED)


@pytest.mark.parametrize(("number", "errno"), [(START, ENOTTY), (UPDATE, EINVAL), (FINISH, ENOTTY)])
@pytest.mark.parametrize("vm_type", [0, SEV, SEV_ES])
def test_snp_commands_for_other_guests(vmm, number, errno, vm_type):
    assert vmm.run(vmm.guest(vm_type), number).answer == (errno, UNTOUCHED)


@pytest.mark.parametrize(
    ("policy", "flags"),
    [
        (1 << 16, 0),
        (1 << 17, 0),
        (POLICY | 1 << 20, 0),
        (POLICY | 1 << 18, 0),
        (POLICY | 1 << 63, 0),
        (POLICY, 1),
    ],
)
def test_start_with_a_policy_or_flags_linux_does_not_take_is_einval(vmm, policy, flags):
    assert start(vmm, vmm.guest(SNP), policy, flags=flags).answer == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize("policy", [POLICY, POLICY | 1 << 19, POLICY | 0xFFFF])
def test_start_takes_debugging_and_a_minimum_version(vmm, policy):
    assert start(vmm, vmm.guest(SNP), policy).answer == (0, 0)


def test_second_start_is_einval(launched):
    assert start(launched, launched.vm).answer == (EINVAL, UNTOUCHED)


def test_start_without_a_device_has_no_context_which_is_enotty(vmm):
    assert start(vmm, vmm.guest(SNP), sev_fd=-1).answer == (ENOTTY, UNTOUCHED)


def test_update_before_the_start_is_einval(vmm):
    assert update(vmm, vmm.guest(SNP), 4096).answer == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize(
    "values",
    [{"length": 0}, {"length": 100}, {"flags": 1}, {"page_type": 2}, {"page_type": 0}, {"gfn": 99}],
)
def test_update_of_what_is_no_private_page_is_einval(launched, values):
    address, _ = launched.memory(bytes(4096))
    assert update(launched, launched.vm, address, **values).answer == (EINVAL, UNTOUCHED)


def test_update_of_ordinary_memory_is_einval(vmm):
    vm = vmm.guest(SNP)
    start(vmm, vm)
    region = bytearray(32)
    region[8:16] = (16 * 4096).to_bytes(8, "little")
    region[16:24] = (4096).to_bytes(8, "little")
    address, _ = vmm.memory(bytes(4096))
    region[24:32] = address.to_bytes(8, "little")
    assert vm.ioctl(0x4020AE46, region, vmm.client) == 0
    assert update(vmm, vm, address).answer == (EINVAL, UNTOUCHED)


def test_update_advances_the_range_and_measures_as_the_firmware_does(launched):
    first, second = b"a" * 4096, b"b" * 4096
    address, _ = launched.memory(first + second)
    outcome = update(launched, launched.vm, address, 8192)
    assert outcome.answer == (0, 0)
    assert (outcome["gfn_start"], outcome["uaddr"], outcome["len"]) == (18, address + 8192, 0)
    expected = page_info(bytes(48), hashlib.sha384(first).digest(), 1, 16 << 12)
    expected = page_info(expected, hashlib.sha384(second).digest(), 1, 17 << 12)
    assert launched.system.firmware.snp.guests[0].digest == expected


def test_pages_of_zeros_come_from_nowhere(launched):
    outcome = update(launched, launched.vm, 0, 8192, page_type=3)
    assert outcome.answer == (0, 0)
    assert (outcome["uaddr"], outcome["len"]) == (0, 0)


@pytest.mark.parametrize(("address", "length"), [(4096, 4096), (None, 8 * 4096)])
def test_update_that_fails_half_way_is_eio(launched, address, length):
    mapped, _ = launched.memory(bytes(8 * 4096))
    outcome = update(launched, launched.vm, address or mapped, length)
    assert outcome.errno == EIO


def test_update_through_a_bad_descriptor_is_eio(launched):
    address, _ = launched.memory(bytes(4096))
    assert update(launched, launched.vm, address, sev_fd=-1).answer == (EIO, UNTOUCHED)


def test_finish_measures_the_vcpus_and_makes_the_guest_runnable(launched):
    before = launched.system.firmware.snp.guests[0].digest
    assert finish(launched, launched.vm).answer == (0, 0)
    guest = launched.system.firmware.snp.guests[0]
    assert guest.finished
    assert guest.digest != before
    assert launched.vm.vcpus[0].state_protected


def test_finish_before_the_start_is_einval(vmm):
    assert finish(vmm, vmm.guest(SNP)).answer == (EINVAL, UNTOUCHED)


def test_finish_with_flags_is_einval(launched):
    assert finish(launched, launched.vm, flags=1).answer == (EINVAL, UNTOUCHED)


def test_finish_twice_is_einval_because_the_vcpus_are_protected(launched):
    finish(launched, launched.vm)
    assert finish(launched, launched.vm).errno == EINVAL


def id_block(vmm, digest, policy):
    block = digest.ljust(88, b"\0") + policy.to_bytes(8, "little")
    return {
        "id_block_en": 1,
        "id_block_uaddr": vmm.memory(block)[0],
        "id_auth_uaddr": vmm.memory(bytes(4096))[0],
    }


def digest_of_a_vmsa(vmm):
    """The digest a guest with one fresh vCPU and no memory comes to."""
    vm = vmm.guest(SNP, vcpus=1)
    start(vmm, vm)
    finish(vmm, vm)
    return vmm.system.firmware.snp.guests[0].digest


@pytest.mark.parametrize(
    ("change", "policy", "answer"),
    [(b"", POLICY, (0, 0)), (b"x", POLICY, (EIO, 11)), (b"", POLICY | 1, (EIO, 7))],
)
def test_id_block_has_to_expect_this_digest_and_policy(vmm, change, policy, answer):
    digest = change + digest_of_a_vmsa(vmm)[len(change) :]
    vm = vmm.guest(SNP, vcpus=1)
    start(vmm, vm)
    assert finish(vmm, vm, **id_block(vmm, digest, policy)).answer == answer


def test_id_block_that_cannot_be_read_is_efault(launched):
    outcome = finish(launched, launched.vm, id_block_en=1, id_block_uaddr=4096)
    assert outcome.errno == EFAULT


def test_finish_after_the_descriptor_was_closed_is_ebadf(launched):
    del launched.client.files[launched.sev_fd]
    assert finish(launched, launched.vm).errno == EBADF


def test_destruction_forgets_the_guest_and_its_asid_is_flushed_before_the_next(vmm, accounting):
    for expected in (1, 2, 3, 4, 1):
        vm = vmm.guest(SNP)
        assert vm.key.asid == expected
        assert start(vmm, vm).answer == (0, 0)
        vm.close()
    assert vmm.system.firmware.snp.guests == []
    assert accounting.charged == {"sev_es": 0}


def test_guest_runs_after_its_launch_only(vmm):
    vm = vmm.guest(SNP, vcpus=1)
    start(vmm, vm)
    assert vm.vcpus[0].kvm_run(0) is None
    assert vm.vcpus[0].run.exit_reason == 9
    finish(vmm, vm)
    assert vm.vcpus[0].kvm_run(0) is not None
