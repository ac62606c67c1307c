from errno import EEXIST, EFAULT, EINVAL, EIO, ENOTTY

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_ENABLE_CAP
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304
TRAP = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\n'
FAULT = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
NONE = 'vendor = "intel"\n'


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def outcome(vm, data):
    """(errno or 0, whether detection is on) after KVM_ENABLE_CAP."""
    try:
        result = vm.ioctl(ioctls.KVM_ENABLE_CAP, data)
    except KvmError as error:
        result = error.errno
    return result, vm.bus_lock_detection


@pytest.mark.parametrize(
    ("flags", "arg0", "capable", "incapable"),
    [
        (0, 0, (0, False), (0, False)),
        (0, 1, (0, False), (0, False)),
        (0, 2, (0, True), (0, False)),
        (0, 3, (EINVAL, False), (EINVAL, False)),
        (0, 4, (EINVAL, False), (EINVAL, False)),
        (0, 6, (EINVAL, False), (EINVAL, False)),
        (0, 1 << 32, (EINVAL, False), (EINVAL, False)),
        (0, 1 << 32 | 2, (EINVAL, False), (EINVAL, False)),
        (0, 1 << 63, (EINVAL, False), (EINVAL, False)),
        (1, 0, (EINVAL, False), (EINVAL, False)),
        (1, 2, (EINVAL, False), (EINVAL, False)),
        (1 << 31, 2, (EINVAL, False), (EINVAL, False)),
    ],
)
def test_t_a_1_enable_cap_answers_as_the_table_says(kvm, flags, arg0, capable, incapable):
    data = KVM_ENABLE_CAP.pack(cap=193, flags=flags, args=arg0)
    assert outcome(kvm(TRAP).create_vm(0, PID), data) == capable
    assert outcome(kvm(FAULT).create_vm(0, PID), data) == capable
    assert outcome(kvm(NONE).create_vm(0, PID), data) == incapable


def test_t_a_1_other_arguments_and_padding_are_not_looked_at(kvm):
    data = KVM_ENABLE_CAP.pack(cap=193, args=2, pad=5)
    KVM_ENABLE_CAP.put(data, "args", 77, index=1)
    assert outcome(kvm(TRAP).create_vm(0, PID), data) == (0, True)


def test_t_a_1_accepted_after_a_vcpu_exists(kvm):
    vm = kvm(TRAP).create_vm(0, PID)
    vm.create_vcpu(0)
    assert outcome(vm, KVM_ENABLE_CAP.pack(cap=193, args=2)) == (0, True)


def test_t_a_1_unreadable_structure_is_efault_before_any_value(kvm):
    assert outcome(kvm(TRAP).create_vm(0, PID), 0) == (EFAULT, False)


def test_t_a_1_system_and_vcpu_descriptors_refuse_it(kvm):
    system = kvm(TRAP)
    data = KVM_ENABLE_CAP.pack(cap=193, args=2)
    vcpu = system.create_vm(0, PID).create_vcpu(0)
    assert errno_of(system.ioctl, ioctls.KVM_ENABLE_CAP, data) == EINVAL
    assert errno_of(vcpu.ioctl, ioctls.KVM_ENABLE_CAP, data) == EINVAL


@pytest.mark.parametrize(("toml", "value"), [(TRAP, 3), (FAULT, 3), (NONE, 0)])
def test_t_a_1_check_extension_is_3_only_with_the_mechanism(kvm, toml, value):
    system = kvm(toml)
    vm = system.create_vm(0, PID)
    assert system.ioctl(ioctls.KVM_CHECK_EXTENSION, 193) == value
    assert vm.ioctl(ioctls.KVM_CHECK_EXTENSION, 193) == value
    assert errno_of(vm.create_vcpu(0).ioctl, ioctls.KVM_CHECK_EXTENSION, 193) == EINVAL


def test_unknown_capability_is_einval(kvm):
    assert errno_of(kvm().create_vm(0, PID).enable_cap, KvmEnableCap(9999)) == EINVAL


def test_limit_of_vcpu_ids_is_set_once(kvm):
    vm = kvm().create_vm(0, PID)
    assert errno_of(vm.enable_cap, KvmEnableCap(128, (4097,))) == EINVAL
    assert vm.enable_cap(KvmEnableCap(128, (8,))) == 0
    assert vm.enable_cap(KvmEnableCap(128, (8,))) == 0
    assert errno_of(vm.enable_cap, KvmEnableCap(128, (9,))) == EINVAL
    assert errno_of(vm.create_vcpu, 8) == EINVAL
    assert vm.create_vcpu(7).id == 7


def test_first_vcpu_fixes_the_limit_of_ids(kvm):
    vm = kvm().create_vm(0, PID)
    vm.create_vcpu(0)
    assert errno_of(vm.enable_cap, KvmEnableCap(128, (8,))) == EINVAL


@pytest.mark.parametrize(
    ("vcpu_id", "errno"), [(0, EEXIST), (4096, EINVAL), (1 << 32, EINVAL), (-1, EINVAL)]
)
def test_create_vcpu_refuses_duplicates_and_ids_too_high(kvm, vcpu_id, errno):
    vm = kvm().create_vm(0, PID)
    vm.create_vcpu(0)
    assert errno_of(vm.create_vcpu, vcpu_id) == errno


def test_vcpu_number_1025_is_refused(kvm):
    vm = kvm().create_vm(0, PID)
    for vcpu_id in range(1024):
        vm.create_vcpu(vcpu_id)
    assert errno_of(vm.create_vcpu, 1024) == EINVAL


def test_irqchip_is_made_once_and_before_vcpus(kvm):
    vm = kvm().create_vm(0, PID)
    assert vm.ioctl(ioctls.KVM_CREATE_IRQCHIP) == 0
    assert errno_of(vm.ioctl, ioctls.KVM_CREATE_IRQCHIP) == EEXIST
    late = kvm().create_vm(0, PID)
    late.create_vcpu(0)
    assert errno_of(late.ioctl, ioctls.KVM_CREATE_IRQCHIP) == EINVAL


def test_split_irqchip_is_refused_too_late_or_with_too_many_routes(kvm):
    vm = kvm().create_vm(0, PID)
    assert errno_of(vm.enable_cap, KvmEnableCap(121, (4097,))) == EINVAL
    assert vm.enable_cap(KvmEnableCap(121, (24,))) == 0
    assert errno_of(vm.enable_cap, KvmEnableCap(121, (24,))) == EEXIST
    late = kvm().create_vm(0, PID)
    late.create_vcpu(0)
    assert errno_of(late.enable_cap, KvmEnableCap(121, (24,))) == EEXIST


@pytest.mark.parametrize("request_number", [0xAEFF, 0x5300, ioctls.KVM_GET_API_VERSION])
def test_unknown_request_is_enotty(kvm, request_number):
    assert errno_of(kvm().create_vm(0, PID).ioctl, request_number) == ENOTTY


def test_other_address_space_is_eio_before_anything_else(kvm):
    vm = kvm().create_vm(0, PID)
    vcpu = vm.create_vcpu(0)
    child = LocalClient(PID + 1)
    assert errno_of(vm.ioctl, 0xAEFF, 0, child) == EIO
    assert errno_of(vcpu.ioctl, 0x5300, 0, child) == EIO


def test_dead_vm_is_eio_on_vm_and_vcpu(kvm):
    vm = kvm().create_vm(0, PID)
    vcpu = vm.create_vcpu(0)
    vm.dead = True
    assert errno_of(vm.ioctl, ioctls.KVM_CHECK_EXTENSION, 193) == EIO
    assert errno_of(vm.create_vcpu, 1) == EIO
    assert errno_of(vcpu.ioctl, ioctls.KVM_GET_REGS, bytearray(144)) == EIO
    assert vm.statistics().state == "dead"


def test_vcpu_outlives_the_vm_descriptor(kvm):
    system = kvm()
    vm = system.create_vm(0, PID)
    vcpu = vm.create_vcpu(0)
    vm.release()
    assert vcpu.ioctl(ioctls.KVM_GET_REGS, bytearray(144)) == 0
    assert vm in system.vms
    vcpu.release()
    assert vm not in system.vms
    assert vm.statistics().state == "destroyed"


def test_closing_twice_is_closing_once(kvm):
    system = kvm()
    vm = system.create_vm(0, PID)
    vm.create_vcpu(0)
    vm.close(0)
    vm.close(0)
    assert system.statistics().vms == 0


def test_tsc_frequency_is_the_hosts(kvm):
    vm = kvm('vendor = "intel"\ntsc-khz = 2100000\n').create_vm(0, PID)
    assert vm.ioctl(ioctls.KVM_GET_TSC_KHZ) == 2_100_000
    assert vm.create_vcpu(0).ioctl(ioctls.KVM_GET_TSC_KHZ) == 2_100_000
