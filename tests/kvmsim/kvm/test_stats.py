from struct import unpack_from

from kvmsim.abi import ioctls
from kvmsim.engine.base import BusLock, Hlt, Io
from kvmsim.kvm.client import LocalClient


def values(file):
    content = file.content()
    count, _, desc, data = unpack_from("<IIII", content, 8)
    got = {}
    for at in range(desc, desc + 64 * count, 64):
        (offset,) = unpack_from("<I", content, at + 8)
        name = content[at + 16 : at + 64].rstrip(b"\0").decode()
        (got[name],) = unpack_from("<Q", content, data + offset)
    return got


def test_counters_of_a_vcpu_follow_its_exits(guest):
    vcpu = guest([BusLock(), Io(port=1, data=b"a"), Io(port=1, data=b"b"), Hlt()])
    file = vcpu.ioctl(ioctls.KVM_GET_STATS_FD)
    for _ in range(4):
        blocked = vcpu.kvm_run(0)
        while blocked is not None:
            blocked = vcpu.resume(0)
    got = {name: value for name, value in values(file).items() if value}
    assert got == {
        "exits": 4,
        "io_exits": 2,
        "halt_exits": 1,
        "bus_lock_exits": 1,
        "bus_locks": 1,
    }
    assert file.link_name == "kvm-vcpu-stats:0"


def test_file_is_named_after_the_creator(kvm):
    vm = kvm().create_vm(0, LocalClient(1234))
    vcpu = vm.create_vcpu(3)
    names = [
        file.ioctl(ioctls.KVM_GET_STATS_FD).content()[24:72].rstrip(b"\0") for file in (vm, vcpu)
    ]
    assert names == [b"kvm-1234", b"kvm-1234/vcpu-3"]


def test_file_keeps_its_vm_alive(kvm):
    system = kvm()
    vm = system.create_vm(0, 1)
    vcpu = vm.create_vcpu(0)
    files = [file.ioctl(ioctls.KVM_GET_STATS_FD) for file in (vm, vcpu)]
    vm.release()
    vcpu.release()
    left = [system.statistics().vms]
    for file in files:
        file.release()
        file.release()
        left.append(system.statistics().vms)
    assert left == [1, 1, 0]


def test_end_of_the_owner_closes_the_file_too(kvm):
    system = kvm()
    vm = system.create_vm(0, 1)
    file = vm.ioctl(ioctls.KVM_GET_STATS_FD)
    vm.close()
    assert system.statistics().vms == 0
    assert sum(values(file).values()) == 0
