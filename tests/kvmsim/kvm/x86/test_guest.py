"""KVM_RUN over real code: exits, registers, bus locks and their #DB."""

import mmap
from errno import EINTR

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import KVM_REGS
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, debug, debugctl, events, sregs
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.vm import KvmEnableCap

pytest.importorskip("unicorn")

CODE, DATA, STACK, IDT, TABLES = 0x1000, 0x8000, 0x6000, 0x4000, 0x10000
HLT = "f4"
PID = 4194304
INC = "f0 ff 07"  # lock inc dword [rdi]
INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'


class Guest:
    """A vCPU in 64-bit mode with its first 2 MiB mapped one to one."""

    def __init__(self, vm, *code, ring=0):
        from kvmsim.engine.x86.memory import Slot
        from kvmsim.kvm.x86.guest import attach

        self.ram = mmap.mmap(-1, 0x40000)
        self.vm = vm
        vm.enable_cap(KvmEnableCap(cap=193, args=(2, 0, 0, 0)))
        self.vcpu = vm.create_vcpu(0)
        self.engine = attach(vm, [self.vcpu], [Slot(0, memoryview(self.ram))])
        self.put(CODE, *code)
        for level in range(3):
            self.word(TABLES + level * 4096, TABLES + (level + 1) * 4096 | 7)
        for page in range(512):
            self.word(TABLES + 3 * 4096 + page * 8, page * 4096 | 7)
        self.word(0x3008, 0x00AF9B000000FFFF)
        self.word(0x3010, 0x00CF93000000FFFF)
        self.word(0x3018, 0x00AFFB000000FFFF)
        self.word(0x3020, 0x00CFF3000000FFFF)
        self.word(0x5004, STACK - 0x400)
        self._special(ring)
        self.set_regs(rip=CODE, rsp=STACK, rdi=DATA + 62, rflags=2)

    def _special(self, ring):
        put = sregs.of(self.vcpu).put
        for name in ("cs", "ds", "es", "ss", "fs", "gs"):
            code = name == "cs"
            for part, value in {
                "selector": (0x18 if code else 0x20) | ring if ring else 8 if code else 0x10,
                "base": 0,
                "limit": 0xFFFFFFFF,
                "type": 11 if code else 3,
                "s": 1,
                "present": 1,
                "dpl": ring,
                "g": 1,
                "l": int(code),
                "db": int(not code),
            }.items():
                put(f"{name}.{part}", value)
        for part, value in {"base": 0x5000, "limit": 0x67, "type": 11, "present": 1}.items():
            put(f"tr.{part}", value)
        for name, base, limit in (("gdt", 0x3000, 0x3F), ("idt", IDT, 0xFFF)):
            put(f"{name}.base", base)
            put(f"{name}.limit", limit)
        for name, value in {"cr0": 0x80010011, "cr3": TABLES, "cr4": 0x620, "efer": 0xD01}.items():
            put(name, value)

    def put(self, at, *lines):
        code = bytes.fromhex("".join(lines))
        self.ram[at : at + len(code)] = code

    def word(self, at, value):
        self.ram[at : at + 8] = value.to_bytes(8, "little")

    def regs(self, name):
        return KVM_REGS.get(self.vcpu.get_regs(), name)

    def set_regs(self, **values):
        data = bytearray(self.vcpu.get_regs())
        for name, value in values.items():
            KVM_REGS.put(data, name, value)
        self.vcpu.set_regs(bytes(data))

    def run(self):
        blocked = self.vcpu.kvm_run(0)
        while blocked is not None:
            blocked = self.vcpu.resume(0)
        return self.vcpu.run.exit_reason


@pytest.fixture
def start(kvm):
    made = []

    def begin(preset, *code, **options):
        system = kvm(preset)
        made.append(Guest(system.create_vm(0, LocalClient(PID)), *code, **options))
        return made[-1]

    yield begin
    for guest in made:
        guest.engine.close()


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
    events.of(guest.vcpu).interrupt = 0x30
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
