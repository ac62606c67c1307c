"""Loops of real code: ours beside Unicorn as it comes and QEMU's TCG, and what stops and idles."""

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import guests
import worlds
from figures import Figure, resident_bytes

from kvmsim.abi.exits import Exit
from kvmsim.engine.x86.memory import Slot
from kvmsim.engine.x86.policy import PlainPolicy
from kvmsim.engine.x86.vm import X86Vm
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.kvm import cpuid
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.run import InGuest
from kvmsim.kvm.system import System
from kvmsim.kvm.vm import KvmEnableCap
from kvmsim.kvm.x86.guest import attach

if TYPE_CHECKING:
    from kvmsim.host.accounting import Accounting

HERE = Path(__file__).parent
#: Number of a loop in loops64.S, its name, instructions of a round, rounds.
LOOPS = (
    (0, "arithmetic", 6, 100_000_000),
    (1, "memory", 6, 30_000_000),
    (2, "locked, within a line", 4, 10_000_000),
    (3, "branches", 6, 30_000_000),
)
TURNS = 3
LEAST_OF_PLAIN = 0.9
LEAST_LOCKED_MIPS = 20
LEAST_WITH_RECORDS = 0.5
LEAST_EXITS = 200_000
NR_IDLE = 1000
MOST_IDLE_BYTES = 1_000_000_000
QEMU = "qemu-system-x86_64"
RAM_BYTES = 0xA0000
TIMEOUT_SECONDS = 120


def engine(scratch: Path, quick: bool) -> Sequence[Figure]:
    """Times every loop in every engine, in turns."""
    found: list[Figure] = []
    for number, name, instructions, all_rounds in LOOPS:
        rounds = all_rounds // 10 if quick else all_rounds
        rom = _rom(scratch, number, rounds)
        speeds: dict[str, float] = {}
        for _ in range(1 if quick else TURNS):
            for world in ("real", "counted", "records", "plain", "tcg"):
                seconds = _tcg_seconds(rom) if world == "tcg" else _seconds(world, rom)
                if seconds is not None:
                    mips = rounds * instructions / seconds / 1e6
                    speeds[world] = max(mips, speeds.get(world, 0.0))
        found += _figures_of(name, speeds)
    return found


def _figures_of(name: str, speeds: dict[str, float]) -> list[Figure]:
    real, plain = speeds["real"], speeds["plain"]
    beside = f"Unicorn as it comes {plain:,.0f}"
    if "tcg" in speeds:
        beside += f", QEMU's TCG {speeds['tcg']:,.0f}"
    text = f"{real:,.0f} MIPS, {speeds['counted']:,.0f} where guest time is counted; {beside}"
    title = f"loop of real code, {name}, bus locks watched for"
    if name.startswith("locked"):
        goal, met = f"at least {LEAST_LOCKED_MIPS} MIPS", real >= LEAST_LOCKED_MIPS
    else:
        goal = f"at least {LEAST_OF_PLAIN:g}x Unicorn as it comes"
        met = real >= LEAST_OF_PLAIN * plain
    kept = speeds["records"] / real
    return [
        Figure(title, text, goal, met),
        Figure(
            f"{title}, and last branches recorded",
            f"{speeds['records']:,.0f} MIPS, {kept:.2f}x",
            f"at least {LEAST_WITH_RECORDS:g}x the same without",
            kept >= LEAST_WITH_RECORDS,
        ),
    ]


def _rom(scratch: Path, loop: int, rounds: int) -> Path:
    rom = scratch / f"loop{loop}.rom"
    defines = (f"-DLOOP={loop}", f"-DROUNDS={rounds}", f"-I{guests.SOURCES}")
    source = str(HERE / "loops64.S")
    command = ["gcc", *guests.FLAGS, *guests.AS_ROM, *defines, "-o", str(rom), source]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise worlds.MissingWorldError(f"the loops cannot be assembled: {error}") from error
    return rom


def _seconds(engine_name: str, rom: Path) -> float:
    """In a process of its own: what the engine does to the library stays there."""
    command = [sys.executable, str(HERE / "loops.py"), engine_name, str(rom)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise worlds.MissingWorldError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout)


def _tcg_seconds(rom: Path) -> float | None:
    """Seconds between the two letters in QEMU; None without QEMU."""
    if shutil.which(QEMU) is None:
        return None
    devices = ("-nodefaults", "-display", "none", "-serial", "stdio")
    leave = ("-device", "isa-debug-exit,iobase=0xf4")
    command = [QEMU, "-accel", "tcg", "-M", "pc", "-m", "16", "-bios", str(rom), *devices, *leave]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        start = time.perf_counter()
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.wait(TIMEOUT_SECONDS)
    return seconds


def exits(_scratch: Path, quick: bool) -> Sequence[Figure]:
    """Takes bus lock exits of a guest that does nothing else, by KVM_RUN in this process."""
    found = []
    for preset, kind in (("spr-buslock", "trap-like"), ("turin1006", "fault-like")):
        rate = _exits_per_second(preset, 20_000 if quick else 200_000)
        title = f"bus lock exits to user space per second of CPU, in process, {kind} ({preset})"
        met = rate >= LEAST_EXITS
        found.append(Figure(title, f"{rate:,.0f}", f"at least {LEAST_EXITS:,}", met))
    return found


class _Unlimited:
    """The accounting of a host without limits."""

    def bus_lock(self, _pid: int, _waiter: object, _now_ns: int) -> bool:
        """Every bus lock is admitted."""
        return True

    def bus_lock_limited(self, _pid: int) -> bool:
        """None is limited."""
        return False


def _exits_per_second(preset: str, nr_exits: int) -> float:
    system = System(Machine(load(preset), None, cast("Accounting", _Unlimited())))
    vm = system.create_vm(0, LocalClient(1))
    vm.enable_cap(KvmEnableCap(cap=193, args=(2, 0, 0, 0)))
    vcpu = vm.create_vcpu(0)
    entries = cpuid.supported(vm.machine)
    cpuid.set_table(vcpu, b"".join(entry.pack() for entry in entries))
    rom = guests.rom("storm64", "LOCKS=0")
    image, ram = mmap.mmap(-1, len(rom)), mmap.mmap(-1, RAM_BYTES)
    image[:] = rom
    roms = [Slot(base, memoryview(image), read_only=True) for base in (0xF0000, 0xFFFF0000)]
    emulator = attach(vm, [vcpu], [Slot(0, memoryview(ram)), *roms])
    now_ns, start, wanted = 0, 0.0, Exit.X86_BUS_LOCK
    for number in range(nr_exits + 100):
        if number == 100:
            start = time.process_time()  # nothing in here waits
        blocked = vcpu.kvm_run(now_ns)
        while blocked is not None:
            assert isinstance(blocked, InGuest)
            now_ns += blocked.guest_ns
            blocked = vcpu.resume(now_ns)
        if vcpu.run.exit_reason != wanted:
            raise worlds.MissingWorldError(f"exit {vcpu.run.exit_reason}")
    seconds = time.process_time() - start
    emulator.close()
    return nr_exits / seconds


def idle(_scratch: Path, _quick: bool) -> Sequence[Figure]:
    """Lets many VMs of one process run to their HLT."""
    with ProcessPoolExecutor(1) as pool:
        taken = pool.submit(_idle_bytes).result()
    return (
        Figure(
            f"memory of a process with {NR_IDLE:,} VMs that have run and halted",
            f"{taken / 1e9:.2f} GB",
            f"at most {MOST_IDLE_BYTES / 1e9:g} GB",
            taken <= MOST_IDLE_BYTES,
        ),
    )


def _idle_bytes() -> int:
    rom = mmap.mmap(-1, mmap.PAGESIZE)
    rom[0xFF0] = 0xF4  # HLT
    slot = Slot(0xFFFFF000, memoryview(rom), read_only=True)
    vms = []
    for _ in range(NR_IDLE):
        vm = X86Vm([slot], PlainPolicy())
        vm.run(vm.add_cpu())
        vms.append(vm)
    taken = resident_bytes(os.getpid())
    for vm in vms:
        vm.close()
    return taken


FIGURES: dict[str, Callable[[Path, bool], Sequence[Figure]]] = {
    "engine": engine,
    "exits": exits,
    "idle": idle,
}
