from errno import E2BIG, EFAULT, EINVAL

import pytest

from kvmsim.abi import ioctls, msrs
from kvmsim.abi.memory import KVM_USERSPACE_MEMORY_REGION
from kvmsim.abi.structs import KVM_MSR_ENTRY, KVM_MSR_FILTER, KVM_MSR_FILTER_RANGE, KVM_MSRS

U64_MAX = (1 << 64) - 1


def table(*pairs):
    data = KVM_MSRS.pack(nmsrs=len(pairs))
    for index, value in pairs:
        data += KVM_MSR_ENTRY.pack(index=index, data=value)
    return data


@pytest.fixture
def get(world, vcpu):
    """Read a register: its value, or None."""

    def get_one(index):
        data = table((index, 0))
        done = world.ioctl(vcpu, ioctls.KVM_GET_MSRS, data)
        return KVM_MSR_ENTRY.get(data[8:], "data") if done == (1, 0) else None

    return get_one


@pytest.fixture
def put(world, vcpu):
    """Set a register: whether it was taken."""

    def put_one(index, value):
        return world.ioctl(vcpu, ioctls.KVM_SET_MSRS, table((index, value))) == (1, 0)

    return put_one


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (msrs.IA32_CR_PAT, 0x0007040600070406),
        (msrs.IA32_MISC_ENABLE, 1),
        (msrs.KVM_POLL_CONTROL, 1),
        (msrs.IA32_MCG_CTL, 0),
        (msrs.IA32_TSC_ADJUST, 0),
        (msrs.STAR, 0),
        (msrs.EFER, 0),
        (msrs.PLATFORM_INFO, 1 << 31),
        (msrs.MTRRCAP, 0x508),
        (msrs.MTRR_DEF_TYPE, 0),
        (msrs.IA32_APICBASE, 0xFEE00900),
        (msrs.IA32_MCG_CAP, 0x20),
        (0x400, 0),
        (0x47F, 0),
        (0x480, None),
    ],
)
def test_value_after_reset(get, index, value):
    assert get(index) == value


@pytest.mark.parametrize("index", [0x1C9, 0x680, 0x33, 0xCF, 0x12345678])
def test_row_94_registers_there_are_not(get, put, index):
    assert get(index) is None
    assert not put(index, 0)


def test_row_96_pmu_capabilities_without_a_pmu(get, put):
    assert get(0x345) == 0
    assert [put(0x345, 0), put(0x345, 5)] == [True, False]


@pytest.mark.parametrize(
    ("index", "good", "bad"),
    [
        (msrs.IA32_CR_PAT, 0x0606060606060606, None),
        (msrs.LSTAR, 0xFFFF800000000000, 1 << 48),
        (msrs.CSTAR, 0x7FFFFFFFFFFF, 1 << 63),
        (msrs.KERNEL_GS_BASE, 0xFFFFFFFF80000000, 0x800000000000),
        (msrs.FS_BASE, 0x7FFF00000000, 1 << 60),
        (msrs.GS_BASE, 0x7FFF00000000, 1 << 60),
        (msrs.STAR, U64_MAX, None),
        (msrs.SYSCALL_MASK, 0x47700, None),
        (msrs.IA32_SYSENTER_CS, 0x10, None),
        (msrs.KVM_POLL_CONTROL, 0, 2),
        (msrs.KVM_STEAL_TIME, 0x1000 | 1, 0x1002),
        (msrs.KVM_SYSTEM_TIME_NEW, 0x2001, None),
        (msrs.KVM_WALL_CLOCK_NEW, 0x3000, None),
        (msrs.KVM_ASYNC_PF_EN, 0, 0x4001),
        (msrs.MTRR_DEF_TYPE, 0xC06, 0x1000),
        (msrs.MTRR_DEF_TYPE, 0x806, 0x807),
        (0x250, 0x0606060606060606, 0x0202020202020202),
        (0x200, 0x80000006, 0x80000002),
        (0x201, 0xF80000800, 0x1),
        (msrs.IA32_MCG_STATUS, 5, None),
        (msrs.IA32_MCG_CTL, 0, 1),
        (0x400, U64_MAX, 5),
        (0x401, 1 << 63, None),
        (msrs.MISC_FEATURES_ENABLES, 1, None),
        (msrs.SMI_COUNT, 7, None),
        (msrs.AMD_HWCR, 1 << 24, 1 << 0),
        (msrs.IA32_MISC_ENABLE, 1 | 1 << 11, None),
        (msrs.IA32_MCG_CAP, None, 0x10),
        (msrs.MTRRCAP, None, 0),
    ],
)
def test_values_a_register_takes(get, put, index, good, bad):
    if good is not None:
        assert put(index, good)
        assert get(index) == good
    if bad is not None:
        before = get(index)
        assert not put(index, bad)
        assert get(index) == before


@pytest.mark.parametrize("bit", [3, 6, 8])
def test_bits_of_hwcr_that_are_dropped(get, put, bit):
    assert put(msrs.AMD_HWCR, 1 << bit)
    assert get(msrs.AMD_HWCR) == 0


def test_efer_keeps_long_mode_active_out(get, put):
    assert put(msrs.EFER, 0x100)
    assert get(msrs.EFER) == 0x100
    assert not put(msrs.EFER, 1 << 40)


def test_row_97_stops_at_the_first_unknown(world, vcpu):
    data = table((msrs.STAR, 0), (0x12345678, 0), (msrs.STAR, 0))
    assert world.ioctl(vcpu, ioctls.KVM_GET_MSRS, data) == (1, 0)
    assert world.ioctl(vcpu, ioctls.KVM_SET_MSRS, data) == (1, 0)


@pytest.mark.parametrize("request_number", [ioctls.KVM_GET_MSRS, ioctls.KVM_SET_MSRS])
@pytest.mark.parametrize(("count", "expected"), [(0, (0, 0)), (255, (255, 0)), (256, (-1, E2BIG))])
def test_row_98_length_of_the_table(world, vcpu, request_number, count, expected):
    data = table(*[(msrs.STAR, 0)] * count)
    assert world.ioctl(vcpu, request_number, data) == expected
    assert world.ioctl(vcpu, request_number, 0) == (-1, EFAULT)


def test_row_99_system_knows_features_only(world):
    assert world.ioctl(world.system, ioctls.KVM_GET_MSRS, table((0x12345678, 0))) == (0, 0)
    data = table((msrs.IA32_UCODE_REV, 0), (msrs.PLATFORM_INFO, 0))
    assert world.ioctl(world.system, ioctls.KVM_GET_MSRS, data) == (2, 0)


def index_list(world, request_number, room):
    data = bytearray(room.to_bytes(4, "little") + bytes(4 * room))
    answer = world.ioctl(world.system, request_number, data)
    count = int.from_bytes(data[:4], "little")
    present = [
        int.from_bytes(data[4 + 4 * n : 8 + 4 * n], "little") for n in range(min(room, count))
    ]
    return answer, count, present


@pytest.mark.parametrize(
    "request_number", [ioctls.KVM_GET_MSR_INDEX_LIST, ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST]
)
def test_row_100_list_that_does_not_fit_says_how_long_it_is(world, request_number):
    answer, count, _ = index_list(world, request_number, 0)
    assert answer == (-1, E2BIG)
    assert index_list(world, request_number, count)[:2] == ((0, 0), count)
    assert world.ioctl(world.system, request_number, 0) == (-1, EFAULT)


def test_row_100_what_the_list_has(world):
    _, _, present = index_list(world, ioctls.KVM_GET_MSR_INDEX_LIST, 200)
    assert {0x1D9, 0x345, 0x10, 0x174, 0xC0000081, 0x4B564D01} <= set(present)
    assert not {0x1C9, 0x33} & set(present)


def test_adjustment_of_the_counter_is_the_guests_only_with_its_feature(get, put):
    assert put(msrs.IA32_TSC_ADJUST, 0x1234)
    assert get(msrs.IA32_TSC_ADJUST) == 0


def test_vector_of_async_page_faults_needs_an_apic(put):
    assert [put(msrs.KVM_ASYNC_PF_INT, 0), put(msrs.KVM_ASYNC_PF_EN, 0)] == [False, True]


@pytest.fixture
def with_apic(world, vm):
    assert world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP) == (0, 0)


@pytest.mark.usefixtures("with_apic")
def test_every_listed_register_can_be_saved_and_restored(world, get, put):
    _, _, present = index_list(world, ioctls.KVM_GET_MSR_INDEX_LIST, 200)
    values = {index: get(index) for index in present}
    assert [index for index, value in values.items() if value is None] == []
    assert [hex(index) for index, value in values.items() if not put(index, value)] == []


def test_every_feature_can_be_read(world):
    _, count, present = index_list(world, ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST, 50)
    data = table(*[(index, 0) for index in present])
    assert world.ioctl(world.system, ioctls.KVM_GET_MSRS, data) == (count, 0)


def test_machine_checks_are_enabled_by_setting_them_up(world, vcpu, get):
    capabilities = bytearray((10 | 1 << 8 | 1 << 24).to_bytes(8, "little"))
    assert world.ioctl(vcpu, ioctls.KVM_X86_SETUP_MCE, capabilities) == (0, 0)
    wanted = [10 | 1 << 8 | 1 << 24, U64_MAX, U64_MAX, None]
    assert [get(index) for index in (0x179, 0x17B, 0x400 + 4 * 9, 0x400 + 4 * 10)] == wanted


@pytest.mark.parametrize("capabilities", [0, 33, 10 | 1 << 40])
def test_machine_checks_that_cannot_be(world, vcpu, capabilities):
    data = bytearray(capabilities.to_bytes(8, "little"))
    assert world.ioctl(vcpu, ioctls.KVM_X86_SETUP_MCE, data) == (-1, EINVAL)


def test_error_is_recorded_in_its_bank(world, vcpu, get):
    world.ioctl(vcpu, ioctls.KVM_X86_SETUP_MCE, bytearray((10 | 1 << 8).to_bytes(8, "little")))
    report = bytearray(
        (1 << 63 | 5).to_bytes(8, "little") + (0x1000).to_bytes(8, "little") + bytes(48)
    )
    report[32] = 3
    assert world.ioctl(vcpu, ioctls.KVM_X86_SET_MCE, report) == (0, 0)
    assert [get(0x400 + 4 * 3 + register) for register in (1, 2)] == [1 << 63 | 5, 0x1000]
    report[32] = 10
    assert world.ioctl(vcpu, ioctls.KVM_X86_SET_MCE, report) == (-1, EINVAL)
    report[32], report[7] = 3, 0
    assert world.ioctl(vcpu, ioctls.KVM_X86_SET_MCE, report) == (-1, EINVAL)


def msr_filter(default=0, **values):
    data = KVM_MSR_FILTER.pack(flags=default)
    data[8 : 8 + 24] = KVM_MSR_FILTER_RANGE.pack(**values)
    return data


@pytest.mark.parametrize(
    ("default", "values", "errno"),
    [
        (0, {}, 0),
        (1, {}, EINVAL),
        (2, {}, EINVAL),
        (0, {"nmsrs": 8, "flags": 0}, EINVAL),
        (0, {"nmsrs": 8, "flags": 4}, EINVAL),
        (0, {"nmsrs": 0x600 * 8 + 1, "flags": 3}, EINVAL),
        (0, {"nmsrs": 8, "flags": 3, "bitmap": 8}, EFAULT),
    ],
)
def test_filter(world, vm, default, values, errno):
    expected = (-1, errno) if errno else (0, 0)
    assert world.ioctl(vm, ioctls.KVM_X86_SET_MSR_FILTER, msr_filter(default, **values)) == expected


def test_filter_that_denies_all_but_some(world, vm):
    address, _ = world.pages(1)
    data = msr_filter(1, nmsrs=8, flags=3, base=0x174, bitmap=address)
    assert world.ioctl(vm, ioctls.KVM_X86_SET_MSR_FILTER, data) == (0, 0)


@pytest.mark.parametrize("index", msrs.READ_ONLY)
def test_register_of_an_old_processor_is_a_constant(get, put, index):
    assert get(index) == msrs.READ_ONLY[index]
    assert not put(index, 0)


@pytest.mark.parametrize("index", msrs.WRITES_IGNORED)
def test_writes_to_some_have_no_effect(get, put, index):
    assert put(index, 1)
    assert get(index) == msrs.WRITES_IGNORED[index]


@pytest.mark.parametrize("index", msrs.WRITE_ONLY)
def test_microcode_update_cannot_be_read(get, put, index):
    assert put(index, 0)
    assert get(index) is None


def test_addresses_kvm_writes_to_are_in_memory(world, vm, put):
    assert not put(msrs.KVM_PV_EOI_EN, 0x1001)
    assert put(msrs.KVM_PV_EOI_EN, 0x1000)
    assert not put(msrs.KVM_PV_EOI_EN, 0x1002)
    hva, _ = world.pages(16)
    region = KVM_USERSPACE_MEMORY_REGION.pack(memory_size=16 * 4096, userspace_addr=hva)
    world.ioctl(vm, ioctls.KVM_SET_USER_MEMORY_REGION, region)
    assert put(msrs.KVM_PV_EOI_EN, 0x1001)


@pytest.mark.parametrize(("index", "good", "bad"), [(0x10A, 0, 1), (0xC0000103, 5, 1 << 32)])
def test_values_without_a_cpuid(get, put, index, good, bad):
    assert put(index, good)
    assert not put(index, bad)
    assert get(index) == good
