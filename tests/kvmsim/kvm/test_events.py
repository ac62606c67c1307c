import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.regs import KVM_VCPU_EVENTS
from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.kvm import debug, events
from kvmsim.kvm.vm import KvmEnableCap

PAYLOAD_CAP, TRIPLE_FAULT_CAP = 164, 218
DETECT = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'


@pytest.fixture
def vcpu(kvm):
    vcpu = kvm(DETECT).create_vm(0, 1).create_vcpu(0)
    vcpu.engine = Scripted([Hlt()], 100)
    return vcpu


def run(vcpu):
    blocked = vcpu.kvm_run(0)
    while blocked is not None:
        blocked = vcpu.resume(0)


def put(vcpu, **values):
    names = {name.replace("__", "."): value for name, value in values.items()}
    vcpu.ioctl(ioctls.KVM_SET_VCPU_EVENTS, KVM_VCPU_EVENTS.pack(**names))


def get(vcpu, *names):
    data = bytearray(64)
    vcpu.ioctl(ioctls.KVM_GET_VCPU_EVENTS, data)
    return [KVM_VCPU_EVENTS.get(data, name) for name in names]


def test_interrupt_is_delivered_at_the_next_entry(vcpu):
    vcpu.ioctl(ioctls.KVM_INTERRUPT, bytearray(b"\x55\0\0\0"))
    assert get(vcpu, "interrupt.injected", "interrupt.nr") == [1, 0x55]
    run(vcpu)
    assert get(vcpu, "interrupt.injected") == [0]
    assert events.of(vcpu).nr_interrupts == 1


def test_nmis_are_delivered_one_per_entry(vcpu):
    for _ in range(3):
        vcpu.ioctl(ioctls.KVM_NMI)
    left = []
    for _ in range(3):
        left += get(vcpu, "nmi.pending")
        run(vcpu)
    assert left == [2, 1, 0]


def test_pending_debug_exception_changes_dr6_when_it_is_delivered(vcpu):
    vcpu.vm.enable_cap(KvmEnableCap(PAYLOAD_CAP, (1,)))
    put(
        vcpu,
        flags=0x10,
        exception__pending=1,
        exception__nr=1,
        exception_has_payload=1,
        exception_payload=0x800,
    )
    assert debug.of(vcpu).dr6 == 0xFFFF0FF0
    run(vcpu)
    assert debug.of(vcpu).dr6 == 0xFFFF07F0
    assert get(vcpu, "exception.pending") == [0]


def test_pending_triple_fault_ends_the_run(vcpu):
    vcpu.vm.enable_cap(KvmEnableCap(TRIPLE_FAULT_CAP, (1,)))
    put(vcpu, flags=0x20, triple_fault__pending=1)
    run(vcpu)
    assert vcpu.run.exit_reason == Exit.SHUTDOWN
    run(vcpu)
    assert vcpu.run.exit_reason == Exit.HLT


@pytest.fixture
def locked(kvm):
    """A vCPU that left the guest with a bus lock #DB on its way."""

    def make(*, payload):
        vm = kvm(DETECT).create_vm(0, 1)
        vm.enable_cap(KvmEnableCap(193, (2,)))
        vm.enable_cap(KvmEnableCap(PAYLOAD_CAP, (int(payload),)))
        vcpu = vm.create_vcpu(0)
        vcpu.engine = Scripted([BusLock(cpl=3), Hlt()], 1)
        debug.of(vcpu).debugctl = 4
        run(vcpu)
        assert vcpu.run.exit_reason == Exit.X86_BUS_LOCK
        return vcpu

    return make


def test_bus_lock_exception_is_pending_with_its_payload(locked):
    vcpu = locked(payload=True)
    names = ("exception.pending", "exception.nr", "exception_has_payload", "exception_payload")
    assert get(vcpu, *names) == [1, 1, 1, 0x800]
    assert debug.of(vcpu).dr6 == 0xFFFF0FF0
    run(vcpu)
    assert debug.of(vcpu).dr6 == 0xFFFF07F0
    assert debug.of(vcpu).delivered == 1


def test_looking_at_the_exception_carries_it_out_without_the_capability(locked):
    vcpu = locked(payload=False)
    assert get(vcpu, "exception.injected", "exception_has_payload") == [1, 0]
    assert debug.of(vcpu).dr6 == 0xFFFF07F0
    run(vcpu)
    assert debug.of(vcpu).delivered == 1


def test_init_forgets_what_was_waiting(vcpu):
    vcpu.ioctl(ioctls.KVM_NMI)
    put(vcpu, flags=1, nmi__pending=1, exception__injected=1, exception__nr=13)
    vcpu.init()
    assert get(vcpu, "nmi.pending", "exception.injected") == [0, 0]
