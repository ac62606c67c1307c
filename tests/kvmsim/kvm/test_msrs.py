import pytest

from kvmsim.abi import ioctls, msrs
from kvmsim.abi.structs import KVM_MSR_ENTRY, KVM_MSR_FILTER, KVM_MSR_FILTER_RANGE, KVM_MSRS
from kvmsim.kvm import msr_filter
from kvmsim.kvm.msrs import guest_read, guest_write

AMD, INTEL = 'vendor = "amd"\n', 'vendor = "intel"\n'


@pytest.fixture
def vcpu(kvm):
    def make(toml=AMD, *, cpuid=True):
        system = kvm(toml)
        vcpu = system.create_vm(0, 1).create_vcpu(0)
        if cpuid:
            entries = b"".join(entry.pack() for entry in system.supported_cpuid)
            table = len(entries) // 40
            vcpu.ioctl(ioctls.KVM_SET_CPUID2, bytearray(table.to_bytes(8, "little") + entries))
        return vcpu

    return make


def get(vcpu, index, now_ns=0):
    data = KVM_MSRS.pack(nmsrs=1) + KVM_MSR_ENTRY.pack(index=index)
    done = vcpu.ioctl(ioctls.KVM_GET_MSRS, data, now_ns=now_ns)
    return KVM_MSR_ENTRY.get(data[8:], "data") if done else None


def put(vcpu, index, value, now_ns=0):
    data = KVM_MSRS.pack(nmsrs=1) + KVM_MSR_ENTRY.pack(index=index, data=value)
    return vcpu.ioctl(ioctls.KVM_SET_MSRS, data, now_ns=now_ns) == 1


@pytest.mark.parametrize("toml", [AMD, INTEL])
def test_every_listed_register_is_there_on_either_vendor(vcpu, toml):
    guest = vcpu(toml)
    guest.vm.irqchip = True
    listed = msrs.SAVED[guest.vm.machine.preset.vendor]
    values = {index: get(guest, index) for index in listed}
    assert [index for index, value in values.items() if value is None] == []
    assert [index for index, value in values.items() if not put(guest, index, value)] == []


@pytest.mark.parametrize(
    ("index", "other"), [(msrs.AMD_HWCR, INTEL), (msrs.AMD_VM_HSAVE_PA, INTEL), (0x3A, AMD)]
)
def test_register_of_the_other_vendor(vcpu, index, other):
    guest = vcpu(other)
    assert get(guest, index) is None
    assert not put(guest, index, 0)


@pytest.mark.parametrize(("toml", "taken"), [(AMD, True), (INTEL, False)])
def test_auxiliary_value_wider_than_32_bits(vcpu, toml, taken):
    guest = vcpu(toml)
    assert put(guest, msrs.TSC_AUX, 5 << 32 | 7) == taken
    assert get(guest, msrs.TSC_AUX) == (7 if taken else 0)


def test_addresses_of_sysenter_are_made_canonical(vcpu):
    guest = vcpu()
    assert put(guest, msrs.IA32_SYSENTER_EIP, 1 << 47)
    assert get(guest, msrs.IA32_SYSENTER_EIP) == 0xFFFF800000000000


def test_last_branches_are_saved_as_zero(vcpu):
    guest = vcpu()
    assert get(guest, 0x1DB) == 0
    assert [put(guest, 0x1DB, value) for value in (0, 1)] == [True, False]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (msrs.IA32_CR_PAT, 0x0202020202020202),
        (msrs.MISC_FEATURES_ENABLES, 2),
        (0x280, 1),
        (msrs.AMD_VIRT_SPEC_CTRL, 1),
    ],
)
def test_value_a_register_does_not_take(vcpu, index, value):
    assert not put(vcpu(), index, value)


def test_corrected_errors_are_announced_on_intel_only(vcpu):
    guest = vcpu(INTEL)
    capabilities = (10 | msrs.MCG_CMCI_P).to_bytes(8, "little")
    guest.ioctl(ioctls.KVM_X86_SETUP_MCE, bytearray(capabilities))
    assert put(guest, 0x280 + 9, 0x40000005)
    assert get(guest, 0x280 + 9) == 0x40000005


def test_local_machine_checks_are_a_matter_of_user_space_until_the_guest_may(vcpu):
    guest = vcpu(INTEL)
    assert put(guest, msrs.IA32_MCG_EXT_CTL, 0)  # QEMU does, for a guest that has them
    assert not put(guest, msrs.IA32_MCG_EXT_CTL, 2)
    assert not guest_write(guest, msrs.IA32_MCG_EXT_CTL, 1, 0)
    assert not guest_write(guest, msrs.IA32_FEAT_CTL, msrs.FEAT_CTL_LMCE, 0)
    capabilities = (10 | msrs.MCG_LMCE_P).to_bytes(8, "little")
    guest.ioctl(ioctls.KVM_X86_SETUP_MCE, bytearray(capabilities))
    assert guest_write(guest, msrs.IA32_FEAT_CTL, msrs.FEAT_CTL_LMCE | msrs.FEAT_CTL_LOCKED, 0)
    assert not guest_write(guest, msrs.IA32_FEAT_CTL, 0, 0)
    assert guest_write(guest, msrs.IA32_MCG_EXT_CTL, 1, 0)
    assert guest_read(guest, msrs.IA32_MCG_EXT_CTL, 0) == 1


def test_adjustment_of_the_counter_is_kept_for_a_guest_that_has_it(vcpu):
    guest = vcpu()
    put(guest, msrs.IA32_TSC_ADJUST, 0x1234)
    assert get(guest, msrs.IA32_TSC_ADJUST) == 0x1234


def test_counter_goes_on_from_what_was_set(vcpu):
    guest = vcpu()
    assert put(guest, msrs.IA32_TSC, 1000, now_ns=5_000_000)
    # 2 GHz
    assert get(guest, msrs.IA32_TSC, now_ns=6_000_000) == 1000 + 2_000_000


def test_bases_of_segments_are_those_of_the_segments(vcpu):
    guest = vcpu()
    put(guest, msrs.GS_BASE, 0x7F0000001000)
    data = bytearray(312)
    guest.ioctl(ioctls.KVM_GET_SREGS, data)
    assert int.from_bytes(data[96:104], "little") == 0x7F0000001000


def test_asynchronous_page_faults_need_an_apic_in_the_kernel(kvm):
    vm = kvm().create_vm(0, 1)
    vm.create_irqchip()
    guest = vm.create_vcpu(0)
    assert put(guest, msrs.KVM_ASYNC_PF_EN, 0x1001)
    assert put(guest, msrs.KVM_ASYNC_PF_INT, 0xEC)
    assert not put(guest, msrs.KVM_ASYNC_PF_INT, 0x100)


def test_clock_of_a_guest_that_enabled_it_can_be_told_of_a_pause(vcpu):
    guest = vcpu()
    put(guest, msrs.KVM_SYSTEM_TIME_NEW, 0x1001)
    assert guest.ioctl(ioctls.KVM_KVMCLOCK_CTRL) == 0


# -- filter --------------------------------------------------------------------------------------


@pytest.fixture
def vm(kvm):
    return kvm().create_vm(0, 1)


def set_filter(vm, *ranges, deny=False):
    data = KVM_MSR_FILTER.pack(flags=int(deny))
    for number, (flags, base, bits) in enumerate(ranges):
        bitmap = vm.creator.map(bytearray(bits.to_bytes(8, "little")))
        entry = KVM_MSR_FILTER_RANGE.pack(flags=flags, nmsrs=8, base=base, bitmap=bitmap)
        data[8 + 24 * number : 32 + 24 * number] = entry
    return vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, data)


def test_without_a_filter_everything_is_allowed(vm):
    assert msr_filter.allows(vm, 0x174, write=True)


def test_range_decides_about_the_accesses_it_names(vm):
    set_filter(vm, (2, 0x174, 0b10))
    allowed = [msr_filter.allows(vm, index, write=True) for index in (0x174, 0x175, 0x17C)]
    assert allowed == [False, True, True]
    assert msr_filter.allows(vm, 0x174, write=False)


def test_what_is_in_no_range_is_as_the_filter_says(vm):
    set_filter(vm, (3, 0x174, 0xFF), deny=True)
    assert [msr_filter.allows(vm, index, write=False) for index in (0x174, 0x10)] == [True, False]


def test_local_apic_is_never_filtered(vm):
    set_filter(vm, (3, 0x800, 0), deny=True)
    assert msr_filter.allows(vm, 0x802, write=True)


def test_refused_filter_leaves_the_old_one(vm):
    set_filter(vm, (3, 0x174, 0))
    bad = KVM_MSR_FILTER.pack()
    bad[8:32] = KVM_MSR_FILTER_RANGE.pack(flags=3, nmsrs=8, base=0x174, bitmap=1)
    with pytest.raises(Exception, match="EFAULT"):
        vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, bad)
    assert not msr_filter.allows(vm, 0x174, write=False)


@pytest.mark.parametrize("toml", [AMD, INTEL])
def test_guest_controls_speculation_if_its_cpuid_says_so(vcpu, toml):
    guest = vcpu(toml)
    assert guest_write(guest, msrs.IA32_SPEC_CTRL, 0x5, 0)
    assert guest_read(guest, msrs.IA32_SPEC_CTRL, 0) == get(guest, msrs.IA32_SPEC_CTRL) == 0x5
    assert not guest_write(guest, msrs.IA32_SPEC_CTRL, 0x8, 0)
    assert guest_write(guest, msrs.IA32_PRED_CMD, 1, 0)
    assert not guest_write(guest, msrs.IA32_PRED_CMD, 2, 0)
    assert guest_read(guest, msrs.IA32_PRED_CMD, 0) is None
    bare = vcpu(toml, cpuid=False)
    assert guest_read(bare, msrs.IA32_SPEC_CTRL, 0) is None
    assert not guest_write(bare, msrs.IA32_SPEC_CTRL, 1, 0)
    assert not guest_write(bare, msrs.IA32_PRED_CMD, 1, 0)
    assert put(bare, msrs.IA32_SPEC_CTRL, 1)
    assert get(bare, msrs.IA32_SPEC_CTRL) == 1
