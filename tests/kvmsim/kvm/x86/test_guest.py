"""KVM_RUN over real code: exits, registers, bus locks and their #DB."""

import mmap
from errno import EINTR

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.engine.x86.memory import Slot
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, debug, debugctl, events, sregs

pytest.importorskip("unicorn")

CODE, DATA, STACK, IDT, TABLES = 0x1000, 0x8000, 0x6000, 0x4000, 0x10000
HLT = "f4"
INC = "f0 ff 07"  # lock inc dword [rdi]
INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'


def test_ports_and_hlt_reach_user_space(start):
    guest = start(INTEL, "b0 41", "e6 80", "e4 81", HLT)
    assert guest.run() == Exit.IO
    assert guest.vcpu.run.memory[4096] == 0x41
    assert guest.run() == Exit.IO
    guest.vcpu.run.memory[4096] = 0x99
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") & 0xFF == 0x99
    assert guest.regs("rip") == CODE + 7


@pytest.mark.parametrize(("preset", "first"), [(INTEL, 1), (AMD, 0)])
def test_hundred_split_locks_are_hundred_exits(start, preset, first):
    guest = start(preset, INC, "ff c9", "75 f9", HLT)
    guest.set_regs(rcx=100)
    values = []
    while guest.run() == Exit.X86_BUS_LOCK:
        values.append(int.from_bytes(guest.ram[DATA + 62 : DATA + 66], "little"))
        assert guest.vcpu.run.flags == 2
    assert values == list(range(first, first + 100))
    assert guest.vcpu.bus_locks == 100


def test_amd_lock_user_space_skips_leaves_memory_alone(start):
    guest = start(AMD, INC, HLT)
    assert guest.run() == Exit.X86_BUS_LOCK
    guest.set_regs(rip=CODE + 3)
    assert guest.run() == Exit.HLT
    assert guest.ram[DATA + 62] == 0
    assert guest.vcpu.bus_lock_counter == 0


def test_registers_user_space_sets_are_what_the_guest_has(start):
    guest = start(INTEL, HLT, "48 89 d8", HLT)  # hlt; mov rax, rbx; hlt
    assert guest.run() == Exit.HLT
    guest.set_regs(rbx=0x123456789ABCDEF0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x123456789ABCDEF0


def test_system_registers_come_back(start):
    guest = start(INTEL, "0f 20 e0", "0d 80 00 00 00", "0f 22 e0", HLT)  # CR4.PGE
    assert guest.run() == Exit.HLT
    assert sregs.of(guest.vcpu).get("cr4") == 0x6A0
    assert sregs.of(guest.vcpu).get("cs.l") == 1


def test_a_triple_fault_is_a_shutdown(start):
    assert start(INTEL, "0f 0b").run() == Exit.SHUTDOWN


def test_a_bus_lock_in_ring_3_is_an_exit_and_then_a_debug_exception(start):
    guest = start(INTEL, INC, "90", ring=3)
    entries = cpuid.supported(guest.vm.machine)
    cpuid.set_table(guest.vcpu, b"".join(entry.pack() for entry in entries))
    assert debugctl.write(guest.vcpu, 4, host_initiated=True)
    guest.word(IDT + 16, 0x2000 | 8 << 16 | 0x8E00 << 32)
    guest.put(0x2000, "0f 21 f0", HLT)  # mov rax, dr6
    assert guest.run() == Exit.X86_BUS_LOCK
    assert debug.of(guest.vcpu).dr6 == 0xFFFF0FF0
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0xFFFF07F0
    top = guest.regs("rsp")
    assert int.from_bytes(guest.ram[top : top + 8], "little") == CODE + 3


def test_a_bus_lock_in_ring_0_is_an_exit_only(start):
    guest = start(INTEL, INC, HLT)
    entries = cpuid.supported(guest.vm.machine)
    cpuid.set_table(guest.vcpu, b"".join(entry.pack() for entry in entries))
    assert debugctl.write(guest.vcpu, 4, host_initiated=True)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert guest.run() == Exit.HLT
    assert debug.of(guest.vcpu).delivered == 0


def test_an_in_is_complete_behind_a_run_that_does_not_enter(start):
    guest = start(INTEL, "e4 81", HLT)
    assert guest.run() == Exit.IO
    guest.vcpu.run.memory[4096] = 0x99
    guest.vcpu.run.immediate_exit = 1
    with pytest.raises(KvmError):
        guest.vcpu.kvm_run(0)
    assert (guest.regs("rax"), guest.regs("rip")) == (0x99, CODE + 2)
    guest.vcpu.run.immediate_exit = 0
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x99


def test_an_in_whose_rip_was_moved_is_not_completed(start):
    guest = start(INTEL, "e4 81", HLT)
    assert guest.run() == Exit.IO
    guest.vcpu.run.memory[4096] = 0x99
    guest.set_regs(rip=CODE + 2)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0


def test_read_modify_write_of_a_device_is_two_exits(start):
    guest = start(INTEL, "83 07 05", HLT)  # add dword [rdi], 5
    guest.word(TABLES + 3 * 4096 + 8 * 8, 0xFED00007)
    guest.set_regs(rdi=DATA)
    assert guest.run() == Exit.MMIO
    assert guest.vcpu.run.memory[52] == 0
    guest.vcpu.run.memory[40:44] = b"\x02\0\0\0"
    assert guest.run() == Exit.MMIO
    assert bytes(guest.vcpu.run.memory[40:53]) == b"\x07" + bytes(7) + b"\x04\0\0\0\x01"
    assert guest.run() == Exit.HLT


def test_an_interrupt_of_user_space_reaches_the_handler(start):
    guest = start(INTEL, "fb", HLT, "90", HLT)
    guest.word(IDT + 0x30 * 16, 0x2000 | 8 << 16 | 0x8E00 << 32)
    guest.put(0x2000, "ff c3", "48 cf")
    assert guest.run() == Exit.HLT
    assert guest.vcpu.run.if_flag == 1
    events.of(guest.vcpu).queue_interrupt(0x30)
    debug.of(guest.vcpu).queued = True
    assert guest.run() == Exit.HLT
    assert (guest.regs("rbx"), guest.regs("rip")) == (1, CODE + 4)


def test_user_space_hears_of_the_interrupt_window(start):
    guest = start(INTEL, "90", "fb", "90", "90", HLT)
    guest.vcpu.run.request_interrupt_window = 1
    assert guest.run() == Exit.IRQ_WINDOW_OPEN
    assert guest.regs("rip") == CODE + 3
    guest.vcpu.run.request_interrupt_window = 0
    assert guest.run() == Exit.HLT


def test_a_signal_leaves_the_guest_where_it_goes_on(start):
    guest = start(INTEL, "ff c3", "90", HLT)
    guest.vcpu.kvm_run(0)
    with pytest.raises(KvmError) as caught:
        guest.vcpu.interrupt(0)
    assert caught.value.errno == EINTR
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") == 1


def test_guest_of_a_vm_that_ended_keeps_none_of_its_memory(start):
    from kvmsim.kvm.x86.guest import CodeGuests

    guests, vm = CodeGuests(), start(INTEL, HLT).vm
    engine = guests.emulated(vm).engine
    ram = mmap.mmap(-1, 4096)
    engine.set_slots([Slot(0, memoryview(ram))])
    guests.ended(vm)
    ram.close()  # BufferError, were it in use
    assert not engine.awake
