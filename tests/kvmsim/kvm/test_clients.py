"""What programs do to get a VM going, in their order: each call must be answered as they expect."""

from errno import E2BIG, EINTR

import pytest

from kvmsim.abi import ioctls, irq, memory, regs
from kvmsim.abi.structs import KVM_CPUID2, KVM_ENABLE_CAP, KVM_MSR_ENTRY, KVM_MSRS, KVM_REGS
from kvmsim.engine.base import Hlt, Io
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient

MACHINES = {
    "amd": 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n',
    "sev": 'vendor = "amd"\n[sev]\nmax-asid = 509\nmin-sev-asid = 100\n',
    "intel": 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n',
}
MIB = 1 << 20


@pytest.fixture(params=MACHINES)
def system(request, kvm):
    return kvm(MACHINES[request.param])


@pytest.fixture
def client():
    return LocalClient(1)


@pytest.fixture
def call(client):
    def make_call(file, request_number, arg=0):
        return file.ioctl(request_number, arg, client)

    return make_call


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


def supported(call, system, room):
    data = KVM_CPUID2.pack(nent=room) + bytes(40 * room)
    assert call(system, ioctls.KVM_GET_SUPPORTED_CPUID, data) == 0
    return data[: 8 + 40 * KVM_CPUID2.get(data, "nent")]


def at_xsave_size(cpuid):
    """Where the second byte of leaf 0xD's EBX is: 832 bytes become 576."""
    entries = range(8, len(cpuid), 40)
    return next(at for at in entries if cpuid[at : at + 8] == b"\x0d" + bytes(7)) + 16 + 1


def region(**values):
    return memory.KVM_USERSPACE_MEMORY_REGION2.pack(**values)


def long_mode(sregs):
    """What the selftests' library sets."""
    for name, bits in (("cr0", 1 | 1 << 5 | 1 << 31), ("cr4", 1 << 5 | 1 << 9), ("efer", 0xD00)):
        regs.KVM_SREGS.put(sregs, name, regs.KVM_SREGS.get(sregs, name) | bits)
    regs.KVM_SREGS.put(sregs, "cs.l", 1)
    regs.KVM_SREGS.put(sregs, "cr3", 0x3000)


def test_selftests_library_gets_a_vm_with_one_vcpu(system, client, call):
    cpuid = supported(call, system, 100)
    for cap in (66, 66, 136, 231, 61):
        assert call(system, ioctls.KVM_CHECK_EXTENSION, cap) > 0
    vm = call(system, ioctls.KVM_CREATE_VM)
    ram = client.map(bytearray(4 * MIB))
    slot = region(memory_size=4 * MIB, userspace_addr=ram)
    assert call(vm, ioctls.KVM_SET_USER_MEMORY_REGION2, slot) == 0
    assert call(vm, ioctls.KVM_CREATE_IRQCHIP) == 0
    assert call(vm, ioctls.KVM_GET_TSC_KHZ) > 0
    vcpu = call(vm, ioctls.KVM_CREATE_VCPU, 0)
    assert call(system, ioctls.KVM_GET_VCPU_MMAP_SIZE) == 12288
    assert call(vcpu, ioctls.KVM_SET_CPUID2, cpuid) == 0
    again = bytearray(len(cpuid))
    again[:8] = cpuid[:8]
    assert call(vcpu, ioctls.KVM_GET_CPUID2, again) == 0
    # The size of the XSAVE area is that of what XCR0 has on.
    assert [at for at, byte in enumerate(again) if byte != cpuid[at]] == [at_xsave_size(cpuid)]
    sregs, general = bytearray(312), bytearray(144)
    assert call(vcpu, ioctls.KVM_GET_SREGS, sregs) == 0
    long_mode(sregs)
    assert call(vcpu, ioctls.KVM_SET_SREGS, sregs) == 0
    assert call(vcpu, ioctls.KVM_GET_REGS, general) == 0
    KVM_REGS.put(general, "rip", 0x400000)
    assert call(vcpu, ioctls.KVM_SET_REGS, general) == 0
    assert call(vcpu, ioctls.KVM_SET_MP_STATE, bytearray(4)) == 0
    vcpu.engine = Scripted([Io(port=0x1000, size=1)], 1)
    call(vcpu, ioctls.KVM_RUN)
    assert vcpu.resume(0) is None
    vcpu.run.immediate_exit = 1
    assert errno_of(call, vcpu, ioctls.KVM_RUN) == EINTR
    slot = region(userspace_addr=ram)
    assert call(vm, ioctls.KVM_SET_USER_MEMORY_REGION2, slot) == 0


QEMU_NEEDS = (3, 4, 7, 14, 21, 25, 30, 31, 136)


def msr_table(*indices):
    data = KVM_MSRS.pack(nmsrs=len(indices))
    for index in indices:
        data += KVM_MSR_ENTRY.pack(index=index)
    return data


def qemu_system(call, system):
    """What QEMU asks of /dev/kvm; the registers to save."""
    assert call(system, ioctls.KVM_GET_API_VERSION) == 12
    for cap in QEMU_NEEDS:
        assert call(system, ioctls.KVM_CHECK_EXTENSION, cap) > 0
    empty = bytearray(4)
    assert errno_of(call, system, ioctls.KVM_GET_MSR_INDEX_LIST, empty) == E2BIG
    data = empty + bytes(4 * empty[0])
    assert call(system, ioctls.KVM_GET_MSR_INDEX_LIST, data) == 0
    return [int.from_bytes(data[at : at + 4], "little") for at in range(4, len(data), 4)]


@pytest.mark.parametrize("irqchip", [True, False])
def test_qemu_gets_a_pc(system, client, call, irqchip):
    listed = qemu_system(call, system)
    vm = call(system, ioctls.KVM_CREATE_VM)
    identity = client.map(bytearray((0xFEFFC000).to_bytes(8, "little")))
    assert call(vm, ioctls.KVM_SET_IDENTITY_MAP_ADDR, identity) == 0
    assert call(vm, ioctls.KVM_SET_TSS_ADDR, 0xFEFFD000) == 0
    for cap, value in ((164, 1), (188, 1), (143, 2), (193, 2)):
        enable = KVM_ENABLE_CAP.pack(cap=cap, args=value)
        assert call(vm, ioctls.KVM_ENABLE_CAP, enable) == 0
    if irqchip:
        assert call(vm, ioctls.KVM_CREATE_IRQCHIP) == 0
        assert call(vm, ioctls.KVM_CREATE_PIT2, bytearray(64)) == 0
        assert call(vm, ioctls.KVM_SET_GSI_ROUTING, irq.KVM_IRQ_ROUTING.pack()) == 0
    notify = irq.KVM_IOEVENTFD.pack(fd=client.open(None), addr=0xFFFF, len=2, flags=3)
    assert call(vm, ioctls.KVM_IOEVENTFD, notify) == 0
    for slot, flags, gpa, size in ((0, 0, 0, MIB), (1, 2, MIB, MIB), (0, 1, 0, MIB), (1, 2, 0, 0)):
        data = memory.KVM_USERSPACE_MEMORY_REGION.pack(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=MIB
        )
        assert call(vm, ioctls.KVM_SET_USER_MEMORY_REGION, data) == 0
    vcpu = call(vm, ioctls.KVM_CREATE_VCPU, 0)
    machine_checks = bytearray((10 | 1 << 8 | 1 << 24).to_bytes(8, "little"))
    assert call(vcpu, ioctls.KVM_X86_SETUP_MCE, machine_checks) == 0
    assert call(vcpu, ioctls.KVM_SET_CPUID2, supported(call, system, 100)) == 0
    qemu_state(call, vcpu, listed, irqchip=irqchip)


def qemu_state(call, vcpu, listed, *, irqchip):
    """Everything QEMU reads and writes back when it resets a vCPU."""
    pairs = [
        (ioctls.KVM_GET_REGS, ioctls.KVM_SET_REGS, 144),
        (ioctls.KVM_GET_XSAVE, ioctls.KVM_SET_XSAVE, 4096),
        (ioctls.KVM_GET_XCRS, ioctls.KVM_SET_XCRS, 392),
        (ioctls.KVM_GET_SREGS, ioctls.KVM_SET_SREGS, 312),
        (ioctls.KVM_GET_SREGS2, ioctls.KVM_SET_SREGS2, 320),
        (ioctls.KVM_GET_FPU, ioctls.KVM_SET_FPU, 416),
        (ioctls.KVM_GET_MP_STATE, ioctls.KVM_SET_MP_STATE, 4),
        (ioctls.KVM_GET_VCPU_EVENTS, ioctls.KVM_SET_VCPU_EVENTS, 64),
        (ioctls.KVM_GET_DEBUGREGS, ioctls.KVM_SET_DEBUGREGS, 128),
    ]
    pairs += [(ioctls.KVM_GET_LAPIC, ioctls.KVM_SET_LAPIC, 1024)] if irqchip else []
    for getter, setter, size_bytes in pairs:
        data = bytearray(size_bytes)
        assert call(vcpu, getter, data) == 0
        before = bytes(data)
        assert call(vcpu, setter, data) == 0
        assert call(vcpu, getter, data) == 0
        assert data == before
    optional = () if irqchip else (0x4B564D06,)  # needs an APIC in the kernel
    table = msr_table(
        *(index for index in listed if index not in optional), 0x179 + 2, 0x2FF, 0x200
    )
    count = KVM_MSRS.get(table, "nmsrs")
    assert call(vcpu, ioctls.KVM_GET_MSRS, table) == count
    assert call(vcpu, ioctls.KVM_SET_MSRS, table) == count
    mask = bytearray((8).to_bytes(4, "little") + bytes(8))
    assert call(vcpu, ioctls.KVM_SET_SIGNAL_MASK, mask) == 0
    vcpu.engine = Scripted([Hlt()], 1)
    assert call(vcpu, ioctls.KVM_RUN) is not None
