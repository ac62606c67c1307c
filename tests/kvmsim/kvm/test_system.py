from errno import E2BIG, EFAULT, EINVAL, ENXIO

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2, KVM_CPUID_ENTRY2, KVM_DEVICE_ATTR
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient

AMD = 'vendor = "amd"\n[sev]\nmax-asid = 509\nmin-sev-asid = 100\ndebug-swap = true\n'


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def leaf(system, function):
    data = bytearray(8 + 40 * 100)
    KVM_CPUID2.put(data, "nent", 100)
    assert system.ioctl(ioctls.KVM_GET_SUPPORTED_CPUID, data) == 0
    count = KVM_CPUID2.get(data, "nent")
    entries = [bytes(data[8 + 40 * n : 48 + 40 * n]) for n in range(count)]
    entry = next(e for e in entries if KVM_CPUID_ENTRY2.get(e, "function") == function)
    return {name: KVM_CPUID_ENTRY2.get(entry, name) for name in ("eax", "ebx", "ecx", "edx")}


def test_versions_and_sizes(kvm):
    system = kvm()
    assert system.ioctl(ioctls.KVM_GET_API_VERSION) == 12
    assert system.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE) == 12288
    assert errno_of(system.ioctl, ioctls.KVM_GET_API_VERSION, 1) == EINVAL
    assert errno_of(system.ioctl, ioctls.KVM_GET_VCPU_MMAP_SIZE, 1) == EINVAL


@pytest.mark.parametrize("vm_type", [1, 2, 5, 6, 31, 32, 63, 64, 2**64 - 1])
def test_unsupported_vm_type_is_einval(kvm, vm_type):
    assert errno_of(kvm().ioctl, ioctls.KVM_CREATE_VM, vm_type) == EINVAL


@pytest.mark.parametrize(
    ("toml", "mask"),
    [
        ('vendor = "intel"\n', 0b1),
        ('vendor = "intel"\n[tdx]\nkeys = 1\n', 0b100001),
        (AMD, 0b1101),
        (AMD + "snp = true\n", 0b11101),
        ('vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 1\n', 0b101),
    ],
)
def test_vm_types_follow_the_hardware(kvm, toml, mask):
    assert kvm(toml).check_extension(235) == mask


def test_creator_of_a_vm_is_whoever_called(kvm):
    client = LocalClient(77)
    vm = kvm().ioctl(ioctls.KVM_CREATE_VM, 0, client)
    assert vm.creator is client


def test_supported_cpuid_shows_the_asids_of_the_host(kvm):
    assert leaf(kvm(AMD), 0x8000001F) == {"eax": 0b1010, "ebx": 51, "ecx": 509, "edx": 100}


def test_supported_cpuid_without_sev_is_all_zero(kvm):
    off = AMD + "[kvm-amd]\nsev = false\n"
    assert leaf(kvm(off), 0x8000001F) == {"eax": 0, "ebx": 0, "ecx": 0, "edx": 0}


@pytest.mark.parametrize(("vendor", "shown"), [("intel", 1 << 24), ("amd", 0)])
def test_bus_lock_detect_is_for_intel_guests_only(kvm, vendor, shown):
    system = kvm(f'vendor = "{vendor}"\n[bus-lock]\ndetect = true\n')
    assert leaf(system, 7)["ecx"] & 1 << 24 == shown


def test_cpuid_tells_family_and_model_of_the_preset(kvm):
    system = kvm('vendor = "amd"\nfamily = 25\nmodel = 17\nstepping = 1\n')
    assert leaf(system, 1)["eax"] == 0x00A10F11
    assert leaf(kvm('vendor = "intel"\nfamily = 6\nmodel = 143\n'), 1)["eax"] == 0x000806F0


def test_supported_cpuid_too_small_is_e2big_and_leaves_nent(kvm):
    data = bytearray(8 + 40)
    KVM_CPUID2.put(data, "nent", 1)
    assert errno_of(kvm().ioctl, ioctls.KVM_GET_SUPPORTED_CPUID, data) == E2BIG
    assert KVM_CPUID2.get(data, "nent") == 1


def test_supported_cpuid_clamps_nent_and_sets_it(kvm):
    data = bytearray(8 + 40 * 257)
    KVM_CPUID2.put(data, "nent", 257)
    assert kvm().ioctl(ioctls.KVM_GET_SUPPORTED_CPUID, data) == 0
    assert 0 < KVM_CPUID2.get(data, "nent") < 257


def test_null_pointer_is_efault(kvm):
    assert errno_of(kvm().ioctl, ioctls.KVM_GET_SUPPORTED_CPUID, 0) == EFAULT


def test_vmsa_features_are_an_attribute_of_the_system(kvm):
    system = kvm(AMD)
    value = bytearray(8)
    address = system.creator.map(value)
    attr = KVM_DEVICE_ATTR.pack(group=1, attr=0, addr=address)
    assert system.ioctl(ioctls.KVM_HAS_DEVICE_ATTR, attr) == 0
    assert system.ioctl(ioctls.KVM_GET_DEVICE_ATTR, attr) == 0
    assert value[0] == 32


@pytest.mark.parametrize(("toml", "group", "attr"), [('vendor = "amd"\n', 1, 0), (AMD, 1, 1)])
def test_attribute_that_does_not_exist_is_enxio(kvm, toml, group, attr):
    data = KVM_DEVICE_ATTR.pack(group=group, attr=attr)
    assert errno_of(kvm(toml).ioctl, ioctls.KVM_HAS_DEVICE_ATTR, data) == ENXIO


def test_statistics_count_vms_vcpus_and_asids(kvm):
    system = kvm(AMD)
    vm = system.create_vm(3, 1)
    vm.encrypt()
    vm.create_vcpu(0)
    got = system.statistics()
    assert (got.vms, got.vcpus, got.asids.sev_es, got.tdx_free) == (1, 1, 1, 0)
