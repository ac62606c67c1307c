"""The guests of docs/examples/guests in process: what they print, and every bus lock once."""

import mmap
from pathlib import Path

import guests
import pytest

import kvmsim
from kvmsim.abi.exits import Exit
from kvmsim.abi.run import EXIT_IO, EXIT_MMIO
from kvmsim.abi.structs import KVM_REGS
from kvmsim.kvm import cpuid, sregs
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.vm import KvmEnableCap

pytest.importorskip("unicorn")

PID = 4194304
INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
BOTH = pytest.mark.parametrize("preset", [INTEL, AMD], ids=["intel", "amd"])
SERIAL, EXIT_PORT, ICR = 0x3F8, 0xF4, 0xFEE00300
STARTUP = 6
#: Short, because a processor that waits for the other one uses up all of it each time.
SLICE_BYTES = 20_000


class Board:
    """RAM below 640 KiB, a ROM at both its places, a serial port, and a port that ends it all.

    Processors run in turn, a slice each. The second one waits for a SIPI from the first, whose APIC
    is here and not in the kernel.
    """

    def __init__(self, vm, rom, nr_vcpus):
        from kvmsim.engine.x86.memory import Slot
        from kvmsim.kvm.x86.guest import attach

        self.vm = vm
        vm.enable_cap(KvmEnableCap(cap=193, args=(2, 0, 0, 0)))
        self.ram = mmap.mmap(-1, 0xA0000)
        self.rom = mmap.mmap(-1, guests.ROM_BYTES)
        self.rom[:] = rom
        slots = [Slot(0, memoryview(self.ram))]
        slots += [Slot(gpa, memoryview(self.rom), read_only=True) for gpa in (0xF0000, 0xFFFF0000)]
        self.vcpus = [vm.create_vcpu(number) for number in range(nr_vcpus)]
        table = b"".join(entry.pack() for entry in cpuid.supported(vm.machine))
        for vcpu in self.vcpus:
            cpuid.set_table(vcpu, table)
        self.engine = attach(vm, self.vcpus, slots)
        self.engine.slice_bytes = SLICE_BYTES
        self.runnable = self.vcpus[:1]
        self.printed = ""
        self.code = None
        self.bus_lock_exits = 0

    @property
    def bus_locks(self):
        return sum(vcpu.bus_locks for vcpu in self.vcpus)

    def run(self):
        """Run to the end the guest chooses."""
        blocked = dict.fromkeys(self.vcpus)
        while self.code is None:
            for vcpu in list(self.runnable):
                step = vcpu.kvm_run if blocked[vcpu] is None else vcpu.resume
                blocked[vcpu] = step(0)
                if blocked[vcpu] is None:
                    self.handle(vcpu)
        return self.code, self.printed

    def handle(self, vcpu):
        run = vcpu.run
        # Fault-like hardware never reports a bus lock with another exit, trap-like may.
        self.bus_lock_exits += bool(run.flags & 2)
        match run.exit_reason:
            case Exit.X86_BUS_LOCK:
                pass
            case Exit.IO:
                self.port_written(bytes(run.memory))
            case Exit.MMIO:
                self.apic_written(bytes(run.memory))
            case reason:
                pytest.fail(f"exit {reason}")

    def port_written(self, page):
        port, offset = EXIT_IO.get(page, "port"), EXIT_IO.get(page, "data_offset")
        size = EXIT_IO.get(page, "size") * EXIT_IO.get(page, "count")
        if port == SERIAL:
            self.printed += page[offset : offset + size].decode()
        else:
            assert port == EXIT_PORT
            self.code = page[offset]

    def apic_written(self, page):
        assert EXIT_MMIO.get(page, "phys_addr") == ICR
        command = int.from_bytes(page[40:44], "little")
        if command >> 8 & 7 == STARTUP:
            second = self.vcpus[1]
            put = sregs.of(second).put
            put("cs.selector", (command & 0xFF) << 8)
            put("cs.base", (command & 0xFF) << 12)
            second.set_regs(KVM_REGS.pack(rflags=2))
            self.runnable.append(second)


@pytest.fixture
def board(kvm):
    made = []

    def make(preset, name, *defines, nr_vcpus=1):
        try:
            rom = guests.rom(name, *defines)
        except guests.BuildError as reason:
            pytest.skip(str(reason))
        made.append(Board(kvm(preset).create_vm(0, LocalClient(PID)), rom, nr_vcpus))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


@BOTH
def test_real_mode_guest_takes_one_bus_lock_of_each_kind(board, preset):
    guest = board(preset, "hello16")
    greeting = "hello from real mode\ntook 5 bus locks, and the answer is 42\n"
    assert guest.run() == (guests.DONE, greeting)
    assert (guest.bus_lock_exits, guest.bus_locks) == (5, 5)


@BOTH
@pytest.mark.parametrize("name", ["storm16", "storm64"])
def test_every_split_lock_of_a_storm_is_one_exit(board, preset, name):
    guest = board(preset, name, "LOCKS=20000")
    assert guest.run() == (guests.DONE, "20000 locked increments\n")
    assert (guest.bus_lock_exits, guest.bus_locks) == (20_000, 20_000)


@BOTH
@pytest.mark.parametrize("name", ["storm16", "storm64"])
def test_aligned_storm_takes_no_bus_lock(board, preset, name):
    guest = board(preset, name, "LOCKS=20000", "OPERAND=ALIGNED")
    assert guest.run() == (guests.DONE, "20000 locked increments\n")
    assert (guest.bus_lock_exits, guest.bus_locks) == (0, 0)


@pytest.mark.parametrize(
    ("preset", "printed", "exits"),
    [
        # One more in ring 0, which is an exit and no exception.
        (INTEL, "300 bus lock #DBs\n", 301),
        (AMD, "this processor has no bus lock #DB\n0 bus lock #DBs\n", 300),
    ],
    ids=["intel", "amd"],
)
def test_ring_3_gets_one_debug_exception_per_bus_lock_where_there_is_one(
    board, preset, printed, exits
):
    guest = board(preset, "trap64", "LOCKS=300")
    assert guest.run() == (guests.DONE, printed)
    assert (guest.bus_lock_exits, guest.bus_locks) == (exits, exits)


@BOTH
def test_two_processors_lose_no_increment_across_a_line(board, preset):
    guest = board(preset, "smp64", "UNLOCKED", "ROUNDS=5000", nr_vcpus=2)
    assert guest.run() == (guests.DONE, "10000 counted by two processors\n")
    assert (guest.bus_lock_exits, guest.bus_locks) == (10_000, 10_000)


@BOTH
def test_spin_lock_of_two_processors_excludes(board, preset):
    guest = board(preset, "smp64", "ROUNDS=5000", nr_vcpus=2)
    assert guest.run() == (guests.DONE, "10000 counted by two processors\n")
    assert guest.bus_lock_exits == guest.bus_locks >= 10_000


def last_branches(rounds):
    """What lbr64 executes while recording is on, newest first."""
    at = guests.symbols("lbr64", f"ROUNDS={rounds}", "SHOWN=32")
    routine = [
        (at["the_return"], at["returned"]),
        (at["the_indirect"], at["landed"]),
        (at["the_jump"], at["over"]),
        (at["the_call"], at["routine"]),
    ]
    # The last round's conditional jump is not taken.
    return (routine + [(at["the_jcc"], at["the_call"]), *routine] * (rounds - 1))[:32]


def test_guest_reads_its_last_32_branches(board):
    text = (Path(kvmsim.__file__).parent / "presets/lab-intel.toml").read_text()
    guest = board(text, "lbr64", "ROUNDS=8", "SHOWN=32")
    wanted = "".join(f"{source:04x} -> {target:04x}\n" for source, target in last_branches(8))
    assert guest.run() == (guests.DONE, wanted)


@BOTH
def test_guest_of_a_processor_without_last_branches_finds_none(board, preset):
    guest = board(preset, "lbr64")
    assert guest.run() == (guests.DONE, "this processor records no branches\n")
