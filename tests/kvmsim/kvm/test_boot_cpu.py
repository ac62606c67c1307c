from errno import EBUSY, EINVAL

import pytest

from kvmsim.abi import caps
from kvmsim.abi.ioctls import KVM_SET_BOOT_CPU_ID
from kvmsim.errors import KvmError
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304


@pytest.fixture
def vm(kvm):
    return kvm('vendor = "amd"\n').create_vm(0, PID)


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def limit_ids(vm, limit):
    return vm.enable_cap(KvmEnableCap(caps.KVM_CAP_MAX_VCPU_ID, (limit,)))


def test_boot_cpu_is_chosen_before_there_are_vcpus(vm):
    assert vm.ioctl(KVM_SET_BOOT_CPU_ID, 1) == 0
    vm.create_vcpu(0)
    assert errno_of(vm.ioctl, KVM_SET_BOOT_CPU_ID, 0) == EBUSY


@pytest.mark.parametrize("number", [4097, 1 << 32, (1 << 64) - 1])
def test_boot_cpu_beyond_all_ids_is_refused(vm, number):
    assert vm.ioctl(KVM_SET_BOOT_CPU_ID, 4096) == 0
    assert errno_of(vm.ioctl, KVM_SET_BOOT_CPU_ID, number) == EINVAL


def test_boot_cpu_beyond_the_vms_own_limit_is_refused(vm):
    limit_ids(vm, 2)
    assert vm.ioctl(KVM_SET_BOOT_CPU_ID, 2) == 0
    assert errno_of(vm.ioctl, KVM_SET_BOOT_CPU_ID, 3) == EINVAL


def test_limit_that_leaves_the_boot_cpu_no_id_is_refused(vm):
    vm.ioctl(KVM_SET_BOOT_CPU_ID, 10)
    assert errno_of(limit_ids, vm, 9) == EINVAL
    assert limit_ids(vm, 10) == 0
