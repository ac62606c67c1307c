from errno import EFAULT, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.regs import KVM_VCPU_EVENTS
from kvmsim.abi.structs import KVM_DEBUGREGS, KVM_ENABLE_CAP, KVM_GUEST_DEBUG

DONE, INVALID = (0, 0), (-1, EINVAL)
PAYLOAD, TRIPLE_FAULT = 0x10, 0x20


@pytest.fixture
def enable(world, vm):
    def enable_one(number, value=1):
        data = KVM_ENABLE_CAP.pack(cap=number, args=value)
        assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, data) == DONE

    return enable_one


@pytest.fixture
def get(world, vcpu):
    def get_events(*names):
        data = bytearray(64)
        assert world.ioctl(vcpu, ioctls.KVM_GET_VCPU_EVENTS, data) == DONE
        return [KVM_VCPU_EVENTS.get(data, name) for name in names]

    return get_events


@pytest.fixture
def put(world, vcpu):
    def put_events(**values):
        names = {name.replace("__", "."): value for name, value in values.items()}
        return world.ioctl(vcpu, ioctls.KVM_SET_VCPU_EVENTS, KVM_VCPU_EVENTS.pack(**names))

    return put_events


def test_row_108_flags(get, put):
    assert get("flags") == [0xD]
    assert put(flags=1 << 31) == INVALID


def test_null_events(world, vcpu):
    assert world.ioctl(vcpu, ioctls.KVM_GET_VCPU_EVENTS, 0) == (-1, EFAULT)
    assert world.ioctl(vcpu, ioctls.KVM_SET_VCPU_EVENTS, 0) == (-1, EFAULT)


@pytest.mark.parametrize("flags", [PAYLOAD, TRIPLE_FAULT])
def test_flags_of_capabilities_that_are_off(put, flags):
    assert put(flags=flags) == INVALID


def test_flags_of_capabilities_that_are_on(enable, get, put):
    enable(164)
    enable(218)
    assert get("flags") == [0xD | PAYLOAD | TRIPLE_FAULT]
    assert put(flags=PAYLOAD | TRIPLE_FAULT) == DONE


@pytest.mark.parametrize(
    ("vector", "expected"), [(13, DONE), (31, DONE), (32, INVALID), (2, INVALID)]
)
def test_vector_of_an_exception(put, vector, expected):
    assert put(exception__injected=1, exception__nr=vector) == expected


def test_injected_exception_reads_back(get, put):
    put(
        exception__injected=1,
        exception__nr=13,
        exception__has_error_code=1,
        exception__error_code=0x18,
    )
    names = ("injected", "pending", "nr", "has_error_code", "error_code")
    assert get(*(f"exception.{name}" for name in names)) == [1, 0, 13, 1, 0x18]


def test_pending_exception_is_nothing_without_its_capability(get, put):
    assert put(exception__pending=1, exception__nr=13) == DONE
    assert get("exception.injected", "exception.pending") == [0, 0]


def test_pending_exception_reads_back_with_its_capability(enable, get, put):
    enable(164)
    put(
        flags=PAYLOAD,
        exception__pending=1,
        exception__injected=1,
        exception__nr=1,
        exception_has_payload=1,
        exception_payload=0x4000,
    )
    names = ("exception.injected", "exception.pending", "exception.nr")
    assert get(*names, "exception_has_payload", "exception_payload") == [0, 1, 1, 1, 0x4000]


def test_payload_of_an_injected_exception_is_dropped(enable, get, put):
    enable(164)
    put(flags=PAYLOAD, exception__injected=1, exception__nr=1, exception_has_payload=1)
    assert get("exception.injected", "exception_has_payload") == [1, 0]


def test_pending_debug_exception_changes_dr6_only_on_delivery(world, vcpu, enable, put):
    enable(164)
    put(
        flags=PAYLOAD,
        exception__pending=1,
        exception__nr=1,
        exception_has_payload=1,
        exception_payload=0x4000,
    )
    data = bytearray(128)
    world.ioctl(vcpu, ioctls.KVM_GET_DEBUGREGS, data)
    assert KVM_DEBUGREGS.get(data, "dr6") == 0xFFFF0FF0


def test_reading_debug_registers_delivers_without_the_capability(world, vcpu, enable, put, get):
    enable(164)
    put(
        flags=PAYLOAD,
        exception__pending=1,
        exception__nr=1,
        exception_has_payload=1,
        exception_payload=0x4000,
    )
    enable(164, 0)
    assert get("exception.injected", "exception.pending", "exception_has_payload") == [1, 1, 0]
    data = bytearray(128)
    world.ioctl(vcpu, ioctls.KVM_GET_DEBUGREGS, data)
    assert KVM_DEBUGREGS.get(data, "dr6") == 0xFFFF4FF0


def test_interrupt_and_nmi_read_back(get, put):
    put(flags=1, interrupt__injected=1, interrupt__nr=0x55, nmi__injected=1, nmi__pending=1)
    names = ("interrupt.injected", "interrupt.nr", "nmi.injected", "nmi.pending")
    assert get(*names) == [1, 0x55, 1, 1]


def test_pending_nmi_stays_without_its_flag(get, put):
    put(flags=1, nmi__pending=1)
    put(flags=0)
    assert get("nmi.pending") == [1]


def test_triple_fault_reads_back(enable, get, put):
    enable(218)
    put(flags=TRIPLE_FAULT, triple_fault__pending=1)
    assert get("triple_fault.pending") == [1]
    put(flags=TRIPLE_FAULT)
    assert get("triple_fault.pending") == [0]


@pytest.mark.parametrize("name", ["smi__smm", "smi__pending", "smi__smm_inside_nmi"])
def test_system_management_mode_there_is_none(put, name):
    assert put(flags=8, **{name: 1}) == INVALID


def test_exception_injected_by_a_debugger_is_pending(world, vcpu, get):
    inject = KVM_GUEST_DEBUG.pack(control=0x1 | 0x40000)
    assert world.ioctl(vcpu, ioctls.KVM_SET_GUEST_DEBUG, inject) == DONE
    assert get("exception.injected", "exception.pending", "exception.nr") == [1, 1, 1]


def test_numbers_of_what_is_not_on_its_way_read_back_too(get, put):
    put(
        exception__nr=0xA2,
        exception__has_error_code=1,
        exception__error_code=7,
        exception_payload=0x4000,
        interrupt__nr=0x38,
    )
    names = ("exception.nr", "exception.has_error_code", "exception.error_code")
    assert get(*names, "exception_payload", "interrupt.nr") == [0xA2, 1, 7, 0x4000, 0x38]


def test_soft_interrupt_is_not_shown(get, put):
    put(interrupt__injected=1, interrupt__nr=0x80, interrupt__soft=1)
    assert get("interrupt.injected", "interrupt.nr") == [0, 0x80]


@pytest.mark.parametrize("handling", ["nmi__masked", "nmi__injected"])
def test_one_nmi_waits_while_another_is_handled(get, put, handling):
    put(flags=1, nmi__pending=2)
    assert get("nmi.pending") == [2]
    put(flags=1, nmi__pending=2, **{handling: 1})
    assert get("nmi.pending") == [1]


@pytest.mark.parametrize(("flags", "last"), [(8, {"smi__smm": 1}), (TRIPLE_FAULT, {})])
def test_what_is_looked_at_last_is_refused_when_the_rest_is_done(get, put, flags, last):
    assert put(flags=flags, exception__injected=1, exception__nr=13, **last) == INVALID
    assert get("exception.injected", "exception.nr") == [1, 13]


def test_setting_registers_forgets_a_pending_exception(world, vcpu, enable, get, put):
    enable(164)
    put(flags=PAYLOAD, exception__pending=1, exception__nr=13)
    registers = bytearray(144)
    world.ioctl(vcpu, ioctls.KVM_GET_REGS, registers)
    world.ioctl(vcpu, ioctls.KVM_SET_REGS, registers)
    assert get("exception.pending", "exception.nr") == [0, 13]
