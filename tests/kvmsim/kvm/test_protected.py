from errno import EINVAL

import pytest

from kvmsim.abi import sev as abi

SEV, SEV_ES = 2, 3
SYNC_REGS = 74
REGISTERS = {
    "KVM_GET_REGS": (0x8090AE81, 144),
    "KVM_SET_REGS": (0x4090AE82, 144),
    "KVM_GET_SREGS": (0x8138AE83, 312),
    "KVM_SET_SREGS": (0x4138AE84, 312),
    "KVM_GET_SREGS2": (0x8140AECC, 320),
    "KVM_SET_SREGS2": (0x4140AECD, 320),
    "KVM_GET_DEBUGREGS": (0x8080AEA1, 128),
    "KVM_SET_DEBUGREGS": (0x4080AEA2, 128),
    "KVM_GET_FPU": (0x81A0AE8C, 416),
    "KVM_SET_FPU": (0x41A0AE8D, 416),
    "KVM_GET_XSAVE": (0x9000AEA4, 4096),
    "KVM_SET_XSAVE": (0x5000AEA5, 4096),
    "KVM_GET_XCRS": (0x8188AEA6, 392),
    "KVM_SET_XCRS": (0x4188AEA7, 392),
}


def protected(vmm, vm):
    vmm.start(vm, policy=4)
    assert vmm.run(vm, abi.KVM_SEV_LAUNCH_UPDATE_VMSA).errno == 0
    return vm.vcpus[0]


@pytest.mark.parametrize("name", REGISTERS)
def test_encrypted_registers_are_einval_for_the_types_made_for_it(vmm, name):
    vcpu = protected(vmm, vmm.guest(SEV_ES, vcpus=1))
    request, size = REGISTERS[name]
    assert vmm.errno(vcpu.ioctl, request, bytearray(size)) == EINVAL


@pytest.mark.parametrize("name", [name for name in REGISTERS if "GET" in name])
def test_encrypted_registers_of_an_older_guest_read_as_they_were(vmm, name):
    vcpu = protected(vmm, vmm.legacy(es=True, vcpus=1))
    request, size = REGISTERS[name]
    assert vmm.errno(vcpu.ioctl, request, bytearray(size)) == 0


@pytest.mark.parametrize(
    "make", [lambda v: v.guest(SEV_ES, 1), lambda v: v.legacy(es=True, vcpus=1)]
)
def test_debugger_for_encrypted_registers_is_einval(vmm, make):
    vcpu = protected(vmm, make(vmm))
    assert vmm.errno(vcpu.ioctl, 0x4048AE9B, bytearray(72)) == EINVAL


@pytest.mark.parametrize(("vm_type", "value"), [(0, 7), (SEV, 7), (SEV_ES, 0), (4, 0)])
def test_registers_in_the_run_page_are_not_for_types_that_lose_them(vmm, vm_type, value):
    vm = vmm.create(vm_type)
    assert vm.check_extension(SYNC_REGS) == value
    assert vmm.system.check_extension(SYNC_REGS) == 7


@pytest.mark.parametrize(("vm_type", "errno"), [(SEV, 0), (SEV_ES, EINVAL)])
def test_run_with_registers_in_the_page(vmm, vm_type, errno):
    vm = vmm.running(vm_type, vcpus=1)
    page = vm.vcpus[0].run
    page.memory[288] = 1  # kvm_valid_regs
    assert vmm.errno(vm.vcpus[0].kvm_run, 0) == errno


LSTAR, TSC = 0xC0000082, 0x10


def msrs(vmm, vcpu, request, entries):
    """GET or SET_MSRS: how many entries were done, and the values afterwards."""
    table = bytearray(len(entries).to_bytes(8, "little"))
    for index, value in entries:
        table += index.to_bytes(8, "little") + value.to_bytes(8, "little")
    done = vcpu.ioctl(request, table, vmm.client)
    values = [int.from_bytes(table[at : at + 8], "little") for at in range(16, len(table), 16)]
    return done, values


@pytest.mark.parametrize("request_number", [0xC008AE88, 0x4008AE89])
def test_table_of_msrs_ends_at_one_inside_the_vmsa(vmm, request_number):
    vcpu = protected(vmm, vmm.guest(SEV_ES, vcpus=1))
    done, _ = msrs(vmm, vcpu, request_number, [(TSC, 0), (LSTAR, 0), (TSC, 0)])
    assert done == 1


def test_msrs_inside_the_vmsa_of_an_older_guest_read_as_zero(vmm):
    vm = vmm.legacy(es=True, vcpus=1)
    msrs(vmm, vm.vcpus[0], 0x4008AE89, [(LSTAR, 0x1000)])
    vcpu = protected(vmm, vm)
    assert msrs(vmm, vcpu, 0x4008AE89, [(LSTAR, 0x2000)])[0] == 1
    assert msrs(vmm, vcpu, 0xC008AE88, [(LSTAR, 7)]) == (1, [0])


# -- who may run ---


def exit_of(vcpu):
    """None: the guest runs."""
    return None if vcpu.kvm_run(0) is not None else vcpu.run.exit_reason


@pytest.mark.parametrize(("vm_type", "reason"), [(SEV, None), (SEV_ES, 9)])
def test_guest_that_was_not_started_runs_only_without_es(vmm, vm_type, reason):
    assert exit_of(vmm.guest(vm_type, vcpus=1).vcpus[0]) == reason


@pytest.mark.parametrize("vm_type", [SEV, SEV_ES])
def test_guest_runs_after_its_launch_only(vmm, vm_type):
    vm = vmm.started(vm_type, vcpus=1)
    vcpu = vm.vcpus[0]
    assert exit_of(vcpu) == 9
    assert vcpu.run.memory[32:40].tobytes() == b"\xff" * 8
    assert vmm.run(vm, abi.KVM_SEV_LAUNCH_FINISH).errno == 0
    assert exit_of(vcpu) is None


def test_vm_of_this_process_is_launched_with_its_defaults(vmm):
    for vm_type in (SEV, SEV_ES, 4):
        vm = vmm.create(vm_type)
        vm.encrypt()
        assert exit_of(vm.create_vcpu(0)) is None
        vm.close()
    assert vmm.system.firmware.guests == {}
