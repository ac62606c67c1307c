from errno import EFAULT, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.regs import (
    KVM_FPU,
    KVM_SREGS,
    KVM_SREGS2,
    KVM_TRANSLATION,
    KVM_XCRS,
    SEGMENTS,
)
from kvmsim.abi.structs import KVM_CPUID2, KVM_REGS

DONE, INVALID = (0, 0), (-1, EINVAL)
PE, PG, NW = 1, 1 << 31, 1 << 29
PAE = 1 << 5
LME, LMA = 1 << 8, 1 << 10


@pytest.fixture
def get(world, vcpu):
    def get_state(request_number, size_bytes):
        data = bytearray(size_bytes)
        assert world.ioctl(vcpu, request_number, data) == DONE
        return data

    return get_state


@pytest.fixture
def sregs(get):
    return get(ioctls.KVM_GET_SREGS, 312)


@pytest.fixture
def set_sregs(world, vcpu, sregs):
    def set_some(**values):
        for name, value in values.items():
            KVM_SREGS.put(sregs, name, value)
        return world.ioctl(vcpu, ioctls.KVM_SET_SREGS, sregs)

    return set_some


def test_row_71_segments_and_control_registers_after_reset(sregs):
    read = KVM_SREGS.get
    assert [read(sregs, f"cs.{name}") for name in ("selector", "base")] == [0xF000, 0xFFFF0000]
    assert [read(sregs, f"{name}.limit") for name in SEGMENTS] == [0xFFFF] * 8
    assert [read(sregs, f"{name}.present") for name in SEGMENTS] == [1] * 8
    assert [read(sregs, name) for name in ("gdt.limit", "idt.limit")] == [0xFFFF] * 2
    names = ("cr0", "cr3", "cr4", "cr8", "efer", "apic_base")
    assert [read(sregs, name) for name in names] == [0x60000010, 0, 0, 0, 0, 0xFEE00900]


def test_whole_structure_after_reset_is_the_kernels(sregs):
    # Types and attribute bits of all segments, and every byte of padding.
    data = bytes.fromhex("0000ffff00000000ffff000000f00b01000001000000000000000000")[:24]
    assert bytes(sregs[:24]) == data
    assert bytes(sregs[24:48]).hex() == "0000000000000000ffff0000000003010000010000000000"


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"cr4": 1 << 40}, id="row 110 CR4"),
        pytest.param({"efer": LMA}, id="row 110 LMA"),
        pytest.param({"cr0": PE | PG, "efer": LME | LMA}, id="row 110 no PAE"),
        pytest.param({"cr0": PE | PG, "efer": LME, "cr4": PAE}, id="LME without LMA"),
        pytest.param({"cr0": 1 << 32}, id="CR0 wide"),
        pytest.param({"cr0": PE | NW}, id="NW without CD"),
        pytest.param({"cr0": PG}, id="PG without PE"),
        pytest.param({"cs.l": 1}, id="64-bit code outside long mode"),
        pytest.param({"apic_base": 1 << 10}, id="x2APIC without APIC"),
        pytest.param({"apic_base": 0xFEE00901}, id="APIC base reserved"),
        pytest.param({"apic_base": 1 << 60}, id="APIC base too high"),
    ],
)
def test_special_registers_that_do_not_go_together(get, set_sregs, values):
    before = get(ioctls.KVM_GET_SREGS, 312)
    assert set_sregs(**values) == INVALID
    assert get(ioctls.KVM_GET_SREGS, 312) == before


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="as they are"),
        pytest.param(
            {"cr0": PE | PG | 0x10, "cr4": PAE | 0x200, "efer": 0xD00, "cs.l": 1}, id="long mode"
        ),
        pytest.param({"cr0": 0, "cr4": 0x6FF}, id="old CR4 features"),
        pytest.param({"apic_base": 0xFEE00000}, id="APIC off"),
        pytest.param({"efer": 1 << 40}, id="EFER is not looked at"),
        pytest.param({"cr2": 0x1234, "cr3": 0x5000, "cr8": 5}, id="others"),
        pytest.param({"fs.base": 0x7FFF12345000, "gs.base": 0xFFFF800000000000}, id="bases"),
    ],
)
def test_special_registers_read_back(get, set_sregs, values):
    assert set_sregs(**values) == DONE
    data = get(ioctls.KVM_GET_SREGS, 312)
    assert {name: KVM_SREGS.get(data, name) for name in values} == values


def test_pending_interrupt_is_in_the_bitmap(world, vcpu, get):
    world.ioctl(vcpu, ioctls.KVM_INTERRUPT, bytearray(b"\x45\0\0\0"))
    data = get(ioctls.KVM_GET_SREGS, 312)
    assert [KVM_SREGS.get(data, "interrupt_bitmap", index) for index in range(4)] == [
        0,
        1 << 5,
        0,
        0,
    ]


@pytest.mark.parametrize("request_number", [ioctls.KVM_GET_SREGS, ioctls.KVM_SET_SREGS])
def test_null_special_registers(world, vcpu, request_number):
    assert world.ioctl(vcpu, request_number, 0) == (-1, EFAULT)


def test_second_form_has_the_same_registers(world, vcpu, get, sregs):
    data = get(ioctls.KVM_GET_SREGS2, 320)
    assert data[:280] == sregs[:280]
    assert data[280:] == bytes(40)
    assert world.ioctl(vcpu, ioctls.KVM_SET_SREGS2, data) == DONE


@pytest.mark.parametrize("flags", [1, 2])
def test_flags_of_the_second_form(world, vcpu, get, flags):
    data = get(ioctls.KVM_GET_SREGS2, 320)
    KVM_SREGS2.put(data, "flags", flags)
    assert world.ioctl(vcpu, ioctls.KVM_SET_SREGS2, data) == INVALID


def test_registers_read_back_with_the_bit_that_is_always_one(world, vcpu, get):
    data = KVM_REGS.pack(rax=1, r15=1 << 63, rip=0xFFFF800012345678, rflags=0x200)
    assert world.ioctl(vcpu, ioctls.KVM_SET_REGS, data) == DONE
    KVM_REGS.put(data, "rflags", 0x202)
    assert get(ioctls.KVM_GET_REGS, 144) == data


def test_floating_point_registers(world, vcpu, get):
    data = get(ioctls.KVM_GET_FPU, 416)
    assert KVM_FPU.get(data, "fcw") == 0x37F
    data[0:10] = bytes(range(10))
    data[152:168] = bytes(range(16))
    KVM_FPU.put(data, "fsw", 0x3800)
    KVM_FPU.put(data, "ftwx", 0x80)
    KVM_FPU.put(data, "last_ip", 0x1234)
    assert world.ioctl(vcpu, ioctls.KVM_SET_FPU, data) == DONE
    again = get(ioctls.KVM_GET_FPU, 416)
    assert again[:152] == data[:152]
    assert again[152:408] == data[152:408]


def test_vector_state_after_reset(get):
    area = get(ioctls.KVM_GET_XSAVE, 4096)
    assert int.from_bytes(area[0:2], "little") == 0x37F
    assert int.from_bytes(area[24:28], "little") == 0x1F80
    assert area == get(ioctls.KVM_GET_XSAVE2, 4096)


def test_vector_state_reads_back(world, vcpu, get):
    area = get(ioctls.KVM_GET_XSAVE, 4096)
    area[160:176] = bytes(range(16))
    area[512:520] = (3).to_bytes(8, "little")
    assert world.ioctl(vcpu, ioctls.KVM_SET_XSAVE, area) == DONE
    again = get(ioctls.KVM_GET_XSAVE, 4096)
    assert again[160:176] == area[160:176]
    assert again[512:520] == area[512:520]
    assert get(ioctls.KVM_GET_FPU, 416)[152:168] == bytes(range(16))


def test_vector_state_the_guest_does_not_know_is_kept_but_not_shown(world, vcpu, get):
    area = get(ioctls.KVM_GET_XSAVE, 4096)
    area[512] = 7
    area[576:592] = bytes(range(16, 32))
    assert world.ioctl(vcpu, ioctls.KVM_SET_XSAVE, area) == DONE
    again = get(ioctls.KVM_GET_XSAVE, 4096)
    assert (again[512], again[576:592]) == (3, bytes(16))
    table = KVM_CPUID2.pack(nent=256) + bytes(40 * 256)
    world.ioctl(world.system, ioctls.KVM_GET_SUPPORTED_CPUID, table)
    assert world.ioctl(vcpu, ioctls.KVM_SET_CPUID2, table) == DONE
    again = get(ioctls.KVM_GET_XSAVE, 4096)
    assert (again[512], again[576:592]) == (7, area[576:592])


@pytest.mark.parametrize(
    ("offset", "value"), [(512, 1 << 62), (520, 1), (528, 1), (24, 0xFFFFFFFF)]
)
def test_vector_state_that_is_none(world, vcpu, get, offset, value):
    area = get(ioctls.KVM_GET_XSAVE, 4096)
    area[512] = 3
    area[offset : offset + 8] = value.to_bytes(8, "little")
    assert world.ioctl(vcpu, ioctls.KVM_SET_XSAVE, area) == INVALID


def test_extended_control_register_after_reset(get):
    data = get(ioctls.KVM_GET_XCRS, 392)
    assert [KVM_XCRS.get(data, name) for name in ("nr_xcrs", "flags")] == [1, 0]
    assert KVM_XCRS.get(data, "xcrs", 1) == 1


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ({"nr_xcrs": 1}, 1, DONE),
        ({"nr_xcrs": 1}, 0, INVALID),
        ({"nr_xcrs": 1}, 5, INVALID),
        ({"nr_xcrs": 1}, 1 << 62 | 1, INVALID),
        ({"nr_xcrs": 17}, 1, INVALID),
        ({"nr_xcrs": 1, "flags": 1}, 1, INVALID),
        ({"nr_xcrs": 0}, 0, DONE),
    ],
)
def test_extended_control_registers(world, vcpu, header, value, expected):
    data = KVM_XCRS.pack(**header)
    KVM_XCRS.put(data, "xcrs", value, 1)
    assert world.ioctl(vcpu, ioctls.KVM_SET_XCRS, data) == expected


def test_row_117_address_without_paging(world, vcpu):
    data = KVM_TRANSLATION.pack(linear_address=0x1000)
    assert world.ioctl(vcpu, ioctls.KVM_TRANSLATE, data) == DONE
    names = ("physical_address", "valid", "writeable", "usermode")
    assert [KVM_TRANSLATION.get(data, name) for name in names] == [0x1000, 1, 1, 0]


def test_rows_67_and_71_state_is_runnable(world, vcpu, get):
    assert get(ioctls.KVM_GET_MP_STATE, 4) == bytes(4)


@pytest.mark.parametrize("length", [0, 4, 16])
def test_row_105_signal_mask(world, vcpu, length):
    data = bytearray(length.to_bytes(4, "little") + bytes(16))
    assert world.ioctl(vcpu, ioctls.KVM_SET_SIGNAL_MASK, data) == INVALID
    data[0] = 8
    assert world.ioctl(vcpu, ioctls.KVM_SET_SIGNAL_MASK, data) == DONE
    assert world.ioctl(vcpu, ioctls.KVM_SET_SIGNAL_MASK, 0) == DONE


def test_control_of_sse_is_not_among_the_floating_point_registers(world, vcpu, get):
    data = get(ioctls.KVM_GET_FPU, 416)
    assert KVM_FPU.get(data, "mxcsr") == 0
    KVM_FPU.put(data, "mxcsr", 0x1FBF)
    assert world.ioctl(vcpu, ioctls.KVM_SET_FPU, data) == DONE
    assert get(ioctls.KVM_GET_XSAVE, 4096)[24:28] == (0x1F80).to_bytes(4, "little")


@pytest.mark.parametrize(("changes", "state"), [({}, 0), ({"cr0": 0x60000011}, 3)])
def test_registers_after_reset_end_a_halt_of_the_boot_processor(world, vm, changes, state):
    world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP)
    vcpu = world.make(vm, ioctls.KVM_CREATE_VCPU)
    world.ioctl(vcpu, ioctls.KVM_SET_MP_STATE, bytearray([3, 0, 0, 0]))
    data = bytearray(312)
    world.ioctl(vcpu, ioctls.KVM_GET_SREGS, data)
    for name, value in changes.items():
        KVM_SREGS.put(data, name, value)
    assert world.ioctl(vcpu, ioctls.KVM_SET_SREGS, data) == DONE
    world.ioctl(vcpu, ioctls.KVM_GET_MP_STATE, data)
    assert data[0] == state
