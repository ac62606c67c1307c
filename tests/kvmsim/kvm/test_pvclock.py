import pytest

from kvmsim.abi import ioctls
from kvmsim.abi import msrs as abi
from kvmsim.abi.irq import KVM_CLOCK_DATA
from kvmsim.engine.x86.memory import Memory, Slot
from kvmsim.kvm import clock, msrs, pvclock

MS, S = 1_000_000, 1_000_000_000
PAGE = 0x2000


@pytest.fixture
def ram():
    return bytearray(0x4000)


@pytest.fixture
def memory(ram):
    return Memory([Slot(0, memoryview(ram))])


@pytest.fixture
def vcpu(kvm):
    return kvm().create_vm(0, 1).create_vcpu(0)


def page(ram):
    return pvclock.TIME_INFO.unpack_from(ram, PAGE)


def told(ram, tsc):
    """The time a guest works out."""
    _version, stamp, system_ns, multiplier, shift, _flags = page(ram)
    delta = tsc - stamp
    delta = delta << shift if shift >= 0 else delta >> -shift
    return system_ns + (delta * multiplier >> 32)


def enable(vcpu, now_ns=0):
    assert msrs.guest_write(vcpu, abi.KVM_SYSTEM_TIME_NEW, PAGE | 1, now_ns)


@pytest.mark.parametrize("khz", [1_000, 999_999, 2_000_000, 3_700_000, 9_000_000])
def test_scale_turns_a_second_of_ticks_into_a_second(khz):
    multiplier, shift = pvclock.scale(khz)
    ticks = khz * 1000
    ticks = ticks << shift if shift >= 0 else ticks >> -shift
    assert abs((ticks * multiplier >> 32) - S) < 100


def test_guest_tells_the_time_of_the_vm(vcpu, memory, ram):
    clock.kvmclock_ns(vcpu.vm, 0)
    enable(vcpu)
    pvclock.enter(vcpu, memory, 5 * MS)
    assert abs(told(ram, clock.guest_tsc(vcpu, 9 * MS)) - 9 * MS) < 100


def test_page_is_not_touched_without_a_reason(vcpu, memory, ram):
    enable(vcpu)
    pvclock.enter(vcpu, memory, MS)
    before = bytes(ram)
    pvclock.enter(vcpu, memory, 2 * MS)
    assert bytes(ram) == before


def test_version_is_even_and_grows(vcpu, memory, ram):
    enable(vcpu)
    pvclock.enter(vcpu, memory, MS)
    first = page(ram)[0]
    clock.changed(vcpu.vm)
    pvclock.enter(vcpu, memory, MS)
    assert (first % 2, page(ram)[0]) == (0, first + 2)


def test_time_user_space_sets_is_told_at_the_next_entry(vcpu, memory, ram):
    enable(vcpu)
    pvclock.enter(vcpu, memory, MS)
    vcpu.vm.ioctl(ioctls.KVM_SET_CLOCK, KVM_CLOCK_DATA.pack(clock=180 * S), now_ns=2 * MS)
    pvclock.enter(vcpu, memory, 3 * MS)
    assert told(ram, clock.guest_tsc(vcpu, 3 * MS)) == 180 * S + MS


def test_pause_is_told_once(vcpu, memory, ram):
    enable(vcpu)
    vcpu.ioctl(ioctls.KVM_KVMCLOCK_CTRL)
    pvclock.enter(vcpu, memory, MS)
    assert page(ram)[5] & pvclock.GUEST_STOPPED
    clock.changed(vcpu.vm)
    pvclock.enter(vcpu, memory, MS)
    assert not page(ram)[5] & pvclock.GUEST_STOPPED


def test_disabled_clock_is_left_alone(vcpu, memory, ram):
    assert msrs.guest_write(vcpu, abi.KVM_SYSTEM_TIME, PAGE, 0)
    pvclock.enter(vcpu, memory, MS)
    assert not any(ram)


def test_address_without_memory_is_skipped(vcpu, memory, ram):
    assert msrs.guest_write(vcpu, abi.KVM_SYSTEM_TIME_NEW, 0x100000 | 1, 0)
    pvclock.enter(vcpu, memory, MS)
    assert not any(ram)


def test_both_numbers_are_one_register(vcpu):
    enable(vcpu)
    assert msrs.read(vcpu, abi.KVM_SYSTEM_TIME, 0) == PAGE | 1


def test_wall_clock_is_that_of_the_vms_beginning(vcpu, memory, ram):
    vcpu.vm.system.epoch_ns = 1_700_000_000 * S
    clock.kvmclock_ns(vcpu.vm, 3 * S)
    assert msrs.guest_write(vcpu, abi.KVM_WALL_CLOCK_NEW, PAGE, 0)
    pvclock.enter(vcpu, memory, 10 * S)
    assert pvclock.WALL_CLOCK.unpack_from(ram, PAGE) == (2, 1_700_000_003, 0)


def test_clock_set_with_the_time_of_day_goes_on_from_there(vcpu):
    vcpu.vm.system.epoch_ns = 1_700_000_000 * S
    data = KVM_CLOCK_DATA.pack(clock=S, flags=4, realtime=1_700_000_000 * S + S)
    vcpu.vm.ioctl(ioctls.KVM_SET_CLOCK, data, now_ns=3 * S)
    assert clock.kvmclock_ns(vcpu.vm, 3 * S) == 3 * S
    shown = bytearray(48)
    vcpu.vm.ioctl(ioctls.KVM_GET_CLOCK, shown, now_ns=3 * S)
    assert KVM_CLOCK_DATA.get(shown, "flags") & 4
    assert KVM_CLOCK_DATA.get(shown, "realtime") == 1_700_000_003 * S
