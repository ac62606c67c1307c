from errno import EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.regs import KVM_SREGS, KVM_SREGS2
from kvmsim.engine.base import Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, events, protected, sregs
from kvmsim.kvm.run import Halted, InGuest

SEV_ES = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\n'
PE, PG, PAE = 1, 1 << 31, 1 << 5


@pytest.fixture
def vcpu(kvm):
    return kvm().create_vm(0, 1).create_vcpu(0)


def set_cr4(vcpu, cr4):
    data = sregs.pack(vcpu)
    KVM_SREGS.put(data, "cr4", cr4)
    return vcpu.ioctl(ioctls.KVM_SET_SREGS, data)


def give_cpuid(vcpu, *entries):
    data = len(entries).to_bytes(8, "little") + b"".join(entry.pack() for entry in entries)
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, bytearray(data))


@pytest.mark.parametrize("bit", [16, 18, 20, 21])
def test_feature_of_cr4_is_the_hosts_until_the_guests_cpuid_is_set(vcpu, bit):
    assert set_cr4(vcpu, 1 << bit) == 0
    set_cr4(vcpu, 0)
    give_cpuid(vcpu, cpuid.Entry(1))
    with pytest.raises(KvmError) as error:
        set_cr4(vcpu, 1 << bit)
    assert error.value.errno == EINVAL


@pytest.mark.parametrize("bit", [11, 12, 13, 14, 15, 17, 19, 22, 23, 24])
def test_feature_the_host_has_not(vcpu, bit):
    with pytest.raises(KvmError) as error:
        set_cr4(vcpu, 1 << bit)
    assert error.value.errno == EINVAL


def test_x2apic_needs_its_feature(vcpu):
    data = sregs.pack(vcpu)
    KVM_SREGS.put(data, "apic_base", 0xFEE00C00)
    with pytest.raises(KvmError):
        vcpu.ioctl(ioctls.KVM_SET_SREGS, data)
    give_cpuid(vcpu, cpuid.Entry(1, ecx=1 << 21))
    assert vcpu.ioctl(ioctls.KVM_SET_SREGS, data) == 0
    assert vcpu.apic_base == 0xFEE00C00


def test_pointers_of_pae_paging_read_back(vcpu):
    data = bytearray(320)
    vcpu.ioctl(ioctls.KVM_GET_SREGS2, data)
    for name, value in (("cr0", PE | PG), ("cr4", PAE), ("flags", 1)):
        KVM_SREGS2.put(data, name, value)
    KVM_SREGS2.put(data, "pdptrs", 0x3001, 2)
    vcpu.ioctl(ioctls.KVM_SET_SREGS2, data)
    again = bytearray(320)
    vcpu.ioctl(ioctls.KVM_GET_SREGS2, again)
    assert again == data


def test_init_sets_control_registers_back(vcpu):
    set_cr4(vcpu, 1 << 5)
    vcpu.init()
    assert sregs.of(vcpu).get("cr4") == 0


def test_boot_id_does_not_change_who_else_waits(kvm):
    vm = kvm().create_vm(0, 1)
    vm.create_irqchip()
    vm.ioctl(ioctls.KVM_SET_BOOT_CPU_ID, 2)
    assert [vm.create_vcpu(vcpu_id).mp_state for vcpu_id in range(3)] == [1, 1, 0]


GETTERS = [
    (ioctls.KVM_GET_REGS, 144),
    (ioctls.KVM_SET_REGS, 144),
    (ioctls.KVM_GET_SREGS, 312),
    (ioctls.KVM_GET_SREGS2, 320),
    (ioctls.KVM_GET_FPU, 416),
    (ioctls.KVM_GET_XSAVE, 4096),
    (ioctls.KVM_GET_XCRS, 392),
    (ioctls.KVM_GET_DEBUGREGS, 128),
    (ioctls.KVM_SET_SREGS, 312),
    (ioctls.KVM_SET_SREGS2, 320),
    (ioctls.KVM_SET_FPU, 416),
    (ioctls.KVM_SET_XSAVE, 4096),
    (ioctls.KVM_SET_XCRS, 392),
    (ioctls.KVM_SET_DEBUGREGS, 128),
]


@pytest.mark.parametrize(("request_number", "size_bytes"), GETTERS)
def test_encrypted_registers_are_user_spaces_no_more(kvm, request_number, size_bytes):
    vm = kvm(SEV_ES).create_vm(3, 1)
    vm.encrypt()
    vcpu = vm.create_vcpu(0)
    protected.protect(vcpu)
    with pytest.raises(KvmError) as error:
        vcpu.ioctl(request_number, bytearray(size_bytes))
    assert error.value.errno == EINVAL


def test_startup_message_starts_real_mode_code_at_its_page(kvm):
    vm = kvm().create_vm(0, 1)
    vm.create_irqchip()
    vcpu = vm.create_vcpu(1)
    events.of(vcpu).sipi_vector = 0x9A
    vcpu.set_mp_state(4)
    assert (vcpu.mp_state, vcpu.rip) == (0, 0)
    assert [sregs.of(vcpu).get(f"cs.{name}") for name in ("selector", "base")] == [0x9A00, 0x9A000]


@pytest.mark.parametrize("state", [2, 9])
def test_processor_that_was_reset_waits_inside_the_run_for_its_startup(kvm, state):
    vm = kvm().create_vm(0, 1)
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    vcpu.engine = Scripted([Hlt()], 1)
    vcpu.set_mp_state(state)
    assert isinstance(vcpu.kvm_run(0), Halted)
    vcpu.wake(0)
    assert vcpu.statistics().phase == "halted"
    vcpu.sipi(0)
    assert isinstance(vcpu.resume(0), InGuest)
