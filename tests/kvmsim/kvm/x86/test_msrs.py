"""RDMSR and WRMSR in guest code: KVM's rules, filters, and user space in KVM's place."""

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi import msrs as abi
from kvmsim.abi.exits import Exit
from kvmsim.abi.run import EXIT_MSR
from kvmsim.abi.structs import (
    KVM_MSR_ENTRY,
    KVM_MSR_FILTER,
    KVM_MSR_FILTER_RANGE,
    KVM_MSRS,
)
from kvmsim.errors import KvmError
from kvmsim.kvm.vm import KvmEnableCap

pytest.importorskip("unicorn")

INTEL = 'vendor = "intel"\n'
HLT = "f4"
NOWHERE = 0x474F4F00
INVALID, UNKNOWN, FILTERED = 1, 2, 4


def number(index):
    return "b9" + index.to_bytes(4, "little").hex()  # mov ecx, index


def rdmsr(index):
    return number(index) + "0f 32"


def wrmsr(index, value=0):
    low, high = value & 0xFFFFFFFF, value >> 32
    words = "b8" + low.to_bytes(4, "little").hex() + "ba" + high.to_bytes(4, "little").hex()
    return words + number(index) + "0f 30"


@pytest.fixture
def guest(start):
    """A guest whose #GP handler halts with RBX = 0xD."""

    def make(*code):
        return start(INTEL, *code, HLT).offer_everything().gate(13, "b3 0d", HLT)

    return make


def ask_user_space(guest, reasons=7):
    guest.vm.enable_cap(KvmEnableCap(cap=188, args=(reasons, 0, 0, 0)))
    return guest


def deny(guest, *indices):
    data = KVM_MSR_FILTER.pack()
    for at, index in enumerate(indices):
        bitmap = guest.vm.creator.map(bytearray(8))
        data[8 + 24 * at : 32 + 24 * at] = KVM_MSR_FILTER_RANGE.pack(
            flags=3, nmsrs=1, base=index, bitmap=bitmap
        )
    guest.vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, data)


def get(guest, index):
    data = KVM_MSRS.pack(nmsrs=1) + KVM_MSR_ENTRY.pack(index=index)
    done = guest.vcpu.ioctl(ioctls.KVM_GET_MSRS, data)
    return KVM_MSR_ENTRY.get(data[8:], "data") if done else None


def put(guest, index, value):
    data = KVM_MSRS.pack(nmsrs=1) + KVM_MSR_ENTRY.pack(index=index, data=value)
    assert guest.vcpu.ioctl(ioctls.KVM_SET_MSRS, data) == 1


def shown(guest):
    memory = bytes(guest.vcpu.run.memory[:64])
    return tuple(EXIT_MSR.get(memory, name) for name in ("reason", "index", "data"))


def answer(guest, data=0, *, error=0):
    memory = guest.vcpu.run.memory
    memory[32] = error
    memory[48:56] = data.to_bytes(8, "little")


SHARED = (
    (abi.LSTAR, 0x7FFF_1234_5000),
    (abi.STAR, 0x0008_0008_0000_0000),
    (abi.SYSCALL_MASK, 0x700),
    (abi.IA32_SYSENTER_EIP, 0x1234),
    (abi.TSC_AUX, 7),
    (abi.KERNEL_GS_BASE, 0x55000),
    (abi.GS_BASE, 0x66000),
    (abi.IA32_CR_PAT, 0x0606060606060606),
    (abi.MTRR_DEF_TYPE, 0xC06),
    (abi.IA32_POWER_CTL, 0x1234),
)


@pytest.mark.parametrize(("index", "value"), SHARED)
def test_what_the_guest_writes_user_space_reads(guest, index, value):
    vm = guest(wrmsr(index, value))
    assert vm.run() == Exit.HLT
    assert (vm.regs("rbx"), get(vm, index)) == (0, value)


@pytest.mark.parametrize(("index", "value"), SHARED)
def test_what_user_space_writes_the_guest_reads(guest, index, value):
    vm = guest(HLT, rdmsr(index))
    assert vm.run() == Exit.HLT
    put(vm, index, value)
    assert vm.run() == Exit.HLT
    assert vm.regs("rax") | vm.regs("rdx") << 32 == value


def test_exchanged_base_is_what_user_space_reads(guest):
    vm = guest("0f 01 f8")  # swapgs
    put(vm, abi.GS_BASE, 0x1000)
    put(vm, abi.KERNEL_GS_BASE, 0x2000)
    assert vm.run() == Exit.HLT
    assert (get(vm, abi.GS_BASE), get(vm, abi.KERNEL_GS_BASE)) == (0x2000, 0x1000)


@pytest.mark.parametrize(
    "code", [rdmsr(NOWHERE), wrmsr(NOWHERE), wrmsr(abi.LSTAR, 1 << 47), wrmsr(abi.IA32_XSS, 1)]
)
def test_access_that_cannot_be_is_a_protection_fault(guest, code):
    vm = guest(code)
    assert vm.run() == Exit.HLT
    assert vm.regs("rbx") == 0xD


# -- user space in KVM's place ---------------------------------------------------------------------


def test_user_space_answers_a_read(guest):
    vm = ask_user_space(guest(rdmsr(NOWHERE)))
    assert vm.run() == Exit.X86_RDMSR
    assert shown(vm)[:2] == (UNKNOWN, NOWHERE)
    answer(vm, 0x1122334455667788)
    assert vm.run() == Exit.HLT
    assert (vm.regs("rax"), vm.regs("rdx"), vm.regs("rbx")) == (0x55667788, 0x11223344, 0)


def test_user_space_takes_a_write(guest):
    vm = ask_user_space(guest(wrmsr(NOWHERE, 0x1122334455667788)))
    assert vm.run() == Exit.X86_WRMSR
    assert shown(vm) == (UNKNOWN, NOWHERE, 0x1122334455667788)
    assert vm.run() == Exit.HLT
    assert vm.regs("rbx") == 0


@pytest.mark.parametrize("code", [rdmsr(NOWHERE), wrmsr(NOWHERE)])
def test_error_of_user_space_is_a_protection_fault(guest, code):
    vm = ask_user_space(guest(code))
    vm.run()
    answer(vm, error=1)
    assert vm.run() == Exit.HLT
    assert vm.regs("rbx") == 0xD


def test_value_a_register_does_not_take_is_shown_as_invalid(guest):
    vm = ask_user_space(guest(wrmsr(abi.LSTAR, 1 << 47)))
    assert vm.run() == Exit.X86_WRMSR
    assert shown(vm) == (INVALID, abi.LSTAR, 1 << 47)


@pytest.mark.parametrize("index", [abi.GS_BASE, abi.SYSCALL_MASK, abi.IA32_TSC, abi.EFER])
def test_filtered_register_is_user_spaces_whatever_it_is(guest, index):
    vm = ask_user_space(guest(rdmsr(index)))
    deny(vm, index)
    assert vm.run() == Exit.X86_RDMSR
    assert shown(vm)[:2] == (FILTERED, index)


def test_filter_holds_from_the_next_access_on(guest):
    vm = ask_user_space(guest(rdmsr(abi.GS_BASE), HLT, rdmsr(abi.GS_BASE)))
    assert vm.run() == Exit.HLT
    deny(vm, abi.GS_BASE)
    assert vm.run() == Exit.X86_RDMSR


@pytest.mark.parametrize("reasons", [0, INVALID, UNKNOWN])
def test_filtered_register_nobody_asked_for_is_a_protection_fault(guest, reasons):
    vm = ask_user_space(guest(rdmsr(abi.GS_BASE)), reasons)
    deny(vm, abi.GS_BASE)
    assert vm.run() == Exit.HLT
    assert vm.regs("rbx") == 0xD


def test_read_is_complete_behind_a_run_that_does_not_enter(guest):
    vm = ask_user_space(guest(rdmsr(NOWHERE)))
    vm.run()
    answer(vm, 0x99)
    at = vm.regs("rip")
    vm.vcpu.run.immediate_exit = 1
    with pytest.raises(KvmError, match="immediate_exit"):
        vm.vcpu.kvm_run(0)
    assert (vm.regs("rax"), vm.regs("rip")) == (0x99, at + 2)
