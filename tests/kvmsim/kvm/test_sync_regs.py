from errno import EINTR, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.regs import KVM_SREGS, KVM_VCPU_EVENTS
from kvmsim.abi.structs import KVM_REGS
from kvmsim.engine.base import Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm import events, protected, sregs

REGS, SREGS, EVENTS = 304, 448, 760


@pytest.fixture
def vcpu(kvm):
    vcpu = kvm().create_vm(0, 1).create_vcpu(0)
    vcpu.engine = Scripted([Hlt(insn_len=1)], 100)
    return vcpu


def run(vcpu):
    blocked = vcpu.kvm_run(0)
    while blocked is not None:
        blocked = vcpu.resume(0)


def read(vcpu, layout, at, name):
    return layout.get(bytes(vcpu.run.memory[at : at + layout.size_bytes]), name)


def write(vcpu, at, data):
    vcpu.run.memory[at : at + len(data)] = data


def test_every_set_asked_for_is_shown_at_the_exit(vcpu):
    vcpu.run.kvm_valid_regs = 7
    run(vcpu)
    assert read(vcpu, KVM_REGS, REGS, "rip") == 0xFFF1
    assert read(vcpu, KVM_SREGS, SREGS, "cr0") == 0x60000010
    assert read(vcpu, KVM_VCPU_EVENTS, EVENTS, "flags") == 0xD


def test_sets_not_asked_for_are_left_alone(vcpu):
    vcpu.run.kvm_valid_regs = 2
    run(vcpu)
    assert read(vcpu, KVM_REGS, REGS, "rdx") == 0
    assert read(vcpu, KVM_SREGS, SREGS, "cr0") == 0x60000010


def test_dirty_sets_are_taken_over_and_clean_then(vcpu):
    special = sregs.pack(vcpu)
    KVM_SREGS.put(special, "cr2", 0x1234)
    write(vcpu, REGS, KVM_REGS.pack(rax=5, rip=0x100, rflags=2))
    write(vcpu, SREGS, special)
    write(vcpu, EVENTS, KVM_VCPU_EVENTS.pack(**{"flags": 1, "nmi.pending": 2}))
    vcpu.run.kvm_dirty_regs = 7
    vcpu.run.memory[1] = 1
    with pytest.raises(KvmError) as error:
        run(vcpu)
    assert error.value.errno == EINTR
    assert vcpu.rip == 0x100
    assert sregs.of(vcpu).get("cr2") == 0x1234
    assert events.of(vcpu).nmi_pending == 2
    assert vcpu.run.kvm_dirty_regs == 0


def test_refused_set_stays_dirty_and_those_before_it_are_applied(vcpu):
    special = sregs.pack(vcpu)
    KVM_SREGS.put(special, "cr4", 1 << 40)
    write(vcpu, REGS, KVM_REGS.pack(rip=0x100))
    write(vcpu, SREGS, special)
    vcpu.run.kvm_dirty_regs = 7
    with pytest.raises(KvmError) as error:
        run(vcpu)
    assert error.value.errno == EINVAL
    assert vcpu.rip == 0x100
    assert vcpu.run.kvm_dirty_regs == 6


def test_encrypted_registers_are_not_shown(kvm):
    sev_es = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\n'
    vm = kvm(sev_es).create_vm(3, 1)
    vm.encrypt()
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(KVM_REGS.pack(rax=0x5EC2E7))
    protected.protect(vcpu)
    vcpu.run.kvm_valid_regs = 7
    with pytest.raises(KvmError) as error:
        vcpu.kvm_run(0)
    assert error.value.errno == EINVAL
    assert bytes(vcpu.run.memory[REGS : REGS + 144]) == bytes(144)


def test_task_priority_wider_than_it_is(vcpu):
    vcpu.run.cr8 = 16
    with pytest.raises(KvmError) as error:
        run(vcpu)
    assert error.value.errno == EINVAL


def test_interrupt_flag_of_the_page_follows_the_registers(vcpu):
    vcpu.ioctl(ioctls.KVM_SET_REGS, KVM_REGS.pack(rflags=0x202))
    run(vcpu)
    assert (vcpu.run.if_flag, vcpu.run.ready_for_interrupt_injection) == (1, 1)
    vcpu.ioctl(ioctls.KVM_SET_REGS, KVM_REGS.pack(rflags=2))
    run(vcpu)
    assert (vcpu.run.if_flag, vcpu.run.ready_for_interrupt_injection) == (0, 0)


def test_window_that_is_open_already_is_an_exit_at_once(vcpu):
    vcpu.ioctl(ioctls.KVM_SET_REGS, KVM_REGS.pack(rflags=0x202))
    vcpu.run.request_interrupt_window = 1
    run(vcpu)
    assert vcpu.run.exit_reason == Exit.IRQ_WINDOW_OPEN
    vcpu.run.request_interrupt_window = 0
    run(vcpu)
    assert vcpu.run.exit_reason == Exit.HLT
