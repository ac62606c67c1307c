"""Last-branch records of a guest: who has them, and whose the hardware is (kvm.md E.3, E.4)."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.structs import KVM_CPUID2, KVM_CPUID_ENTRY2
from kvmsim.engine.base import Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.engine.synthetic import parse_guest
from kvmsim.engine.x86.decode import Branch
from kvmsim.kvm import cpuid, debugctl, lbr, msrs, pmu
from kvmsim.kvm.lbr import State
from kvmsim.sim.streams import Stream

PID = 4194304
SELECT, TOS, FROM, TO, INFO = 0x1C8, 0x1C9, 0x680, 0x6C0, 0xDC0
DEBUGCTL, CAPABILITIES = 0x1D9, 0x345
ICE_LAKE = 'vendor = "intel"\nfamily = 6\nmodel = 106\n[pmu]\n'
QUIRK = "[quirks]\n{} = true\n"


def table(machine, **changes):
    """The CPUID a machine offers; ``leaf_1_eax`` and the like replace registers."""
    entries = []
    for entry in cpuid.supported(machine):
        data = entry.pack()
        for name, value in changes.items():
            _, leaf, register = name.split("_")
            if KVM_CPUID_ENTRY2.get(data, "function") == int(leaf):
                data = bytearray(data)
                KVM_CPUID_ENTRY2.put(data, register, value)
        entries.append(bytes(data))
    return KVM_CPUID2.pack(nent=len(entries)) + b"".join(entries)


@pytest.fixture
def make(kvm):
    def make(toml=ICE_LAKE, **changes):
        vm = kvm(toml).create_vm(0, PID)
        vcpu = vm.create_vcpu(0)
        vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(vm.machine, **changes))
        vcpu.engine = Scripted([Hlt()], 100)
        return vcpu

    return make


def get(vcpu, index):
    """What user space reads; None: refused."""
    data = bytearray(24)
    data[0] = 1
    data[8:12] = index.to_bytes(4, "little")
    if not vcpu.ioctl(ioctls.KVM_GET_MSRS, data):
        return None
    return int.from_bytes(data[16:24], "little")


def put(vcpu, index, value):
    """Whether user space could write it."""
    data = bytearray(8) + index.to_bytes(8, "little") + value.to_bytes(8, "little")
    data[0] = 1
    return bool(vcpu.ioctl(ioctls.KVM_SET_MSRS, data))


def enter(vcpu):
    """One KVM_RUN."""
    blocked = vcpu.kvm_run(0)
    while blocked is not None:
        blocked = vcpu.resume(0)


def facility(vcpu):
    return vcpu.vm.machine.lbr_facility


def record(vcpu, source, target):
    lbr.recording(vcpu).branch(source, target, Branch.JUMP)


# -- T-E-1: access matrix per state ----------------------------------------


@pytest.mark.parametrize("index", [SELECT, TOS, FROM, FROM + 31, TO, TO + 31, INFO, INFO + 31])
def test_t_e_1_the_first_access_makes_the_event_and_is_done(make, index):
    for access in (get, lambda vcpu, index: put(vcpu, index, 5)):
        vcpu = make()
        assert lbr.of(vcpu).state is State.NONE
        assert access(vcpu, index) in {0, True}
        assert lbr.of(vcpu).state is State.ACTIVE


@pytest.mark.parametrize("host_initiated", [True, False])
def test_t_e_1_debugctl_makes_the_event(make, host_initiated):
    vcpu = make()
    assert debugctl.write(vcpu, 1, host_initiated=host_initiated)
    assert lbr.of(vcpu).state is State.ACTIVE


def test_t_e_1_reads_and_writes_reach_the_records_of_an_active_event(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    assert msrs.guest_read(vcpu, TOS, 0) == 7
    assert msrs.guest_write(vcpu, FROM + 3, 0x1234, 0)
    assert get(vcpu, FROM + 3) == 0x1234


def test_t_e_1_a_lost_event_reads_zero_and_ignores_writes(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    facility(vcpu).take()
    assert lbr.of(vcpu).state is State.LOST
    assert msrs.guest_read(vcpu, TOS, 0) == 0
    assert msrs.guest_write(vcpu, TOS, 3, 0)
    assert get(vcpu, TOS) == 0


def test_t_e_1_an_event_made_while_the_facility_is_taken_is_lost(make):
    vcpu = make()
    facility(vcpu).take()
    assert get(vcpu, TOS) == 0
    assert lbr.of(vcpu).state is State.LOST


@pytest.mark.parametrize("index", [0x40, 0x60, FROM + 32, INFO + 32, 0x14CE, 0x1200])
def test_t_e_1_registers_of_other_processors_are_refused(make, index):
    vcpu = make()
    assert get(vcpu, index) is None
    assert msrs.guest_read(vcpu, index, 0) is None
    assert not put(vcpu, index, 0)


@pytest.mark.parametrize("index", [SELECT, TOS, FROM, TO, INFO])
def test_t_e_1_without_records_every_access_is_refused(make, index):
    for toml in ('vendor = "intel"\nmodel = 106\n', 'vendor = "amd"\n'):
        vcpu = make(toml)
        assert get(vcpu, index) is None
        assert not put(vcpu, index, 0)
        assert msrs.guest_read(vcpu, index, 0) is None
        assert not msrs.guest_write(vcpu, index, 0, 0)


@pytest.mark.parametrize(("index", "value"), [(SELECT, 0x400), (TOS, 32), (FROM, 1 << 47)])
def test_values_that_cannot_be_are_refused_while_active_and_ignored_when_lost(make, index, value):
    vcpu = make()
    assert not msrs.guest_write(vcpu, index, value, 0)
    facility(vcpu).take()
    assert msrs.guest_write(vcpu, index, value, 0)


def test_records_are_not_in_the_index_list(kvm):
    system = kvm(ICE_LAKE)
    data = bytearray(4 + 4 * 500)
    data[0:4] = (500).to_bytes(4, "little")
    system.ioctl(ioctls.KVM_GET_MSR_INDEX_LIST, data)
    count = int.from_bytes(data[:4], "little")
    listed = {int.from_bytes(data[at : at + 4], "little") for at in range(4, 4 + 4 * count, 4)}
    assert listed & {DEBUGCTL, CAPABILITIES, 0x38F, 0x186} == {DEBUGCTL, CAPABILITIES, 0x38F, 0x186}
    assert not listed & {SELECT, TOS, FROM, TO, INFO}


# -- T-E-4: another user of the host comes ----------------------------------------


def test_t_e_4_after_the_facility_is_taken_the_records_read_as_zero(make):
    vcpu = make()
    assert put(vcpu, DEBUGCTL, 1)
    enter(vcpu)
    record(vcpu, 0x1000, 0x2000)
    assert get(vcpu, FROM + 1) == 0x1000
    facility(vcpu).take()
    enter(vcpu)
    assert lbr.recording(vcpu) is None
    assert [get(vcpu, index) for index in (TOS, FROM + 1, TO + 1, SELECT)] == [0, 0, 0, 0]


def test_t_e_4_a_lost_event_stays_lost_when_the_facility_is_given_back(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    facility(vcpu).take()
    facility(vcpu).release()
    assert get(vcpu, TOS) == 0
    lbr.scheduled_out(vcpu)
    assert lbr.of(vcpu).state is State.NONE
    assert put(vcpu, TOS, 3)
    assert get(vcpu, TOS) == 3


def test_the_kernel_warns_once_of_a_guest_that_lost_the_facility(make):
    vcpu = make()
    assert put(vcpu, DEBUGCTL, 1)
    facility(vcpu).take()
    enter(vcpu)
    enter(vcpu)
    assert list(facility(vcpu).log) == ["kvm_intel: vcpu-0: fail to passthrough LBR."]


def test_a_guest_without_code_records_its_branches(make):
    vcpu = make()
    vcpu.engine = parse_guest("mixed io=100 branches=50000").engine(Stream(1))
    assert put(vcpu, DEBUGCTL, 1)
    enter(vcpu)
    assert all(get(vcpu, FROM + at) for at in range(32))
    facility(vcpu).take()
    enter(vcpu)
    assert get(vcpu, FROM) == 0


def test_taking_twice_is_taking_once(make):
    vcpu = make()
    facility(vcpu).take()
    facility(vcpu).release()
    assert put(vcpu, TOS, 3)
    facility(vcpu).release()
    assert get(vcpu, TOS) == 3


# -- T-E-5: lazy release ----------------------------------------


def test_t_e_5_a_stopped_guest_that_used_its_records_keeps_them_for_one_time_out(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    lbr.scheduled_out(vcpu)
    assert lbr.of(vcpu).state is State.ACTIVE
    assert lbr.of(vcpu).records.tos == 7
    lbr.scheduled_out(vcpu)
    assert lbr.of(vcpu).state is State.NONE
    assert get(vcpu, TOS) == 0


def test_t_e_5_with_6_12_a_stopped_guest_loses_its_records_at_once(make):
    vcpu = make(ICE_LAKE + QUIRK.format("lbr_release_ignores_use"))
    assert put(vcpu, TOS, 7)
    lbr.scheduled_out(vcpu)
    assert lbr.of(vcpu).state is State.NONE
    assert get(vcpu, TOS) == 0


@pytest.mark.parametrize("quirk", ["", QUIRK.format("lbr_release_ignores_use")])
def test_t_e_5_while_debugctl_has_lbr_nothing_is_released(make, quirk):
    vcpu = make(ICE_LAKE + quirk)
    assert put(vcpu, DEBUGCTL, 1)
    assert put(vcpu, TOS, 7)
    for _ in range(3):
        lbr.scheduled_out(vcpu)
    assert get(vcpu, TOS) == 7


def test_t_e_5_access_that_is_passed_through_is_not_seen_as_use(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    enter(vcpu)
    lbr.scheduled_out(vcpu)
    assert msrs.guest_read(vcpu, TOS, 0) == 7
    lbr.scheduled_out(vcpu)
    assert lbr.of(vcpu).state is State.NONE


def test_a_halt_within_kvm_is_a_time_out(kvm):
    vm = kvm(ICE_LAKE + QUIRK.format("lbr_release_ignores_use")).create_vm(0, PID)
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(vm.machine))
    vcpu.engine = Scripted([Hlt()])
    assert put(vcpu, TOS, 7)
    vcpu.kvm_run(0)
    vcpu.resume(0)
    assert lbr.of(vcpu).state is State.NONE


def test_reset_releases_the_event(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    vcpu.init()
    assert lbr.of(vcpu).state is State.NONE
    assert get(vcpu, TOS) == 0


# -- T-E-6: freeze on PMI ----------------------------------------


@pytest.mark.parametrize(("version", "left"), [(1, 1), (2, 0), (3, 0), (4, 1), (5, 1)])
def test_t_e_6_a_pmi_freezes_with_versions_2_and_3(make, version, left):
    vcpu = make(leaf_10_eax=0x07300800 | version)
    assert put(vcpu, DEBUGCTL, 1 | 1 << 11)
    lbr.freeze_on_pmi(vcpu)
    assert get(vcpu, DEBUGCTL) == left | 1 << 11
    enter(vcpu)
    assert (lbr.recording(vcpu) is None) == (not left)


def test_t_e_6_without_the_freeze_bit_a_pmi_changes_nothing(make):
    vcpu = make()
    assert put(vcpu, DEBUGCTL, 1)
    lbr.freeze_on_pmi(vcpu)
    assert get(vcpu, DEBUGCTL) == 1


def test_t_e_6_without_records_a_pmi_changes_nothing(make):
    vcpu = make(leaf_1_ecx=0)
    assert put(vcpu, DEBUGCTL, 1 | 1 << 11)
    lbr.freeze_on_pmi(vcpu)
    assert get(vcpu, DEBUGCTL) == 1 | 1 << 11


# -- T-E-8: model mismatch, and other reasons to have none ----------------------------------------


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({}, True),
        ({"leaf_1_eax": cpuid.signature(6, 85, 4)}, False),
        ({"leaf_1_eax": cpuid.signature(6, 106, 0)}, True),
        ({"leaf_1_eax": cpuid.signature(15, 106, 4)}, True),
        ({"leaf_1_ecx": 0}, False),
        ({"leaf_10_eax": 0}, False),
        ({"leaf_10_eax": 0x07300801}, True),
    ],
)
def test_t_e_8_which_guest_has_records(make, changes, has):
    vcpu = make(**changes)
    assert (lbr.available(vcpu) is not None) == has
    assert put(vcpu, TOS, 7) == has


def test_without_a_format_in_0x345_there_are_no_records(make):
    vcpu = make()
    assert put(vcpu, CAPABILITIES, 1 << 13)
    assert not put(vcpu, TOS, 7)


def test_the_first_series_needs_version_2(make):
    first = ICE_LAKE + QUIRK.format("lbr_first_series")
    assert lbr.available(make(first, leaf_10_eax=0x07300801)) is None
    assert lbr.available(make(first)) is not None


def test_the_first_series_clears_the_format_of_another_model_silently(make):
    first = ICE_LAKE + QUIRK.format("lbr_first_series")
    vcpu = make(first, leaf_1_eax=cpuid.signature(6, 85, 4))
    assert get(vcpu, CAPABILITIES) == 1 << 13
    assert put(vcpu, CAPABILITIES, 0x2005)
    assert get(vcpu, CAPABILITIES) == 1 << 13


@pytest.mark.parametrize(
    ("model", "quirk", "format_of"),
    [
        (106, "", 5),
        (63, "", 4),
        (26, "", 0),
        (26, QUIRK.format("lbr_first_series"), 3),
        (143, "", 0),
        (143, QUIRK.format("lbr_first_series"), 0),
    ],
)
def test_which_format_a_host_shows(make, model, quirk, format_of):
    vcpu = make(f'vendor = "intel"\nfamily = 6\nmodel = {model}\n[pmu]\n{quirk}')
    assert pmu.supported_capabilities(vcpu.vm.machine) == 1 << 13 | format_of
    assert (lbr.available(vcpu) is not None) == bool(format_of)


def test_an_older_processor_has_fewer_records_at_its_own_place(make):
    vcpu = make('vendor = "intel"\nfamily = 6\nmodel = 63\n[pmu]\n')
    assert put(vcpu, FROM + 15, 5)
    assert not put(vcpu, FROM + 16, 5)
    assert not put(vcpu, INFO, 5)


def test_the_first_series_gives_core_2_its_four(make):
    first = f'vendor = "intel"\nfamily = 6\nmodel = 23\n[pmu]\n{QUIRK.format("lbr_first_series")}'
    vcpu = make(first)
    assert put(vcpu, 0x43, 5)
    assert put(vcpu, 0x63, 5)
    assert not put(vcpu, 0x44, 5)
    assert not put(vcpu, FROM, 5)


def test_setting_cpuid_again_takes_the_event_away(make):
    vcpu = make()
    assert put(vcpu, TOS, 7)
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, table(vcpu.vm.machine))
    assert lbr.of(vcpu).state is State.NONE
