from errno import E2BIG, EFAULT, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2, KVM_REGS
from kvmsim.errors import KvmError

PID = 4194304


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def table(*functions, nent=None):
    data = bytearray(8)
    KVM_CPUID2.put(data, "nent", len(functions) if nent is None else nent)
    for function in functions:
        data += function.to_bytes(4, "little") + bytes(36)
    return data


@pytest.fixture
def vcpu(kvm):
    return kvm().create_vm(0, PID).create_vcpu(0)


def test_registers_after_reset(vcpu):
    data = bytearray(144)
    assert vcpu.ioctl(ioctls.KVM_GET_REGS, data) == 0
    got = {name: KVM_REGS.get(data, name) for name in ("rip", "rflags", "rdx", "rax")}
    assert got == {"rip": 0xFFF0, "rflags": 2, "rdx": 0x600, "rax": 0}


def test_registers_set_are_read_back_with_the_fixed_flag(vcpu):
    vcpu.ioctl(ioctls.KVM_SET_REGS, KVM_REGS.pack(rax=7, rip=0x1000, rflags=0x200))
    data = bytearray(144)
    vcpu.ioctl(ioctls.KVM_GET_REGS, data)
    assert data == KVM_REGS.pack(rax=7, rip=0x1000, rflags=0x202)


@pytest.mark.parametrize(
    "request_number", [ioctls.KVM_GET_REGS, ioctls.KVM_SET_REGS, ioctls.KVM_SET_CPUID2]
)
def test_null_pointer_is_efault(vcpu, request_number):
    assert errno_of(vcpu.ioctl, request_number, 0) == EFAULT


def test_mp_state_without_in_kernel_apic_is_runnable_only(vcpu):
    assert vcpu.ioctl(ioctls.KVM_SET_MP_STATE, bytearray(4)) == 0
    assert errno_of(vcpu.ioctl, ioctls.KVM_SET_MP_STATE, bytearray([3, 0, 0, 0])) == EINVAL
    assert errno_of(vcpu.ioctl, ioctls.KVM_SET_MP_STATE, bytearray([99, 0, 0, 0])) == EINVAL


def test_mp_state_with_in_kernel_apic_is_kept(kvm):
    vm = kvm().create_vm(0, PID)
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    vcpu.ioctl(ioctls.KVM_SET_MP_STATE, bytearray([3, 0, 0, 0]))
    data = bytearray(4)
    vcpu.ioctl(ioctls.KVM_GET_MP_STATE, data)
    assert data[0] == 3


@pytest.mark.parametrize("request_number", [0xAEFF, 0x5300, ioctls.KVM_CREATE_VCPU])
def test_unknown_request_is_einval(vcpu, request_number):
    assert errno_of(vcpu.ioctl, request_number) == EINVAL


def test_cpuid_can_be_changed_before_the_first_run_only(vcpu):
    assert vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(0)) == 0
    assert vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(0, 1)) == 0
    vcpu.kvm_run(0)
    vcpu.resume(0)
    assert vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(0, 1)) == 0
    assert errno_of(vcpu.ioctl, ioctls.KVM_SET_CPUID2, table(0)) == EINVAL


def test_cpuid_of_257_entries_is_e2big(vcpu):
    assert errno_of(vcpu.ioctl, ioctls.KVM_SET_CPUID2, table(nent=257)) == E2BIG


def test_cpuid_shorter_than_it_says_is_efault(vcpu):
    assert errno_of(vcpu.ioctl, ioctls.KVM_SET_CPUID2, table(0, nent=2)) == EFAULT


def test_cpuid_is_read_back_and_too_small_leaves_nent(vcpu):
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(0, 7))
    small = table(nent=0)
    assert errno_of(vcpu.ioctl, ioctls.KVM_GET_CPUID2, small) == E2BIG
    assert KVM_CPUID2.get(small, "nent") == 0
    data = table(0, 0, 0)
    assert vcpu.ioctl(ioctls.KVM_GET_CPUID2, data) == 0
    assert data[:88] == table(0, 7)
