from errno import EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.irq import KVM_CLOCK_DATA
from kvmsim.abi.structs import KVM_DEVICE_ATTR
from kvmsim.errors import KvmError
from kvmsim.kvm import clock

SECOND = 1_000_000_000
GHZ = 1_000_000  # in kHz


@pytest.fixture
def vm(kvm):
    return kvm('vendor = "amd"\ntsc-khz = 1000000\n').create_vm(0, 1)


def get_clock(vm, now_ns):
    data = bytearray(48)
    vm.ioctl(ioctls.KVM_GET_CLOCK, data, now_ns=now_ns)
    return [KVM_CLOCK_DATA.get(data, name) for name in ("clock", "flags", "host_tsc", "realtime")]


def test_clock_of_a_vm_starts_at_zero_and_names_the_hosts_counter(vm):
    assert get_clock(vm, 5 * SECOND) == [0, 2 | 8, 5 * SECOND, 0]
    assert get_clock(vm, 6 * SECOND)[0] == SECOND


def test_clock_set_back_goes_on_from_there(vm):
    vm.ioctl(ioctls.KVM_SET_CLOCK, KVM_CLOCK_DATA.pack(clock=100), now_ns=SECOND)
    assert get_clock(vm, SECOND + 7)[0] == 107


def test_counters_of_a_vm_start_with_its_first_vcpu_and_agree(vm):
    first = vm.ioctl(ioctls.KVM_CREATE_VCPU, 0, now_ns=SECOND)
    second = vm.ioctl(ioctls.KVM_CREATE_VCPU, 1, now_ns=2 * SECOND)
    assert [clock.guest_tsc(vcpu, 3 * SECOND) for vcpu in (first, second)] == [2 * SECOND] * 2


def test_offset_is_what_the_guest_is_ahead(vm):
    vcpu = vm.ioctl(ioctls.KVM_CREATE_VCPU, 0, now_ns=SECOND)
    value = bytearray(8)
    attr = KVM_DEVICE_ATTR.pack(addr=vm.creator.map(value))
    vcpu.ioctl(ioctls.KVM_GET_DEVICE_ATTR, attr)
    assert int.from_bytes(value, "little") == (1 << 64) - SECOND
    value[:] = (5).to_bytes(8, "little")
    vcpu.ioctl(ioctls.KVM_SET_DEVICE_ATTR, attr)
    assert clock.guest_tsc(vcpu, SECOND) == SECOND + 5


def test_frequency_of_a_vm_is_that_of_its_new_vcpus(vm):
    vm.ioctl(ioctls.KVM_SET_TSC_KHZ, 2 * GHZ)
    vcpu = vm.ioctl(ioctls.KVM_CREATE_VCPU, 0)
    assert vcpu.ioctl(ioctls.KVM_GET_TSC_KHZ) == 2 * GHZ
    assert clock.guest_tsc(vcpu, SECOND) == 2 * SECOND
    vcpu.ioctl(ioctls.KVM_SET_TSC_KHZ, 0)
    assert vcpu.ioctl(ioctls.KVM_GET_TSC_KHZ) == GHZ


def test_frequency_beyond_what_scaling_can_do(vm):
    with pytest.raises(KvmError) as error:
        vm.ioctl(ioctls.KVM_SET_TSC_KHZ, 256 * GHZ)
    assert error.value.errno == EINVAL


@pytest.fixture
def pair(vm):
    """Two vCPUs, the first of which user space has set to 1 << 50 at 10 seconds."""
    vcpus = [vm.ioctl(ioctls.KVM_CREATE_VCPU, number) for number in range(2)]
    clock.set_guest_tsc(vcpus[0], 1 << 50, 10 * SECOND)
    return vcpus


def test_a_new_vcpu_is_in_step_with_what_was_written(vm, pair):
    third = vm.ioctl(ioctls.KVM_CREATE_VCPU, 2, now_ns=20 * SECOND)
    assert clock.guest_tsc(third, 20 * SECOND) == (1 << 50) + 10 * SECOND


@pytest.mark.parametrize("value", [0, (1 << 50) + 5 * SECOND - 999_999_999])
def test_a_zero_and_almost_the_same_keep_vcpus_in_step(pair, value):
    """The counter was read elsewhere a moment ago: five seconds after the write, up to one off."""
    clock.set_guest_tsc(pair[1], value, 15 * SECOND)
    assert clock.guest_tsc(pair[1], 15 * SECOND) == (1 << 50) + 5 * SECOND


def test_another_value_is_taken_and_leaves_the_other_vcpu_alone(pair):
    clock.set_guest_tsc(pair[1], 1 << 40, 15 * SECOND)
    assert clock.guest_tsc(pair[1], 15 * SECOND) == 1 << 40
    assert clock.guest_tsc(pair[0], 15 * SECOND) == (1 << 50) + 5 * SECOND
