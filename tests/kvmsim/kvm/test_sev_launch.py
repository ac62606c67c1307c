import hashlib
import hmac
from errno import EBADF, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY

import pytest

from kvmsim.abi import sev as abi
from kvmsim.kvm import sregs
from kvmsim.sev import transport
from kvmsim.sev.asid import AsidPool
from kvmsim.sev.keys import Keys

SEV, SEV_ES = 2, 3
INVALID_STATE, INVALID_LENGTH, ADDRESS, ASID_OWNED, INVALID_ASID = 2, 4, 9, 12, 13
DFFLUSH_REQUIRED = 15
UNTOUCHED = 77
MEASURE = abi.KVM_SEV_LAUNCH_MEASURE_STRUCT
START = abi.KVM_SEV_LAUNCH_START_STRUCT
SECRET = abi.KVM_SEV_LAUNCH_SECRET_STRUCT


def measure(vmm, vm, length=256):
    address, buffer = vmm.memory(b"\xff" * max(length, 1))
    outcome = vmm.run(vm, abi.KVM_SEV_LAUNCH_MEASURE, MEASURE, uaddr=address, len=length)
    return outcome, buffer


# -- LAUNCH_START ----------------------------------------------------------------------------------


def test_start_gives_a_handle_and_remembers_the_descriptor(vmm):
    vm = vmm.guest()
    outcome = vmm.start(vm, policy=1)
    assert outcome.answer == (0, 0)
    assert outcome["handle"] == 1
    status = vmm.status(vm)
    assert (status["handle"], status["policy"], status["state"]) == (1, 1, 1)
    assert vmm.system.firmware.platform.state == 2


def test_start_of_a_plain_vm_is_enotty(vmm):
    assert vmm.start(vmm.create(0)).answer == (ENOTTY, UNTOUCHED)


@pytest.mark.parametrize("length", [0, 16385])
@pytest.mark.parametrize("blob", ["dh", "session"])
def test_start_with_a_blob_of_a_bad_length_is_einval(vmm, blob, length):
    address, _ = vmm.memory(bytes(16385))
    values = {f"{blob}_uaddr": address, f"{blob}_len": length}
    assert vmm.start(vmm.guest(), **values).answer == (EINVAL, UNTOUCHED)


def test_start_with_an_unreadable_blob_is_efault(vmm):
    assert vmm.start(vmm.guest(), dh_uaddr=4096, dh_len=16).answer == (EFAULT, UNTOUCHED)


def test_start_with_an_unreadable_structure_is_efault(vmm):
    assert vmm.run_at(vmm.guest(), abi.KVM_SEV_LAUNCH_START, 8).answer == (EFAULT, UNTOUCHED)


@pytest.mark.parametrize("fd", [-1, 0, 99])
def test_start_through_a_descriptor_that_is_not_open_is_ebadf(vmm, fd):
    vm = vmm.guest()
    outcome = vmm.run(vm, abi.KVM_SEV_LAUNCH_START, START, sev_fd=fd)
    assert outcome.answer == (EBADF, UNTOUCHED)


def test_start_through_another_files_descriptor_is_ebadf(vmm):
    vm = vmm.guest()
    outcome = vmm.run(vm, abi.KVM_SEV_LAUNCH_START, START, sev_fd=vmm.fd_of(vm))
    assert outcome.errno == EBADF


def test_second_start_is_refused_by_the_firmware_and_the_first_handle_stays(vmm):
    vm = vmm.started()
    assert vmm.start(vm).answer == (EIO, ASID_OWNED)
    assert vmm.status(vm)["handle"] == 1
    assert list(vmm.system.firmware.guests) == [1]


@pytest.mark.parametrize(("vm_type", "policy"), [(SEV, 4), (SEV_ES, 0)])
def test_start_with_a_policy_of_the_other_class_is_an_invalid_asid(vmm, vm_type, policy):
    vm = vmm.guest(vm_type)
    assert vmm.start(vm, policy=policy).answer == (EIO, INVALID_ASID)
    assert vmm.system.firmware.guests == {}


def test_start_whose_structure_cannot_be_written_back_is_undone(vmm):
    vm = vmm.guest()
    read_only = vmm.client.map(bytes(START.pack()))
    assert vmm.run_at(vm, abi.KVM_SEV_LAUNCH_START, read_only).errno == EFAULT
    assert vmm.system.firmware.guests == {}
    assert vmm.status(vm).errno == EBADF


def test_start_after_one_that_was_undone_needs_a_flush_nobody_makes(vmm):
    vm = vmm.guest()
    vmm.run_at(vm, abi.KVM_SEV_LAUNCH_START, vmm.client.map(bytes(START.pack())))
    assert vmm.start(vm).answer == (EIO, DFFLUSH_REQUIRED)


def test_start_with_the_handle_of_another_guest_shares_its_key(vmm):
    address, memory = vmm.memory(b"secret".ljust(4096))
    first = vmm.running(memory=address)
    second = vmm.guest()
    assert vmm.start(second, handle=1).answer == (0, 0)
    layout = abi.KVM_SEV_DBG_STRUCT
    plain, seen = vmm.memory(bytes(4096))
    outcome = vmm.run(
        second, abi.KVM_SEV_DBG_DECRYPT, layout, src_uaddr=address, dst_uaddr=plain, len=16
    )
    assert outcome.answer == (0, 0)
    assert seen[:6] == b"secret" != memory[:6]
    assert vmm.state(first) == 3


@pytest.mark.parametrize(("handle", "policy", "error"), [(9, 0, 16), (1, 2, 7), (1, 1, 7)])
def test_start_that_may_not_share_a_key_is_refused(vmm, handle, policy, error):
    vmm.started()
    assert vmm.start(vmm.guest(), policy=policy, handle=handle).answer == (EIO, error)


def test_start_that_asks_for_a_newer_firmware_is_a_policy_failure(vmm):
    assert vmm.start(vmm.guest(), policy=2 << 16).answer == (EIO, 7)


def test_command_after_the_descriptor_was_closed_is_ebadf(vmm):
    vm = vmm.started()
    del vmm.client.files[vmm.sev_fd]
    assert vmm.status(vm).answer == (EBADF, UNTOUCHED)


# -- LAUNCH_UPDATE_DATA ----------------------------------------------------------------------------


def test_loaded_memory_is_encrypted_in_place(vmm):
    address, memory = vmm.memory(bytes(8192))
    vm = vmm.started()
    assert vmm.load(vm, address + 32, 4096).answer == (0, 0)
    assert memory[:32] == bytes(32)
    assert memory[32:4128] != bytes(4096)
    assert memory[4128:] == bytes(4064)
    assert vmm.state(vm) == 1


def test_load_of_a_plain_vm_is_enotty(vmm):
    assert vmm.load(vmm.create(0), 0, 16).errno == ENOTTY


@pytest.mark.parametrize(("address", "length"), [(0x1000, 0), (2**64 - 16, 32)])
def test_load_of_nothing_or_past_the_end_of_memory_is_einval(vmm, address, length):
    assert vmm.load(vmm.started(), address, length).answer == (EINVAL, UNTOUCHED)


def test_load_of_unmapped_memory_is_enomem(vmm):
    address, memory = vmm.memory(bytes(4096))
    assert vmm.load(vmm.started(), address, 8192).answer == (ENOMEM, UNTOUCHED)
    assert memory == bytes(4096)


def test_load_of_read_only_memory_is_enomem(vmm):
    assert vmm.load(vmm.started(), vmm.client.map(bytes(4096)), 4096).errno == ENOMEM


def test_load_over_the_memlock_limit_is_enomem_without_the_capability(vmm):
    address, _ = vmm.memory(bytes(8192))
    vm = vmm.started()
    vmm.client.memlock_bytes = 8191
    assert vmm.load(vm, address, 8192).errno == ENOMEM
    assert vmm.load(vm, address, 4096).errno == 0
    vmm.client.memlock_bytes = None
    assert vmm.load(vm, address, 8192).errno == 0


def test_load_before_the_start_is_ebadf(vmm):
    address, _ = vmm.memory(bytes(4096))
    assert vmm.load(vmm.guest(), address, 4096).answer == (EBADF, UNTOUCHED)


def test_load_before_the_start_meets_the_firmware_when_descriptor_0_is_the_device(vmm):
    address, _ = vmm.memory(bytes(4096))
    vmm.client.files[0] = vmm.client.files[vmm.sev_fd]
    assert vmm.load(vmm.guest(), address, 4096).answer == (EIO, 16)


@pytest.mark.parametrize(("offset", "length", "error"), [(8, 16, ADDRESS), (0, 8, INVALID_LENGTH)])
def test_load_of_what_is_not_whole_blocks_is_refused(vmm, offset, length, error):
    address, _ = vmm.memory(bytes(4096))
    assert vmm.load(vmm.started(), address + offset, length).answer == (EIO, error)


def test_load_after_the_measurement_is_a_wrong_state(vmm):
    vm = vmm.started()
    measure(vmm, vm)
    address, _ = vmm.memory(bytes(4096))
    assert vmm.load(vm, address, 4096).answer == (EIO, INVALID_STATE)


# -- LAUNCH_UPDATE_VMSA ----------------------------------------------------------------------------


def update_vmsa(vmm, vm):
    return vmm.run(vm, abi.KVM_SEV_LAUNCH_UPDATE_VMSA)


@pytest.mark.parametrize("vm_type", [0, SEV])
def test_vmsa_of_a_guest_without_es_is_enotty(vmm, vm_type):
    assert update_vmsa(vmm, vmm.guest(vm_type)).errno == ENOTTY


def test_vmsa_protects_every_vcpu(vmm):
    vm = vmm.started(SEV_ES, vcpus=2)
    assert update_vmsa(vmm, vm).answer == (0, 0)
    assert [vcpu.state_protected for vcpu in vm.vcpus.values()] == [True, True]


def test_vmsa_twice_is_einval(vmm):
    vm = vmm.started(SEV_ES, vcpus=1)
    update_vmsa(vmm, vm)
    assert update_vmsa(vmm, vm).answer == (EINVAL, UNTOUCHED)


def test_vmsa_of_a_debugged_vcpu_is_einval(vmm):
    vm = vmm.started(SEV_ES, vcpus=1)
    vm.vcpus[0].ioctl(0x4048AE9B, bytes([1, 0, 0, 0]) + bytes(68))
    assert update_vmsa(vmm, vm).answer == (EINVAL, UNTOUCHED)


def test_vmsa_of_a_vcpu_with_breakpoints_is_einval_and_earlier_ones_stay_protected(vmm):
    vm = vmm.started(SEV_ES, vcpus=2)
    registers = bytearray(128)
    registers[40:48] = (0x401).to_bytes(8, "little")
    vm.vcpus[1].ioctl(0x4080AEA2, registers)
    assert update_vmsa(vmm, vm).errno == EINVAL
    assert [vcpu.state_protected for vcpu in vm.vcpus.values()] == [True, False]


def test_vmsa_after_the_measurement_is_a_wrong_state(vmm):
    vm = vmm.started(SEV_ES, vcpus=1)
    measure(vmm, vm)
    assert update_vmsa(vmm, vm).answer == (EIO, INVALID_STATE)


# -- LAUNCH_MEASURE --------------------------------------------------------------------------------


def test_length_query_is_eio_with_status_4_and_the_length(vmm):
    vm = vmm.started()
    outcome = vmm.run(vm, abi.KVM_SEV_LAUNCH_MEASURE, MEASURE)
    assert outcome.answer == (EIO, INVALID_LENGTH)
    assert outcome["len"] == 48
    assert vmm.state(vm) == 1


def test_measurement_fills_the_buffer_and_tells_its_length(vmm):
    vm = vmm.started()
    outcome, buffer = measure(vmm, vm, 256)
    assert outcome.answer == (0, 0)
    assert outcome["len"] == 48
    assert buffer[48:] == bytes(208)
    assert vmm.state(vm) == 2


def test_measurement_into_a_short_buffer_fails_without_a_length(vmm):
    outcome, buffer = measure(vmm, vmm.started(), 47)
    assert outcome.answer == (EIO, INVALID_LENGTH)
    assert outcome["len"] == 47
    assert buffer == b"\xff" * 47


def test_measurement_into_a_huge_buffer_is_einval(vmm):
    outcome, _ = measure(vmm, vmm.started(), 16385)
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_measurement_of_a_plain_vm_is_enotty(vmm):
    outcome, _ = measure(vmm, vmm.create(0))
    assert outcome.errno == ENOTTY


def test_second_measurement_is_a_wrong_state(vmm):
    vm = vmm.started()
    measure(vmm, vm)
    outcome, _ = measure(vmm, vm)
    assert outcome.answer == (EIO, INVALID_STATE)


def test_measurement_covers_the_loaded_bytes_the_policy_and_a_nonce(vmm):
    first, _ = vmm.memory(b"a" * 4096)
    second, _ = vmm.memory(b"b" * 4096)
    vm = vmm.started(policy=1)
    vmm.load(vm, first, 4096)
    vmm.load(vm, second, 32)
    _, blob = measure(vmm, vm, 48)
    keys = transport.owner_keys(b"", b"")
    loaded = hashlib.sha256(b"a" * 4096 + b"b" * 32).digest()
    covered = b"\x04" + bytes((1, 55, 21)) + bytes((1, 0, 0, 0)) + loaded + blob[32:]
    assert blob[:32] == hmac.digest(keys.tik, covered, "sha256")


@pytest.mark.parametrize(
    "change",
    [
        lambda vcpu: setattr(vcpu, "rip", 0x1000),
        lambda vcpu: sregs.of(vcpu).put("cr3", 0x1000),
        lambda vcpu: sregs.of(vcpu).put("cs.l", 1),
    ],
)
def test_measurement_depends_on_the_registers_of_an_es_guest(vmm, change):
    digests = []
    for act in (lambda vcpu: None, change):
        vm = vmm.started(SEV_ES, vcpus=1)
        act(vm.vcpus[0])
        update_vmsa(vmm, vm)
        digests.append(vmm.system.firmware.guests[vmm.status(vm)["handle"]].digest.digest())
    assert digests[0] != digests[1]


def test_measurement_is_keyed_by_what_the_owner_gave(vmm):
    session, _ = vmm.memory(b"session")
    vm = vmm.guest()
    vmm.start(vm, session_uaddr=session, session_len=7)
    _, blob = measure(vmm, vm, 48)
    keys = transport.owner_keys(b"", b"session")
    covered = b"\x04" + bytes((1, 55, 21)) + bytes(4) + hashlib.sha256().digest() + blob[32:]
    assert blob[:32] == keys.code(covered)


# -- LAUNCH_SECRET ---------------------------------------------------------------------------------


def secret(vmm, vm, target, size, header, data):
    return vmm.run(
        vm,
        abi.KVM_SEV_LAUNCH_SECRET,
        SECRET,
        hdr_uaddr=vmm.memory(header)[0],
        hdr_len=len(header),
        guest_uaddr=target,
        guest_len=size,
        trans_uaddr=vmm.memory(data)[0],
        trans_len=len(data),
    )


def sealed(measurement):
    plain = b"password".ljust(16)
    keys = transport.owner_keys(b"", b"")
    return transport.seal(keys, transport.SECRET_TAG, bytes(16), plain, measurement)


def test_secret_arrives_encrypted_for_the_guest(vmm):
    vm = vmm.started()
    _, blob = measure(vmm, vm)
    target, memory = vmm.memory(bytes(4096))
    assert secret(vmm, vm, target + 64, 16, *sealed(bytes(blob[:32]))).answer == (0, 0)
    key = vmm.system.firmware.guests[1].memory_key
    assert key.apply(64, bytes(memory[64:80])) == b"password".ljust(16)
    assert vmm.state(vm) == 2


def test_secret_for_another_measurement_is_refused(vmm):
    vm = vmm.started()
    measure(vmm, vm)
    target, memory = vmm.memory(bytes(4096))
    assert secret(vmm, vm, target, 16, *sealed(bytes(32))).answer == (EIO, 11)
    assert memory == bytes(4096)


def test_secret_before_the_measurement_is_a_wrong_state(vmm):
    target, _ = vmm.memory(bytes(4096))
    outcome = secret(vmm, vmm.started(), target, 16, *sealed(bytes(32)))
    assert outcome.answer == (EIO, INVALID_STATE)


def test_secret_across_pages_is_einval(vmm):
    target, _ = vmm.memory(bytes(8192))
    outcome = secret(vmm, vmm.started(), target + 4088, 16, *sealed(bytes(32)))
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_secret_without_a_header_is_einval(vmm):
    target, _ = vmm.memory(bytes(4096))
    outcome = secret(vmm, vmm.started(), target, 16, b"", bytes(16))
    assert outcome.answer == (EINVAL, UNTOUCHED)


def test_secret_with_a_header_of_another_size_is_refused(vmm):
    vm = vmm.started()
    measure(vmm, vm)
    target, _ = vmm.memory(bytes(4096))
    assert secret(vmm, vm, target, 16, bytes(51), bytes(16)).answer == (EIO, INVALID_LENGTH)


def test_secret_of_a_plain_vm_is_enotty(vmm):
    assert secret(vmm, vmm.create(0), 0, 0, b"x", b"x").errno == ENOTTY


# -- LAUNCH_FINISH ---------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [False, True])
def test_finish_makes_the_guest_runnable(vmm, measured):
    vm = vmm.started()
    if measured:
        measure(vmm, vm)
    assert vmm.run(vm, abi.KVM_SEV_LAUNCH_FINISH).answer == (0, 0)
    assert vmm.state(vm) == 3


def test_finish_twice_is_a_wrong_state(vmm):
    vm = vmm.running()
    assert vmm.run(vm, abi.KVM_SEV_LAUNCH_FINISH).answer == (EIO, INVALID_STATE)


def test_finish_of_a_plain_vm_is_enotty(vmm):
    assert vmm.run(vmm.create(0), abi.KVM_SEV_LAUNCH_FINISH).answer == (ENOTTY, UNTOUCHED)


# -- the end ---------------------------------------------------------------------------------------


def test_destruction_forgets_the_guest_and_frees_what_it_held(vmm, accounting):
    vm = vmm.running()
    assert len(vmm.system.firmware.guests) == 1
    vm.close()
    assert vmm.system.firmware.guests == {}
    assert vmm.system.firmware.platform.state == 1
    assert accounting.charged == {"sev": 0}


def test_asid_of_a_guest_that_ran_is_flushed_before_it_runs_another(vmm):
    asids = []
    for _ in range(6):
        vm = vmm.running()
        asids.append(vm.key.asid)
        vm.close()
    assert asids == [5, 6, 7, 8, 9, 5]
    assert vmm.system.firmware.bindings.flushes == 1


class ElsewhereKeys(Keys):
    """The allocator is in another process: it hands out an ASID again without telling why."""

    ALLOCATES = False

    def take_asid(self, pid, *, es):
        self.asids = AsidPool(5, 9)
        return super().take_asid(pid, es=es)

    def free_asid(self, key):
        pass


def test_asid_that_was_flushed_elsewhere_runs_another_guest(vmm):
    vmm.system.keys = ElsewhereKeys(vmm.system.machine)
    for _ in range(3):
        vm = vmm.running()
        assert vm.key.asid == 5
        vm.close()
