from errno import E2BIG, EBUSY, EFAULT, EINVAL, EIO, ENOSPC, ENOTTY, EPERM

import pytest

from kvmsim.abi.ioctls import KVM_MEMORY_ENCRYPT_OP
from kvmsim.abi.sev import KVM_SEV_CMD, KVM_SEV_INIT_STRUCT, KVM_TDX_CMD
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.sev import SevCmd

PID = 4194304
INIT, ES_INIT, INIT2 = 0, 1, 22
SEV, SEV_ES, SNP, TDX = 2, 3, 4, 5
NO_SEV = 'vendor = "amd"\n'
INTEL = 'vendor = "intel"\n'
TDX_HOST = 'vendor = "intel"\n[tdx]\nkeys = 2\n'


def host(ecx, edx, more=""):
    return f'vendor = "amd"\n[sev]\nmax-asid = {ecx}\nmin-sev-asid = {edx}\n{more}'


def init2(**values):
    return SevCmd(INIT2, KVM_SEV_INIT_STRUCT.pack(**values))


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def start(system, vm_type):
    vm = system.create_vm(vm_type, PID)
    vm.encrypt()
    return vm


def asids(system, vm_type, count):
    return [start(system, vm_type).key.asid for _ in range(count)]


def test_t_d_1_es_guests_wrap_after_a_flush(kvm):
    system = kvm(host(6, 6))
    first, second = start(system, SEV_ES), start(system, SEV_ES)
    assert (first.key.asid, second.key.asid) == (1, 2)
    first.close()
    assert asids(system, SEV_ES, 3) == [3, 4, 5]
    assert asids(system, SEV_ES, 1) == [1]
    assert system.statistics().asids.flushes == 1


def test_t_d_4_failed_flush_is_ebusy_and_the_charge_returns(kvm, accounting):
    system = kvm(host(1, 1) + "[faults]\ndf-flush = true\n")
    start(system, SEV).close()
    assert errno_of(system.create_vm(SEV, PID).encrypt) == EBUSY
    assert accounting.charged == {"sev": 0}


def test_t_d_3_empty_range_is_enotty_although_the_type_is_advertised(kvm, accounting):
    system = kvm(host(4, 5))
    assert system.check_extension(235) & 1 << SEV
    vm = system.create_vm(0, PID)
    assert errno_of(vm.memory_encrypt_op, SevCmd(INIT)) == ENOTTY
    assert accounting.charged == {}


def test_refused_charge_takes_no_asid_and_names_its_cause(kvm, accounting):
    system = kvm(host(4, 3))
    accounting.limit = 0
    vm = system.create_vm(SEV, PID)
    with pytest.raises(KvmError) as error:
        vm.encrypt()
    assert error.value.errno == EBUSY
    assert str(error.value.__cause__) == "at the limit"
    assert (vm.key, vm.needs_init) == (None, True)
    accounting.limit = 9
    vm.encrypt()
    assert vm.key.asid == 3


@pytest.mark.parametrize(("vm_type", "kind"), [(SEV, "sev"), (SEV_ES, "sev_es"), (SNP, "sev_es")])
def test_guest_is_charged_as_its_class(kvm, accounting, vm_type, kind):
    vm = start(kvm(host(9, 5, "snp = true\n")), vm_type)
    assert accounting.charged == {kind: 1}
    assert vm.statistics().kind == kind
    vm.close()
    assert accounting.charged == {kind: 0}


def test_charge_follows_the_calling_thread(kvm, accounting):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    other_thread = LocalClient(PID + 7)
    other_thread.mm = vm.creator.mm
    vm.memory_encrypt_op(init2(), other_thread)
    assert accounting.charged_pids == [PID + 7]


@pytest.mark.parametrize(("command", "kind"), [(INIT, "sev"), (ES_INIT, "sev_es")])
def test_old_commands_initialise_a_default_vm(kvm, accounting, command, kind):
    vm = kvm(host(9, 5)).create_vm(0, PID)
    assert vm.statistics().state == "plain"
    assert vm.memory_encrypt_op(SevCmd(command)) == 0
    assert accounting.charged == {kind: 1}
    assert (vm.statistics().state, vm.ghcb_version) == ("active", command)
    assert errno_of(vm.memory_encrypt_op, SevCmd(command)) == EINVAL


@pytest.mark.parametrize("vm_type", [SEV, SEV_ES])
def test_old_commands_refuse_the_new_types(kvm, vm_type):
    vm = kvm(host(9, 5)).create_vm(vm_type, PID)
    assert errno_of(vm.memory_encrypt_op, SevCmd(INIT)) == EINVAL


def test_es_init_without_sev_es_is_enotty_before_anything_else(kvm):
    vm = kvm(host(9, 1)).create_vm(0, PID)
    vm.create_vcpu(0)
    assert errno_of(vm.memory_encrypt_op, SevCmd(ES_INIT)) == ENOTTY


def test_init2_refuses_a_default_vm_and_a_second_call(kvm):
    system = kvm(host(9, 5))
    assert errno_of(system.create_vm(0, PID).memory_encrypt_op, init2()) == EINVAL
    vm = start(system, SEV)
    assert errno_of(vm.memory_encrypt_op, init2()) == EINVAL


def test_vcpu_before_init2_loses_it_for_good(kvm):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    vm.create_vcpu(0)
    assert errno_of(vm.memory_encrypt_op, init2()) == EINVAL


def test_encrypted_vm_does_not_run_before_init2(kvm):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    vcpu = vm.create_vcpu(0)
    vcpu.run.flags = 7
    assert errno_of(vcpu.kvm_run, 0) == EINVAL
    assert (vcpu.run.flags, vm.statistics().state) == (0, "waiting")


@pytest.mark.parametrize("bit", range(32))
def test_init2_refuses_every_flag(kvm, bit):
    vm = kvm(host(9, 5)).create_vm(SEV_ES, PID)
    assert errno_of(vm.memory_encrypt_op, init2(flags=1 << bit)) == EINVAL


@pytest.mark.parametrize("bit", range(64))
def test_init2_of_a_sev_guest_refuses_every_vmsa_feature(kvm, bit):
    vm = kvm(host(9, 5, "debug-swap = true\n")).create_vm(SEV, PID)
    assert errno_of(vm.memory_encrypt_op, init2(vmsa_features=1 << bit)) == EINVAL


@pytest.mark.parametrize("bit", range(64))
def test_init2_of_an_es_guest_takes_debug_swap_only(kvm, bit):
    vm = kvm(host(9, 5, "debug-swap = true\n")).create_vm(SEV_ES, PID)
    try:
        vm.memory_encrypt_op(init2(vmsa_features=1 << bit))
    except KvmError as error:
        assert error.errno == EINVAL
    assert vm.sev_active == (bit == 5)


@pytest.mark.parametrize(
    ("vm_type", "asked", "got"),
    [
        (SEV, 0, 0),
        (SEV, 1, None),
        (SEV_ES, 0, 2),
        (SEV_ES, 1, 1),
        (SEV_ES, 2, 2),
        (SEV_ES, 3, None),
    ],
)
def test_init2_negotiates_the_ghcb_version(kvm, vm_type, asked, got):
    vm = kvm(host(9, 5)).create_vm(vm_type, PID)
    try:
        vm.memory_encrypt_op(init2(ghcb_version=asked))
    except KvmError as error:
        assert error.errno == EINVAL
    assert vm.sev_active == (got is not None)
    assert vm.ghcb_version == (got or 0)


def test_snp_guest_refuses_older_commands_with_eperm(kvm):
    vm = start(kvm(host(9, 5, "snp = true\n")), SNP)
    assert errno_of(vm.memory_encrypt_op, init2()) == EPERM


@pytest.mark.parametrize("toml", [NO_SEV, INTEL, host(0, 1)])
def test_host_without_sev_is_enotty_even_for_a_null_argument(kvm, toml):
    vm = kvm(toml).create_vm(0, PID)
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, 0) == ENOTTY
    assert errno_of(vm.memory_encrypt_op, SevCmd(INIT)) == ENOTTY


def test_null_argument_is_a_probe_that_succeeds(kvm):
    assert kvm(host(9, 5)).create_vm(0, PID).ioctl(KVM_MEMORY_ENCRYPT_OP, 0) == 0


def test_unreadable_command_is_efault(kvm):
    vm = kvm(host(9, 5)).create_vm(0, PID)
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, 0x1000) == EFAULT


def test_error_field_is_copied_back_after_a_command(kvm):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    client = vm.creator
    data = client.map(KVM_SEV_INIT_STRUCT.pack())
    cmd = KVM_SEV_CMD.pack(id=INIT2, data=data, error=77)
    assert vm.ioctl(KVM_MEMORY_ENCRYPT_OP, client.map(cmd)) == 0
    assert KVM_SEV_CMD.get(cmd, "error") == 0


def test_unknown_command_is_einval_and_not_copied_back(kvm):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    cmd = KVM_SEV_CMD.pack(id=103, error=77)
    # Read-only memory: copying back would fault.
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, bytes(cmd)) == EINVAL


def test_failed_command_is_copied_back(kvm):
    vm = kvm(host(9, 5)).create_vm(0, PID)
    cmd = KVM_SEV_CMD.pack(id=INIT2)
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, cmd) == EINVAL
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, bytes(cmd)) == EFAULT


def test_init2_data_behind_a_bad_pointer_is_efault(kvm):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    cmd = KVM_SEV_CMD.pack(id=INIT2, data=0x1000)
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, cmd) == EFAULT


def test_vm_with_vcpus_keeps_its_asid_until_the_last_descriptor_is_closed(kvm, accounting):
    vm = start(kvm(host(9, 5)), SEV)
    vcpu = vm.create_vcpu(0)
    vm.release()
    assert accounting.charged == {"sev": 1}
    vcpu.release()
    assert accounting.charged == {"sev": 0}


def test_command_on_a_destroyed_vm_is_eio(kvm):
    vm = kvm(host(9, 5)).create_vm(SEV, PID)
    vm.close()
    assert errno_of(vm.memory_encrypt_op, init2()) == EIO


def test_encrypt_of_a_default_vm_does_nothing(kvm, accounting):
    start(kvm(host(9, 5)), 0)
    assert accounting.charged == {}


def test_trust_domain_takes_a_key_and_gives_it_back(kvm, accounting):
    system = kvm(TDX_HOST)
    first = start(system, TDX)
    assert (first.key.asid, accounting.charged) == (1, {"tdx": 1})
    assert system.statistics().tdx_free == 1
    first.close()
    assert (accounting.charged, system.statistics().tdx_free) == ({"tdx": 0}, 2)


def test_trust_domain_without_a_key_left_is_enospc_and_charges_nothing(kvm, accounting):
    system = kvm(TDX_HOST)
    start(system, TDX)
    start(system, TDX)
    assert errno_of(system.create_vm(TDX, PID).encrypt) == ENOSPC
    assert accounting.charged == {"tdx": 2}


def test_trust_domain_over_its_limit_keeps_the_key_free(kvm, accounting):
    system = kvm(TDX_HOST)
    accounting.limit = 0
    assert errno_of(system.create_vm(TDX, PID).encrypt) == EBUSY
    assert system.statistics().tdx_free == 2


def test_trust_domain_has_vcpus_after_its_init_only(kvm):
    vm = kvm(TDX_HOST).create_vm(TDX, PID)
    assert errno_of(vm.create_vcpu, 0) == EIO
    vm.encrypt()
    assert vm.create_vcpu(0).id == 0


def test_trust_domain_command_through_the_ioctl(kvm):
    vm = kvm(TDX_HOST).create_vm(TDX, PID)
    client = vm.creator
    data = bytearray(264)
    cmd = KVM_TDX_CMD.pack(id=1, data=client.map(data))
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, KVM_TDX_CMD.pack(id=9)) == EINVAL
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, KVM_TDX_CMD.pack(id=1, flags=1)) == EINVAL
    data[256:258] = b"\1\1"
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, cmd) == E2BIG
    data[256:258] = b"\0\0"
    assert vm.ioctl(KVM_MEMORY_ENCRYPT_OP, cmd) == 0
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, cmd) == EINVAL


def test_default_vm_of_a_tdx_host_has_no_commands(kvm):
    vm = kvm(TDX_HOST).create_vm(0, PID)
    assert errno_of(vm.ioctl, KVM_MEMORY_ENCRYPT_OP, KVM_TDX_CMD.pack(id=1)) == ENOTTY
    assert errno_of(vm.memory_encrypt_op, SevCmd(1)) == ENOTTY
