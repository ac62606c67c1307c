"""IA32_DEBUGCTL: the table of kvm.md B.2, for guests and user space."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2, KVM_CPUID_ENTRY2
from kvmsim.kvm import cpuid, debugctl

PID = 4194304
DEBUGCTL = 0x1D9
PLAIN = 'vendor = "intel"\n'
DETECT = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
LBR = 'vendor = "intel"\nmodel = 106\nrtm = true\n[pmu]\n'
FIRST_SERIES = LBR + "[quirks]\nlbr_first_series = true\n"
AMD = 'vendor = "amd"\n'
LBRV = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\n'
NEWER_LBRV = LBRV + "[quirks]\namd_debugctl_drops_bits = false\n"


@pytest.fixture
def make(kvm):
    """Make a vCPU that has what its host has, or nothing."""

    def make(toml, *, exposed=True):
        vm = kvm(toml).create_vm(0, PID)
        vcpu = vm.create_vcpu(0)
        table = b"".join(entry.pack() for entry in cpuid.supported(vm.machine))
        if not exposed:
            table = bytes(KVM_CPUID_ENTRY2.pack(function=1))
        nent = len(table) // KVM_CPUID_ENTRY2.size_bytes
        vcpu.ioctl(ioctls.KVM_SET_CPUID2, KVM_CPUID2.pack(nent=nent) + table)
        return vcpu

    return make


def set_msrs(vcpu, *values):
    data = bytearray(8) + b"".join(
        DEBUGCTL.to_bytes(8, "little") + value.to_bytes(8, "little") for value in values
    )
    data[0] = len(values)
    return vcpu.ioctl(ioctls.KVM_SET_MSRS, data)


def guest_write(vcpu, value):
    """What the guest reads back; None: #GP."""
    accepted = debugctl.write(vcpu, value, host_initiated=False)
    return debugctl.read(vcpu) if accepted else None


@pytest.mark.parametrize(
    ("toml", "bit", "exposed", "hidden"),
    [
        (LBR, 0, 1, 0),
        (LBR, 1, 0, 0),
        (DETECT, 0, 0, 0),
        (DETECT, 2, 4, None),
        (LBR, 2, None, None),
        (LBR, 11, 1 << 11, None),
        (LBR, 15, 1 << 15, None),
        (DETECT, 11, None, None),
        (DETECT, 15, None, None),
        *((LBR, bit, None, None) for bit in (3, 6, 10, 12, 13, 14, 16, 63)),
        *((DETECT, bit, None, None) for bit in (3, 6, 10, 12, 13, 14, 16, 63)),
    ],
)
def test_t_b_2_guest_write_of_debugctl(make, toml, bit, exposed, hidden):
    assert guest_write(make(toml), 1 << bit) == exposed
    assert guest_write(make(toml, exposed=False), 1 << bit) == hidden


def test_t_b_2_host_write_needs_the_host_only(make):
    assert set_msrs(make(DETECT, exposed=False), 4) == 1
    assert set_msrs(make(LBR, exposed=False), 1 | 1 << 11 | 1 << 15) == 1
    assert set_msrs(make(PLAIN, exposed=False), 4) == 0
    assert set_msrs(make(PLAIN, exposed=False), 1 << 11) == 0


def test_t_b_2_refused_entry_ends_the_list_and_changes_nothing(make):
    vcpu = make(DETECT)
    assert set_msrs(vcpu, 4, 8, 0) == 1
    assert debugctl.read(vcpu) == 4


def test_a_refused_write_of_the_guest_changes_nothing(make):
    vcpu = make(LBR)
    assert guest_write(vcpu, 1 | 1 << 11) == 1 | 1 << 11
    assert guest_write(vcpu, 1 << 3) is None
    assert debugctl.read(vcpu) == 1 | 1 << 11


def test_btf_beside_lbr_is_dropped_alone(make):
    assert guest_write(make(LBR), 3) == 1


@pytest.mark.parametrize(("exposed", "kept"), [(True, 1), (False, None)])
def test_the_first_series_refuses_lbr_to_guests_without(make, exposed, kept):
    assert guest_write(make(FIRST_SERIES, exposed=exposed), 1) == kept


def test_t_b_2_amd_ignores_every_write(make):
    vcpu = make(AMD)
    assert set_msrs(vcpu, 1 << 63) == 1
    assert debugctl.read(vcpu) == 0


@pytest.mark.parametrize(
    ("toml", "bit", "kept"),
    [
        (LBRV, 0, 1),
        *((LBRV, bit, 0) for bit in (1, 2, 3, 4, 5)),
        *((LBRV, bit, None) for bit in (6, 11, 63)),
        (NEWER_LBRV, 0, 1),
        (NEWER_LBRV, 1, 0),
        *((NEWER_LBRV, bit, None) for bit in (2, 3, 4, 5, 6, 63)),
    ],
)
def test_amd_with_lbr_virtualization(make, toml, bit, kept):
    assert guest_write(make(toml), 1 << bit) == kept
