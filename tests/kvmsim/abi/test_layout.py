import struct

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.arguments import ARGUMENTS
from kvmsim.abi.layout import Field, Layout
from kvmsim.abi.run import KVM_RUN_PAGE
from kvmsim.abi.sev import KVM_SEV_CMD, KVM_SEV_INIT_STRUCT
from kvmsim.abi.structs import KVM_CPUID_ENTRY2, KVM_ENABLE_CAP, KVM_REGS

PAIR = Layout("pair", 16, {"low": Field(0, "u32"), "words": Field(4, "u16", 3)})


def test_pack_puts_members_at_their_offsets_and_zeroes_the_rest():
    assert PAIR.pack(low=0x01020304) == bytes([4, 3, 2, 1]) + bytes(12)


def test_get_and_put_reach_an_array_element():
    data = PAIR.pack()
    PAIR.put(data, "words", 0xBEEF, index=2)
    assert data[8:10] == b"\xef\xbe"
    assert PAIR.get(data, "words", index=2) == 0xBEEF


def test_put_refuses_a_value_that_does_not_fit():
    with pytest.raises(struct.error):
        PAIR.put(PAIR.pack(), "words", 1 << 16)


@pytest.mark.parametrize(
    ("layout", "size_bytes"),
    [
        (KVM_RUN_PAGE, 2352),
        (KVM_ENABLE_CAP, 104),
        (KVM_REGS, 144),
        (KVM_CPUID_ENTRY2, 40),
        (KVM_SEV_CMD, 24),
        (KVM_SEV_INIT_STRUCT, 48),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else str(value),
)
def test_structure_has_the_size_of_the_specification(layout, size_bytes):
    assert layout.size_bytes == size_bytes


def test_kvm_run_members_are_where_the_specification_says():
    offsets = {name: field.offset for name, field in KVM_RUN_PAGE.fields.items()}
    assert offsets == {
        "request_interrupt_window": 0,
        "immediate_exit": 1,
        "exit_reason": 8,
        "ready_for_interrupt_injection": 12,
        "if_flag": 13,
        "flags": 14,
        "cr8": 16,
        "apic_base": 24,
        "kvm_valid_regs": 288,
        "kvm_dirty_regs": 296,
    }


@pytest.mark.parametrize("table", [ioctls.SYSTEM, ioctls.VM, ioctls.VCPU])
def test_requests_of_one_kind_are_distinct_and_of_kvms_type(table):
    assert len(set(table.values())) == len(table)
    assert {number >> 8 & 0xFF for number in table.values()} == {ioctls.KVMIO}


def test_size_field_of_a_request_is_the_size_of_its_structure():
    assert KVM_ENABLE_CAP.size_bytes == ioctls.KVM_ENABLE_CAP >> 16 & 0x3FFF
    assert KVM_REGS.size_bytes == ioctls.KVM_GET_REGS >> 16 & 0x3FFF


@pytest.mark.parametrize(
    ("request_number", "layout"),
    [
        pytest.param(number, layout, id=f"{number:#x}")
        for number, layout in ARGUMENTS.items()
        # kvm.h says "void *" and "u64" there, and a plain _IO.
        if number not in {ioctls.KVM_MEMORY_ENCRYPT_OP, ioctls.KVM_REINJECT_CONTROL}
    ],
)
def test_argument_of_a_request_is_as_large_as_the_request_says(request_number, layout):
    assert ioctls.argument_bytes(request_number) == layout.size_bytes
