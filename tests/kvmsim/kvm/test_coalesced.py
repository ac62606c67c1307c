from struct import unpack_from

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.memory import KVM_COALESCED_MMIO_MAX, KVM_COALESCED_MMIO_ZONE
from kvmsim.engine.base import Hlt, Io, Mmio
from kvmsim.engine.scripted import Scripted

RING = 8192


@pytest.fixture
def run(kvm):
    """Play stops up to the first exit, with zones registered."""

    def run_to_exit(stops, *zones, times=1, ring=None):
        vm = kvm().create_vm(0, 1)
        for address, size, pio in zones:
            data = KVM_COALESCED_MMIO_ZONE.pack(addr=address, size=size, pio=pio)
            vm.ioctl(ioctls.KVM_REGISTER_COALESCED_MMIO, data)
        vcpu = vm.create_vcpu(0)
        vcpu.engine = Scripted([*stops, Hlt()], times)
        if ring is not None:
            vcpu.run.memory[RING : RING + 8] = ring
        blocked = vcpu.kvm_run(0)
        while blocked is not None:
            blocked = vcpu.resume(0)
        return vcpu

    return run_to_exit


def entries(vcpu):
    first, last = unpack_from("<II", vcpu.run.memory, RING)
    return [
        unpack_from("<QII8s", vcpu.run.memory, RING + 8 + 24 * index)
        for index in range(first, last)
    ]


def test_writes_to_a_zone_are_collected_in_order(run):
    stops = [Mmio(gpa=0x1000, data=b"\1\2"), Mmio(gpa=0x1FFC, data=b"\3\4\5\6")]
    vcpu = run(stops, (0x1000, 0x1000, 0))
    assert vcpu.run.exit_reason == Exit.HLT
    assert entries(vcpu) == [
        (0x1000, 2, 0, b"\1\2" + bytes(6)),
        (0x1FFC, 4, 0, b"\3\4\5\6" + bytes(4)),
    ]


@pytest.mark.parametrize(
    "stop",
    [
        Mmio(gpa=0x0FFF, data=b"\1"),
        Mmio(gpa=0x1FFE, data=b"\1\2\3\4"),
        Mmio(gpa=0x1000, size=4),
        Io(port=0x1000, data=b"\1"),
    ],
)
def test_access_that_is_not_a_write_inside_the_zone_is_an_exit(run, stop):
    vcpu = run([stop], (0x1000, 0x1000, 0))
    assert vcpu.run.exit_reason in {Exit.MMIO, Exit.IO}
    assert entries(vcpu) == []


def test_every_element_of_a_string_goes_to_a_port_zone(run):
    vcpu = run([Io(port=0x80, size=2, data=b"abcd")], (0x80, 4, 1))
    assert vcpu.run.exit_reason == Exit.HLT
    assert entries(vcpu) == [(0x80, 2, 1, b"ab" + bytes(6)), (0x80, 2, 1, b"cd" + bytes(6))]


def test_full_ring_is_an_exit(run):
    ring = (1).to_bytes(4, "little") + bytes(4)
    vcpu = run([Mmio(gpa=0, data=b"\1")], (0, 8, 0), ring=ring)
    assert vcpu.run.exit_reason == Exit.MMIO


def test_ring_wraps(run):
    last = KVM_COALESCED_MMIO_MAX - 1
    vcpu = run([Mmio(gpa=0, data=b"\1")], (0, 8, 0), ring=last.to_bytes(4, "little") * 2)
    assert unpack_from("<II", vcpu.run.memory, RING) == (last, 0)
    assert vcpu.run.exit_reason == Exit.HLT


def test_ring_a_client_wrote_nonsense_into_is_an_exit(run):
    vcpu = run([Mmio(gpa=0, data=b"\1")], (0, 8, 0), ring=b"\xff" * 8)
    assert vcpu.run.exit_reason == Exit.MMIO


def test_zone_taken_back_is_an_exit_again(run, kvm):
    vm = kvm().create_vm(0, 1)
    zone = KVM_COALESCED_MMIO_ZONE.pack(addr=0x1000, size=16)
    other = KVM_COALESCED_MMIO_ZONE.pack(addr=0x1000, size=16, pio=1)
    for data in (zone, other):
        vm.ioctl(ioctls.KVM_REGISTER_COALESCED_MMIO, data)
    wider = KVM_COALESCED_MMIO_ZONE.pack(addr=0, size=0x10000)
    vm.ioctl(ioctls.KVM_UNREGISTER_COALESCED_MMIO, wider)
    assert vm.coalesced_zones == ((0x1000, 16, 1),)
