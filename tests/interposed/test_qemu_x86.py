"""Debian's QEMU with guests of real code: what they print, and every bus lock once.

Counts are those of the cgroup QEMU is in, so they are the emulated kernel's and not QEMU's.
"""

import shutil
import subprocess
import time

import guests
import pytest
from sessions.session import fuse, shell

__all__ = ["fuse", "shell"]

QEMU = "qemu-system-x86_64"
DEVICES = "-nodefaults -display none -serial stdio -device isa-debug-exit,iobase=0xf4,iosize=1"
EXITED = guests.DONE << 1 | 1
MANY = 100_000
FEWER = 5_000
#: A hundred thousand locks take 10 seconds, and many times that on a machine with other work.
SECONDS = 280
pytestmark = pytest.mark.timeout(300)
#: More than any guest takes: QEMU asks for bus lock exits, and never waits.
UNLIMITED = 1_000_000_000
GENEROUS = f"{MANY} 1000"
INTEL, AMD = "spr-buslock", "lab-amd"


class Tenant:
    """QEMU in a cgroup of a host, and what that counts."""

    def __init__(self, shell, host):
        self.shell = shell
        cgroup = host / "sys/fs/cgroup"
        (cgroup / "cgroup.subtree_control").write_text("+bus_lock")
        self.cgroup = cgroup / "tenant"
        self.cgroup.mkdir()

    def run(self, name, *defines, machine="pc,kernel_irqchip=off", ratelimit=UNLIMITED):
        """Run a guest to its end; what it printed, and how many bus locks were counted."""
        try:
            rom = guests.rom(name, *defines)
        except guests.BuildError as reason:
            pytest.skip(str(reason))
        (self.shell.home / "rom").write_bytes(rom)
        before = self.counts()["nr_events"]
        model, _, more = machine.partition(" ")
        if ratelimit:
            model += f",bus-lock-ratelimit={ratelimit}"
        options = f"-accel kvm -bios rom -m 16 {DEVICES} -M {model} {more}"
        done = subprocess.run(
            ["kvmsim", "run", "--cgroup", "/tenant", "--", QEMU, *options.split()],
            cwd=self.shell.home,
            env=self.shell.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        # QEMU warns of a local APIC of its own, and of options it has other names for.
        complaints = [line for line in done.stderr.splitlines() if ": warning: " not in line]
        assert (complaints, done.returncode) == ([], EXITED), done.stdout
        return done.stdout, self.counts()["nr_events"] - before

    def limit(self, text):
        (self.cgroup / "bus_lock.max").write_text(text)

    def counts(self):
        lines = (self.cgroup / "bus_lock.stat").read_text().splitlines()
        return {key: int(value) for key, value in map(str.split, lines)}


@pytest.fixture
def tenant(request, shell, fuse):
    del fuse
    if shutil.which(QEMU) is None:
        pytest.skip(f"needs {QEMU} (Debian's qemu-system-x86)")
    pytest.importorskip("unicorn", reason="needs the extra x86")
    started = shell.kvmsim("up", "host", "--preset", getattr(request, "param", INTEL))
    assert (started.returncode, started.stderr) == (0, "")
    host = shell.home / "host"
    if (reason := shell.kvmsim("run", "true")).returncode == 69:
        shell.kvmsim("down", host)
        pytest.skip(f"no client can be run here: {reason.stderr.strip()}")
    yield Tenant(shell, host)
    shell.kvmsim("down", host)


on_both = pytest.mark.parametrize("tenant", [INTEL, AMD], indirect=True)
in_both_modes = pytest.mark.parametrize("name", ["storm16", "storm64"])


@on_both
def test_one_bus_lock_of_each_kind_is_counted(tenant):
    text = "hello from real mode\ntook 5 bus locks, and the answer is 42\n"
    assert tenant.run("hello16") == (text, 5)


def test_no_lock_of_many_is_missed_or_counted_twice_under_qemus_limit(tenant):
    printed = tenant.run("storm64", f"LOCKS={MANY}")
    assert printed == (f"{MANY} locked increments\n", MANY)


@pytest.mark.parametrize("tenant", [AMD], indirect=True)
def test_no_lock_of_many_is_missed_or_counted_twice_under_the_cgroups_limit(tenant):
    tenant.limit(GENEROUS)
    printed = tenant.run("storm16", f"LOCKS={MANY}", ratelimit=0)
    assert printed == (f"{MANY} locked increments\n", MANY)


@pytest.mark.parametrize(
    ("tenant", "name", "ratelimit"),
    [
        (INTEL, "storm16", 0),
        (INTEL, "storm64", UNLIMITED),
        (AMD, "storm16", UNLIMITED),
        (AMD, "storm64", 0),
    ],
    indirect=["tenant"],
)
def test_no_lock_is_missed_or_counted_twice_with_the_cgroups_limit(tenant, name, ratelimit):
    tenant.limit(GENEROUS)
    printed = tenant.run(name, f"LOCKS={FEWER}", ratelimit=ratelimit)
    assert printed == (f"{FEWER} locked increments\n", FEWER)


@on_both
@in_both_modes
def test_aligned_locks_count_zero(tenant, name):
    tenant.limit(GENEROUS)
    printed = tenant.run(name, f"LOCKS={MANY}", "OPERAND=ALIGNED")
    assert printed == (f"{MANY} locked increments\n", 0)


def test_nobody_counts_without_a_limit(tenant):
    assert tenant.run("storm64", "LOCKS=1000", ratelimit=0) == ("1000 locked increments\n", 0)


@pytest.mark.parametrize(
    "machine",
    [
        "pc",
        "pc,kernel_irqchip=split",
        "q35,kernel_irqchip=off",
        "q35",
        "microvm",
        "microvm,kernel_irqchip=off",
    ],
)
def test_machines_of_every_kind_run_the_storm(tenant, machine):
    printed = tenant.run("storm64", "LOCKS=1000", machine=machine)
    assert printed == ("1000 locked increments\n", 1000)


def test_machine_without_pci_runs_the_storm_of_16_bits(tenant):
    printed = tenant.run("storm16", "LOCKS=1000", machine="isapc")  # its processor has no more
    assert printed == ("1000 locked increments\n", 1000)


@pytest.mark.parametrize("irqchip", ["off", "on", "split"])
def test_two_processors_lose_no_increment_and_no_bus_lock(tenant, irqchip):
    machine = f"pc,kernel_irqchip={irqchip} -smp 2"
    printed = tenant.run("smp64", "UNLOCKED", "ROUNDS=10000", machine=machine)
    assert printed == ("20000 counted by two processors\n", 20_000)


@on_both
def test_spin_lock_of_two_processors_excludes(tenant):
    text, locks = tenant.run("smp64", "ROUNDS=500", machine="pc,kernel_irqchip=off -smp 2")
    assert text == "1000 counted by two processors\n"
    assert locks >= 1000


def test_ring_3_gets_a_debug_exception_for_each_bus_lock(tenant):
    text, locks = tenant.run("trap64", "LOCKS=500", machine="pc -cpu host")
    assert (text, locks) == ("500 bus lock #DBs\n", 501)


def test_qemus_limiter_makes_the_guest_wait(tenant):
    start = time.monotonic()
    assert tenant.run("storm64", "LOCKS=250", ratelimit=100)[1] == 250
    assert time.monotonic() - start > 2  # 100 in each of the first two seconds


def test_limit_of_the_cgroup_makes_the_guest_wait(tenant):
    tenant.limit("50 1000000")
    start = time.monotonic()
    assert tenant.run("storm64", "LOCKS=150", ratelimit=0)[1] == 150
    assert time.monotonic() - start > 2  # 50 at once, then one every 20 ms
    assert tenant.counts()["nr_throttled"] >= 90


def expected_branches():
    at = guests.symbols("lbr64", "ROUNDS=8", "SHOWN=5")
    routine = [
        (at["the_return"], at["returned"]),
        (at["the_indirect"], at["landed"]),
        (at["the_jump"], at["over"]),
        (at["the_call"], at["routine"]),
        (at["the_jcc"], at["the_call"]),
    ]
    return "".join(f"{source:04x} -> {target:04x}\n" for source, target in routine)


#: QEMU asks the real processor for family and model; KVM gives records to its own model only.
LBR_CPU = "pc -cpu host,model=106,lbr-fmt=0x5"


@pytest.mark.parametrize("tenant", ["lab-intel"], indirect=True)
def test_guest_of_qemu_reads_its_last_branches_unless_the_host_takes_them(tenant):
    assert tenant.run("lbr64", "ROUNDS=8", "SHOWN=5", machine=LBR_CPU)[0] == expected_branches()
    assert tenant.shell.kvmsim("lbr", "take").returncode == 0
    taken = tenant.run("lbr64", "ROUNDS=8", "SHOWN=5", machine=LBR_CPU)[0]
    assert taken == "0000 -> 0000\n" * 5
