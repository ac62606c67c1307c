"""The guest's own reads and writes of registers, beside user space's."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi import msrs as abi
from kvmsim.kvm import clock, cpuid, msrs
from kvmsim.kvm.vm import KvmEnableCap

AMD, INTEL = 'vendor = "amd"\n', 'vendor = "intel"\n'
MS = 1_000_000
UNKNOWN, BLOCKED = 0x12345678, 0x10B


@pytest.fixture
def vcpu(kvm):
    def make(toml=INTEL):
        system = kvm(toml)
        vcpu = system.create_vm(0, 1).create_vcpu(0)
        cpuid.set_table(vcpu, b"".join(entry.pack() for entry in system.supported_cpuid))
        return vcpu

    return make


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (abi.IA32_ARCH_CAPABILITIES, 0x6B),
        (abi.PLATFORM_INFO, 1 << 31),
        (abi.SMI_COUNT, 1),
        (abi.IA32_MISC_ENABLE, 1 << 11),
        (abi.MTRRCAP, 0x508),
    ],
)
def test_guest_cannot_write_what_describes_its_processor(vcpu, index, value):
    guest = vcpu()
    before = msrs.guest_read(guest, index, 0)
    assert not msrs.guest_write(guest, index, value, 0)
    assert msrs.guest_read(guest, index, 0) == before


def test_user_space_sets_what_the_guest_may_not(vcpu):
    assert msrs.write(vcpu(), abi.SMI_COUNT, 1, 0)


@pytest.mark.parametrize("index", [UNKNOWN, BLOCKED, abi.IA32_UCODE_WRITE])
def test_guest_reads_no_register_that_is_not_there(vcpu, index):
    assert msrs.guest_read(vcpu(), index, 0) is None


def test_register_of_a_feature_the_guest_has_not(vcpu):
    guest = vcpu()
    assert msrs.guest_read(guest, abi.TSC_AUX, 0) == 0
    cpuid.set_table(guest, b"")
    assert msrs.guest_read(guest, abi.TSC_AUX, 0) is None
    assert not msrs.guest_write(guest, abi.TSC_AUX, 0, 0)
    assert msrs.read(guest, abi.TSC_AUX, 0) == 0


def test_monitoring_bit_of_misc_enable_stays_without_a_fault(vcpu):
    guest = vcpu()
    assert msrs.guest_write(guest, abi.IA32_MISC_ENABLE, 1 | 1 << 7, 0)
    assert msrs.guest_read(guest, abi.IA32_MISC_ENABLE, 0) == 1


def test_microcode_revision_is_not_changed_by_the_guest(vcpu):
    guest = vcpu()
    before = msrs.guest_read(guest, abi.IA32_UCODE_REV, 0)
    assert msrs.guest_write(guest, abi.IA32_UCODE_REV, 0, 0)
    assert msrs.guest_read(guest, abi.IA32_UCODE_REV, 0) == before


def test_platform_info_can_be_taken_from_the_guest(vcpu):
    guest = vcpu()
    assert msrs.guest_read(guest, abi.PLATFORM_INFO, 0) == 1 << 31
    guest.vm.enable_cap(KvmEnableCap(cap=159, args=(0, 0, 0, 0)))
    assert msrs.guest_read(guest, abi.PLATFORM_INFO, 0) is None
    assert msrs.read(guest, abi.PLATFORM_INFO, 0) == 1 << 31


@pytest.mark.parametrize("index", [abi.KVM_SYSTEM_TIME_NEW, abi.KVM_STEAL_TIME, abi.KVM_WALL_CLOCK])
def test_paravirtual_register_is_only_there_if_an_enforced_cpuid_shows_it(vcpu, index):
    guest = vcpu()
    assert msrs.guest_write(guest, index, 0, 0)
    guest.enforces_pv_cpuid = True
    cpuid.set_table(guest, b"")
    assert msrs.guest_read(guest, index, 0) is None
    assert not msrs.guest_write(guest, index, 0, 0)


# -- what user space hears of a refusal ----------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "index", "known"),
    [
        (INTEL, UNKNOWN, False),
        (INTEL, BLOCKED, True),
        (INTEL, abi.IA32_TSC, True),
        (INTEL, abi.AMD_HWCR, False),
        (AMD, abi.AMD_HWCR, True),
        (AMD, abi.IA32_MCG_STATUS, True),
    ],
)
def test_registers_kvm_knows(vcpu, toml, index, known):
    assert msrs.known(vcpu(toml), index) == known


# -- the time-stamp counter ------------------------------------------------------------------------


def test_counter_the_guest_sets_shows_in_its_adjustment(vcpu):
    guest = vcpu()
    before = clock.guest_tsc(guest, MS)
    assert msrs.guest_write(guest, abi.IA32_TSC, before + 1000, MS)
    assert msrs.guest_read(guest, abi.IA32_TSC_ADJUST, MS) == 1000
    assert clock.guest_tsc(guest, MS) == before + 1000


def test_adjustment_the_guest_sets_moves_its_counter(vcpu):
    guest = vcpu()
    before = clock.guest_tsc(guest, MS)
    assert msrs.guest_write(guest, abi.IA32_TSC_ADJUST, (1 << 64) - 500, MS)
    assert clock.guest_tsc(guest, MS) == before - 500


def test_user_space_sets_one_without_the_other(vcpu):
    guest = vcpu()
    assert msrs.write(guest, abi.IA32_TSC, 5_000_000, MS)
    assert msrs.read(guest, abi.IA32_TSC_ADJUST, MS) == 0
    assert msrs.write(guest, abi.IA32_TSC_ADJUST, 123, MS)
    assert msrs.read(guest, abi.IA32_TSC, MS) == 5_000_000


# -- machine checks --------------------------------------------------------------------------------


def test_guest_clears_a_status_and_makes_none_up(vcpu):
    guest = vcpu(AMD)
    guest.ioctl(ioctls.KVM_X86_SETUP_MCE, bytearray((10).to_bytes(8, "little")))
    assert msrs.write(guest, 0x401, 5, 0)
    assert not msrs.guest_write(guest, 0x401, 7, 0)
    assert msrs.guest_write(guest, 0x401, 0, 0)
    assert msrs.guest_write(guest, abi.AMD_HWCR, 1 << 18, 0)
    assert msrs.guest_write(guest, 0x401, 7, 0)
