"""IA32_PERF_CAPABILITIES, the counters' registers, and the capability that takes the PMU away."""

from errno import EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2
from kvmsim.engine.base import Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, msrs
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304
CAP_PMU = 212
FULL = 0x2005
ICE_LAKE = 'vendor = "intel"\nfamily = 6\nmodel = 106\n[pmu]\nversion = 5\n'
NO_PMU = 'vendor = "intel"\nfamily = 6\nmodel = 106\n'


@pytest.fixture
def make(kvm):
    def make(toml=ICE_LAKE, *, without=(), leaf_1=None):
        vm = kvm(toml).create_vm(0, PID)
        vcpu = vm.create_vcpu(0)
        set_cpuid(vcpu, without=without)
        vcpu.engine = Scripted([Hlt()], 9)
        return vcpu

    return make


def set_cpuid(vcpu, *, without=()):
    entries = [e for e in cpuid.supported(vcpu.vm.machine) if e.function not in without]
    data = KVM_CPUID2.pack(nent=len(entries)) + b"".join(e.pack() for e in entries)
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, data)


def put(vcpu, value, index=0x345):
    return msrs.write(vcpu, index, value, 0)


def get(vcpu, index=0x345):
    return msrs.read(vcpu, index, 0)


def run(vcpu):
    vcpu.kvm_run(0)
    vcpu.resume(0)


def test_t_e_7_the_system_shows_what_is_supported(kvm):
    for toml, expected in ((ICE_LAKE, FULL), (NO_PMU, 0), ('vendor = "amd"\n', 0)):
        data = bytearray(24)
        data[0] = 1
        data[8:12] = (0x345).to_bytes(4, "little")
        assert kvm(toml).ioctl(ioctls.KVM_GET_MSRS, data) == 1
        assert int.from_bytes(data[16:24], "little") == expected


@pytest.mark.parametrize("bit", range(64))
def test_t_e_7_before_the_first_run_each_bit_alone(make, bit):
    vcpu = make()
    assert put(vcpu, 0)
    assert put(vcpu, 1 << bit) == (bit == 13)


@pytest.mark.parametrize("format_of", [n for n in range(64) if n not in {0, 5}])
def test_t_e_7_a_format_other_than_the_hosts_is_refused(make, format_of):
    vcpu = make()
    assert not put(vcpu, 1 << 13 | format_of)
    assert get(vcpu) == FULL


@pytest.mark.parametrize("value", [0, FULL, 5, 1 << 13])
def test_t_e_7_what_is_supported_is_taken(make, value):
    vcpu = make()
    assert put(vcpu, value)
    assert get(vcpu) == value


def test_t_e_7_without_a_pmu_version_only_zero_is_taken(make):
    vcpu = make(without={0xA})
    assert not put(vcpu, 1 << 13)
    assert put(vcpu, 0)


def test_t_e_7_a_host_without_a_pmu_takes_zero_only(make):
    vcpu = make(NO_PMU)
    assert get(vcpu) == 0
    assert put(vcpu, 0)
    assert not put(vcpu, 5)


def test_t_e_7_after_the_first_run_only_the_same_value_is_taken(make):
    vcpu = make()
    run(vcpu)
    assert put(vcpu, FULL)
    assert not any(put(vcpu, FULL ^ 1 << bit) for bit in range(64))
    assert not put(vcpu, 0)
    assert get(vcpu) == FULL


def test_t_e_7_the_guest_reads_it_with_pdcm_and_never_writes_it(make):
    vcpu = make()
    assert msrs.guest_read(vcpu, 0x345, 0) == FULL
    assert not any(msrs.guest_write(vcpu, 0x345, FULL ^ 1 << bit, 0) for bit in range(64))
    assert not msrs.guest_write(vcpu, 0x345, FULL, 0)
    assert msrs.guest_read(make(NO_PMU), 0x345, 0) is None


def test_t_e_7_last_branch_registers_go_with_leaf_0xa(make):
    vcpu = make()
    assert put(vcpu, 7, 0x1C9)
    set_cpuid(vcpu, without={0xA})
    assert not put(vcpu, 7, 0x1C9)


# -- KVM_CAP_PMU_CAPABILITY ----------------------------------------


def enable(vm, value):
    vm.enable_cap(KvmEnableCap(CAP_PMU, (value,)))


def test_a_vm_can_be_made_without_a_pmu(kvm):
    vm = kvm(ICE_LAKE).create_vm(0, PID)
    enable(vm, 1)
    vcpu = vm.create_vcpu(0)
    set_cpuid(vcpu)
    assert not put(vcpu, FULL)
    assert not put(vcpu, 7, 0x1C9)
    assert not put(vcpu, 1, 0x38F)


@pytest.mark.parametrize(("toml", "value", "vcpus"), [(ICE_LAKE, 2, 0), (ICE_LAKE, 1, 1)])
def test_the_capability_is_refused(kvm, toml, value, vcpus):
    vm = kvm(toml).create_vm(0, PID)
    for number in range(vcpus):
        vm.create_vcpu(number)
    with pytest.raises(KvmError) as caught:
        enable(vm, value)
    assert caught.value.errno == EINVAL


def test_a_host_without_a_pmu_refuses_the_capability(kvm):
    with pytest.raises(KvmError) as caught:
        enable(kvm(NO_PMU).create_vm(0, PID), 1)
    assert caught.value.errno == EINVAL


def test_the_extension_says_whether_there_is_a_pmu(kvm):
    for toml, value in ((ICE_LAKE, 1), (NO_PMU, 0)):
        vm = kvm(toml).create_vm(0, PID)
        assert vm.ioctl(ioctls.KVM_CHECK_EXTENSION, CAP_PMU) == value


# -- counters ----------------------------------------


def test_leaf_0xa_shows_version_2_at_most(kvm):
    leaf = next(e for e in cpuid.supported(kvm(ICE_LAKE).machine) if e.function == 0xA)
    assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0x07300802, 0, 0, 0x8603)


@pytest.mark.parametrize(
    ("index", "value", "kept"),
    [
        (0xC1, 0x80000000, 0xFFFF80000000),  # 32 bits, sign-extended to the counter's 48
        (0xC8, 5, 5),
        (0x4C1, 1 << 47, 1 << 47),
        (0x4C1, 1 << 48, None),
        (0x186, 0x4300C0, 0x4300C0),
        (0x186, 1 << 21, None),
        (0x30B, 7, 7),
        (0x30C, 7, None),
        (0x38D, 0xBBB, 0xBBB),
        (0x38D, 0x4, None),
        (0x38F, 0x7000000FF, 0x7000000FF),
        (0x38F, 1 << 8, None),
        (0x38E, 0, None),
        (0x390, 1, 0),
        (0x18E, 0, None),
    ],
)
def test_registers_keep_what_the_guest_may_write(make, index, value, kept):
    vcpu = make()
    assert msrs.guest_write(vcpu, index, value, 0) == (kept is not None)
    if kept is not None:
        assert msrs.guest_read(vcpu, index, 0) == kept


def test_both_numbers_of_a_counter_are_one_register(make):
    vcpu = make()
    assert msrs.guest_write(vcpu, 0x4C2, 1 << 40, 0)
    assert msrs.guest_read(vcpu, 0xC2, 0) == 1 << 40


def test_the_guest_clears_status_that_user_space_has_set(make):
    vcpu = make()
    assert put(vcpu, 3, 0x38E)
    assert msrs.guest_write(vcpu, 0x390, 1, 0)
    assert get(vcpu, 0x38E) == 2


def test_without_a_pmu_the_first_counters_are_those_of_old_processors(make):
    vcpu = make(NO_PMU)
    assert msrs.guest_write(vcpu, 0xC1, 5, 0)
    assert msrs.guest_read(vcpu, 0xC1, 0) == 0
    assert msrs.guest_read(vcpu, 0xC3, 0) is None


def test_reset_clears_the_counters_and_keeps_the_capabilities(make):
    vcpu = make()
    assert put(vcpu, 1 << 13)
    assert put(vcpu, 5, 0xC1)
    vcpu.init()
    assert (get(vcpu, 0xC1), get(vcpu)) == (0, 1 << 13)
