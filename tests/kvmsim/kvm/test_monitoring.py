"""Overflow of a counter: status, freeze of the records, interrupt."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2
from kvmsim.kvm import cpuid, debugctl, lapic, monitoring, msrs

PID = 4194304
ICE_LAKE = 'vendor = "intel"\nfamily = 6\nmodel = 106\n[pmu]\n'
SELECT_0, FIXED_CTRL, STATUS, CTRL = 0x186, 0x38D, 0x38E, 0x38F
ON = 1 << 22 | 1 << 20
VECTOR = 0x51


@pytest.fixture
def make(kvm):
    def make(*, irqchip=True):
        vm = kvm(ICE_LAKE).create_vm(0, PID)
        if irqchip:
            vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        entries = cpuid.supported(vm.machine)
        data = KVM_CPUID2.pack(nent=len(entries)) + b"".join(e.pack() for e in entries)
        vcpu.ioctl(ioctls.KVM_SET_CPUID2, data)
        if irqchip:
            apic = lapic.of(vcpu)
            apic.put(lapic.SPIV, 0x1FF)
            apic.put(lapic.LVTPC, VECTOR)
        assert debugctl.write(vcpu, 1 | 1 << 11, host_initiated=True)
        return vcpu

    return make


def write(vcpu, **values):
    for name, value in values.items():
        assert msrs.write(vcpu, globals()[name], value, 0)


def requested(vcpu):
    return lapic.of(vcpu).waiting()


def test_an_overflow_sets_its_status_freezes_the_records_and_interrupts(make):
    vcpu = make()
    write(vcpu, SELECT_0=ON, CTRL=1)
    assert monitoring.overflow(vcpu, 0, 0)
    assert msrs.read(vcpu, STATUS, 0) == 1
    assert debugctl.read(vcpu) == 1 << 11
    assert requested(vcpu) == VECTOR


def test_a_fixed_counter_interrupts_by_its_own_bits(make):
    vcpu = make()
    write(vcpu, FIXED_CTRL=0xB0, CTRL=1 << 33)
    assert monitoring.overflow(vcpu, 33, 0)
    assert not monitoring.overflow(vcpu, 32, 0)
    assert msrs.read(vcpu, STATUS, 0) == 3 << 32


@pytest.mark.parametrize(
    "values", [{"SELECT_0": 1 << 22, "CTRL": 1}, {"SELECT_0": ON, "CTRL": 2}, {"CTRL": 1}]
)
def test_a_counter_that_is_off_or_silent_only_sets_its_status(make, values):
    vcpu = make()
    write(vcpu, **values)
    assert not monitoring.overflow(vcpu, 0, 0)
    assert (msrs.read(vcpu, STATUS, 0), debugctl.read(vcpu)) == (1, 1 | 1 << 11)


def test_a_counter_that_is_not_there_does_nothing(make):
    vcpu = make()
    assert not monitoring.overflow(vcpu, 8, 0)
    assert msrs.read(vcpu, STATUS, 0) == 0


def test_t_e_6_without_an_in_kernel_apic_nothing_freezes(make):
    vcpu = make(irqchip=False)
    write(vcpu, SELECT_0=ON, CTRL=1)
    assert not monitoring.overflow(vcpu, 0, 0)
    assert debugctl.read(vcpu) == 1 | 1 << 11
