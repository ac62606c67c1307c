from errno import EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi import msrs as abi
from kvmsim.abi.structs import KVM_CPUID2
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, cpuid_guest, fpu, msrs, sregs
from kvmsim.kvm.cpuid import SIGNIFICANT_INDEX, Entry
from kvmsim.kvm.vm import KvmEnableCap

AMD, INTEL = 'vendor = "amd"\n', 'vendor = "intel"\n'
VENDOR = {
    "intel": {"ebx": 0x756E6547, "edx": 0x49656E69, "ecx": 0x6C65746E},
    "amd": {"ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163},
}


@pytest.fixture
def vcpu(kvm):
    def make(*entries, toml=INTEL):
        vcpu = kvm(toml).create_vm(0, 1).create_vcpu(0)
        cpuid.set_table(vcpu, b"".join(entry.pack() for entry in entries))
        return vcpu

    return make


def table(vcpu):
    data = KVM_CPUID2.pack(nent=100) + bytes(4000)
    vcpu.ioctl(ioctls.KVM_GET_CPUID2, data)
    return bytes(data[8 : 8 + 40 * KVM_CPUID2.get(data, "nent")])


def test_leaf_and_subleaf_are_found(vcpu):
    guest = vcpu(Entry(4, 0, SIGNIFICANT_INDEX, eax=1), Entry(4, 1, SIGNIFICANT_INDEX, eax=2))
    assert [cpuid_guest.read(guest, 4, index)[0] for index in (0, 1, 2)] == [1, 2, 0]


def test_leaf_without_subleaves_is_the_same_for_all(vcpu):
    assert cpuid_guest.read(vcpu(Entry(2, eax=7)), 2, 99) == (7, 0, 0, 0)


@pytest.mark.parametrize(("vendor", "eax"), [("intel", 0x77), ("amd", 0)])
@pytest.mark.parametrize("leaf", [0x17, 0x1234, 0x40000100, 0x80000099])
def test_leaf_beyond_the_range_is_the_last_basic_one_on_intel(vcpu, vendor, eax, leaf):
    guest = vcpu(
        Entry(0, eax=0x16, **VENDOR[vendor]),
        Entry(0x16, eax=0x77),
        Entry(0x80000000, eax=0x80000008),
    )
    assert cpuid_guest.read(guest, leaf, 0)[0] == eax


def test_hole_within_the_range_is_zero(vcpu):
    guest = vcpu(Entry(0, eax=0x16, **VENDOR["intel"]), Entry(0x16, eax=0x77))
    assert cpuid_guest.read(guest, 3, 0) == (0, 0, 0, 0)


def test_subleaf_of_the_topology_gives_back_its_number_and_the_id(vcpu):
    guest = vcpu(
        Entry(0, eax=0xB, **VENDOR["intel"]),
        Entry(0xB, 0, SIGNIFICANT_INDEX, edx=5),
        Entry(0xB, 1, SIGNIFICANT_INDEX, edx=5),
    )
    assert cpuid_guest.read(guest, 0xB, 7) == (0, 0, 7, 5)


# -- what follows registers ------------------------------------------------------------------------


def test_osxsave_follows_cr4(vcpu):
    guest = vcpu(Entry(1, ecx=1 << 26))
    assert not cpuid_guest.read(guest, 1, 0)[2] >> 27 & 1
    sregs.of(guest).put("cr4", 1 << 18)
    assert cpuid_guest.read(guest, 1, 0)[2] >> 27 & 1
    assert table(guest)[4 * 5 + 3] >> 3 & 1


def test_apic_bit_follows_the_apic_base(vcpu):
    guest = vcpu(Entry(1))
    assert cpuid_guest.read(guest, 1, 0)[3] >> 9 & 1
    guest.apic_base = 0xFEE00000
    assert not cpuid_guest.read(guest, 1, 0)[3] >> 9 & 1


def test_mwait_follows_misc_enable_where_the_quirk_is_off(vcpu):
    guest = vcpu(Entry(1, ecx=1 << 3 | 1))
    assert cpuid_guest.read(guest, 1, 0)[2] >> 3 & 1
    guest.vm.enable_cap(KvmEnableCap(cap=213, args=(1 << 4, 0, 0, 0)))
    assert not cpuid_guest.read(guest, 1, 0)[2] >> 3 & 1
    assert msrs.guest_write(guest, abi.IA32_MISC_ENABLE, 1 << 18, 0)
    assert cpuid_guest.read(guest, 1, 0)[2] >> 3 & 1


@pytest.mark.parametrize(("disabled", "shown"), [(0, True), (2, False)])
def test_halts_are_ended_for_others_only_where_kvm_sees_them(kvm, disabled, shown):
    vm = kvm(INTEL).create_vm(0, 1)
    vm.enable_cap(KvmEnableCap(cap=143, args=(disabled, 0, 0, 0)))
    guest = vm.create_vcpu(0)
    cpuid.set_table(guest, b"".join(entry.pack() for entry in vm.system.supported_cpuid))
    assert bool(cpuid_guest.read(guest, 0x40000001, 0)[0] & 1 << 7) == shown


@pytest.mark.parametrize(("xcr0", "size_bytes"), [(1, 576), (3, 576), (7, 832)])
def test_size_of_the_xsave_area_follows_xcr0(vcpu, xcr0, size_bytes):
    guest = vcpu(Entry(0xD, 0, SIGNIFICANT_INDEX, eax=7, ebx=1))
    fpu.of(guest).xcr0 = xcr0
    assert cpuid_guest.read(guest, 0xD, 0)[1] == size_bytes


def test_table_read_back_can_be_set_again_after_the_run(vcpu):
    guest = vcpu(Entry(1, ecx=1 << 26), Entry(0xD, 0, SIGNIFICANT_INDEX, eax=7, ebx=832))
    guest.has_run = True
    sregs.of(guest).put("cr4", 1 << 18)
    cpuid.set_table(guest, table(guest))
    with pytest.raises(KvmError) as error:
        cpuid.set_table(guest, Entry(1, ecx=1).pack())
    assert error.value.errno == EINVAL


def test_instructions_guests_do_not_have_are_not_shown(kvm):
    entries = kvm(INTEL).supported_cpuid
    avx, fma, f16c = 1 << 28, 1 << 12, 1 << 29
    assert not cpuid.register(entries, 1, "ecx") & (avx | fma | f16c)
    avx2, bmi1, bmi2, sha = 1 << 5, 1 << 3, 1 << 8, 1 << 29
    assert not cpuid.register(entries, 7, "ebx") & (avx2 | bmi1 | bmi2 | sha)
