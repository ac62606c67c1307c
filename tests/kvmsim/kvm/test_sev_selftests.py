"""What the kernel's own selftests assert, call by call (kvm.md D.10)."""

from errno import EINVAL, EIO
from itertools import pairwise

import pytest

from kvmsim.abi import sev as abi
from kvmsim.abi.ioctls import KVM_GET_DEVICE_ATTR, KVM_GET_SUPPORTED_CPUID, KVM_HAS_DEVICE_ATTR
from kvmsim.abi.structs import KVM_DEVICE_ATTR

DEFAULT, SW_PROTECTED, SEV, SEV_ES = 0, 1, 2, 3
INIT = abi.KVM_SEV_INIT_STRUCT
NR_MIGRATE_TEST_VCPUS = 4
ALLOWED_ON_A_MIRROR = {4, 16, 17, 18}


@pytest.fixture(autouse=True)
def everything_returns(vmm, accounting):
    """After each test: every VM closed, every ASID and charge back."""
    yield
    for vm in tuple(vmm.system.vms):
        vm.close()
    assert vmm.system.vms == {}
    statistics = vmm.system.statistics().asids
    assert (statistics.sev, statistics.sev_es) == (0, 0)
    assert set(accounting.charged.values()) <= {0}
    assert vmm.system.firmware.guests == {}


# -- sev_init2_tests -------------------------------------------------------------------------------


def supported_features(vmm):
    """The value of the attribute, read as the test does."""
    value = bytearray(8)
    attr = KVM_DEVICE_ATTR.pack(group=1, attr=0, addr=vmm.client.map(value))
    assert vmm.system.ioctl(KVM_HAS_DEVICE_ATTR, attr, vmm.client) == 0
    assert vmm.system.ioctl(KVM_GET_DEVICE_ATTR, attr, vmm.client) == 0
    return int.from_bytes(value, "little")


def cpuid_8000_001f_eax(vmm):
    table = bytearray((100).to_bytes(8, "little")) + bytearray(100 * 40)
    vmm.system.ioctl(KVM_GET_SUPPORTED_CPUID, table, vmm.client)
    for at in range(8, len(table), 40):
        if int.from_bytes(table[at : at + 4], "little") == 0x8000001F:
            return int.from_bytes(table[at + 12 : at + 16], "little")
    return 0


def init2(vmm, vm_type, **values):
    """Make a VM, give it INIT2, close it."""
    vm = vmm.create(vm_type)
    outcome = vmm.run(vm, abi.KVM_SEV_INIT2, INIT, sev_fd=-1, **values)
    vm.close()
    return outcome


def test_vmsa_features_are_an_attribute_and_bits_agree_with_the_vm_types(vmm):
    assert supported_features(vmm) == 32
    types = vmm.system.check_extension(235)
    eax = cpuid_8000_001f_eax(vmm)
    assert bool(eax & 1 << 1) == bool(types & 1 << SEV)
    assert bool(eax & 1 << 3) == bool(types & 1 << SEV_ES)


@pytest.mark.parametrize("vm_type", [SEV, SEV_ES])
def test_init2_of_zeros_succeeds(vmm, vm_type):
    assert init2(vmm, vm_type).answer == (0, 0)


def test_init2_of_a_default_vm_is_refused(vmm):
    assert init2(vmm, DEFAULT).errno == EINVAL


def test_some_190_vms_one_after_the_other_find_an_asid(vmm):
    flags = [init2(vmm, kind, flags=1 << bit).errno for kind in (2, 3) for bit in range(32)]
    features = [init2(vmm, SEV, vmsa_features=1 << bit).errno for bit in range(64)]
    es_features = {
        bit for bit in range(64) if init2(vmm, SEV_ES, vmsa_features=1 << bit).errno == 0
    }
    assert set(flags) == set(features) == {EINVAL}
    assert es_features == {5}
    assert [init2(vmm, SEV).errno for _ in range(20)] == [0] * 20


# -- sev_migrate_tests -----------------------------------------------------------------------------


def sev_vm_create(vmm, *, es):
    """As the selftest: the default type, 4 vCPUs, launched as far as the update."""
    vm = vmm.legacy(es=es, vcpus=NR_MIGRATE_TEST_VCPUS)
    assert vmm.start(vm, policy=4 if es else 0).errno == 0
    if es:
        assert vmm.run(vm, abi.KVM_SEV_LAUNCH_UPDATE_VMSA).answer == (0, 0)
    return vm


def aux_vm_create(vmm, *, with_vcpus):
    return vmm.create(DEFAULT, NR_MIGRATE_TEST_VCPUS if with_vcpus else 0)


@pytest.mark.parametrize("es", [False, True])
def test_migrate_from(vmm, es):
    source = sev_vm_create(vmm, es=es)
    chain = [source, *(aux_vm_create(vmm, with_vcpus=True) for _ in range(3))]
    for older, newer in pairwise(chain):
        assert vmm.move(newer, older) == 0
    assert vmm.move(source, chain[-1]) == EIO


def test_migrate_among_live_guests_never_succeeds(vmm):
    guests = [sev_vm_create(vmm, es=False) for _ in range(3)]
    results = {
        vmm.move(guests[index % 3], guests[(index + 1 + index // 3 % 2) % 3])
        for index in range(300)
    }
    assert results == {EINVAL}


def test_migrate_parameters(vmm):
    sev, es = sev_vm_create(vmm, es=False), sev_vm_create(vmm, es=True)
    no_vmsa = vmm.legacy(es=True, vcpus=1)
    no_vcpus, some_vcpus = (aux_vm_create(vmm, with_vcpus=with_) for with_ in (False, True))
    assert vmm.move(sev, es) == EINVAL
    assert vmm.move(es, sev) == EINVAL
    assert vmm.move(no_vcpus, es) == EINVAL
    assert vmm.move(some_vcpus, no_vmsa) == EINVAL
    assert vmm.move(some_vcpus, no_vcpus) == EINVAL


@pytest.mark.parametrize("es", [False, True])
def test_mirror(vmm, es):
    source = sev_vm_create(vmm, es=es)
    mirror = aux_vm_create(vmm, with_vcpus=False)
    assert vmm.mirror(mirror, source) == 0
    for number in range(NR_MIGRATE_TEST_VCPUS):
        mirror.create_vcpu(number)
    if es:
        assert vmm.run(mirror, abi.KVM_SEV_LAUNCH_UPDATE_VMSA, sev_fd=-1).answer == (0, 0)
    source.close()
    for number in set(range(103)) - ALLOWED_ON_A_MIRROR:
        assert vmm.run(mirror, number, sev_fd=-1).errno == EINVAL
    layout = abi.KVM_SEV_GUEST_STATUS_STRUCT
    assert vmm.run(mirror, abi.KVM_SEV_GUEST_STATUS, layout, sev_fd=-1).errno == 0


def test_mirror_parameters(vmm):
    sev, es = sev_vm_create(vmm, es=False), sev_vm_create(vmm, es=True)
    no_vcpus, some_vcpus = (aux_vm_create(vmm, with_vcpus=with_) for with_ in (False, True))
    assert vmm.mirror(sev, sev) == EINVAL
    assert vmm.mirror(no_vcpus, some_vcpus) == EINVAL
    assert vmm.mirror(some_vcpus, sev) == EINVAL
    assert vmm.mirror(sev, es) == EINVAL
    assert vmm.mirror(es, sev) == EINVAL


@pytest.mark.parametrize("dead_last", [False, True])
def test_move_copy(vmm, dead_last):
    sev = sev_vm_create(vmm, es=False)
    mirror = aux_vm_create(vmm, with_vcpus=False)
    assert vmm.mirror(mirror, sev) == 0
    vms, dead = [sev, mirror], []
    for _ in range(3):
        moved = [aux_vm_create(vmm, with_vcpus=True) for _ in vms]
        for target, source in zip(reversed(moved), reversed(vms), strict=True):
            assert vmm.move(target, source) == 0
        dead += vms
        vms = moved
    for vm in [*vms, *dead] if dead_last else [*dead, *reversed(vms)]:
        vm.close()
    assert vmm.system.vms == {}


# -- sev_smoke_test, up to the first KVM_RUN -------------------------------------------------------


@pytest.mark.parametrize(("vm_type", "policy"), [(SEV, 1), (SEV, 0), (SEV_ES, 5), (SEV_ES, 4)])
def test_smoke(vmm, vm_type, policy):
    vm = vmm.create(vm_type)
    vm.create_irqchip()
    assert vmm.run(vm, abi.KVM_SEV_INIT2, INIT, sev_fd=-1).answer == (0, 0)
    vcpu = vm.create_vcpu(0)
    memory, content = vmm.memory(b"code" * 4096)

    started = vmm.start(vm, policy=policy)
    status = vmm.status(vm)
    assert (status["handle"], status["policy"], status["state"]) == (started["handle"], policy, 1)
    assert vmm.region(vm, memory, len(content)) == 0
    assert vmm.load(vm, memory, 8192).errno == 0
    assert vmm.load(vm, memory + 8192, 8192).errno == 0
    if policy & 4:
        assert vmm.run(vm, abi.KVM_SEV_LAUNCH_UPDATE_VMSA).errno == 0

    buffer, measurement = vmm.memory(bytes(256))
    layout = abi.KVM_SEV_LAUNCH_MEASURE_STRUCT
    assert vmm.run(vm, abi.KVM_SEV_LAUNCH_MEASURE, layout, uaddr=buffer, len=256).errno == 0
    assert any(measurement)
    assert vmm.state(vm) == 2
    assert vmm.run(vm, abi.KVM_SEV_LAUNCH_FINISH).errno == 0
    assert vmm.state(vm) == 3
    assert vcpu.kvm_run(0) is not None
