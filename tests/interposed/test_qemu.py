"""Debian's QEMU as a client: its own bus lock limiter, and the emulated kernel's.

Its guest is a script. Times are those of the calls, so that QEMU's start does not count.
"""

import json
import shutil

import pytest
from sessions.session import fuse, shell

__all__ = ["fuse", "shell"]

QEMU = "qemu-system-x86_64"
LOCKS = 250
SERIAL = 0x3F8
PRINTED = "done\n"
GUEST = (
    "bus-lock after=1us\n" * LOCKS
    + f"""\
io port={SERIAL:#x} data={PRINTED.encode().hex()}
io port=0xf4 data=10
"""
)
EXITED = 0x10 << 1 | 1  # isa-debug-exit's way to say 0x10


@pytest.fixture
def host(request, shell, fuse):
    """A host that is mounted on the home's ``host``, by default with bus lock exits."""
    del fuse
    if shutil.which(QEMU) is None:
        pytest.skip(f"needs {QEMU} (Debian's qemu-system-x86)")
    preset = getattr(request, "param", "lab-amd")
    started = shell.kvmsim("up", "host", "--preset", preset)
    assert (started.returncode, started.stderr) == (0, "")
    (shell.home / "guest").write_text(GUEST)
    (shell.home / "rom").write_bytes(bytes(1 << 16))
    directory = shell.home / "host"
    if (reason := shell.kvmsim("run", "true")).returncode == 69:
        shell.kvmsim("down", directory)
        pytest.skip(f"no client can be run here: {reason.stderr.strip()}")
    yield directory
    shell.kvmsim("down", directory)


def run_qemu(shell, ratelimit, *options):
    machine = f"pc,kernel_irqchip=off,bus-lock-ratelimit={ratelimit}"
    words = f"-accel kvm -M {machine} -m 16 -bios rom -nodefaults -display none -serial stdio"
    exit_device = ("-device", "isa-debug-exit,iobase=0xf4,iosize=1")
    client = (QEMU, *words.split(), *exit_device)
    return shell.kvmsim(
        *("run", "--guest", "script:guest", "--trace", "trace", *options, "--", *client)
    )


def exits(shell):
    """When KVM_RUN returned, in seconds from the first bus lock, and with what."""
    lines = (shell.home / "trace").read_text().splitlines()
    calls = [call for call in map(json.loads, lines) if call["call"] == "KVM_RUN"]
    returned = [call for call in calls if call["result"] == 0]
    first_ns = returned[0]["time_ns"]
    return [
        ((call["time_ns"] + call["took_ns"] - first_ns) / 1e9, call["exit"]) for call in returned
    ]


def bus_locks(shell):
    return [second for second, reason in exits(shell) if reason["reason"] == "X86_BUS_LOCK"]


def throttled_seconds(shell, wanted, attempts=3):
    """How long QEMU took for all bus locks; a busy machine may add to it, so the best of some."""
    took = []
    while not took or (min(took) != wanted and len(took) < attempts):
        run_qemu(shell, 100)
        seconds = bus_locks(shell)
        assert len(seconds) == LOCKS
        took.append(seconds[-1])
    return min(took)


def test_guest_runs_to_its_end_with_every_bus_lock_seen(shell, host):
    done = run_qemu(shell, 10_000)
    assert (done.stdout, done.returncode) == (PRINTED, EXITED)
    assert len(bus_locks(shell)) == LOCKS
    assert shell.kvmsim("vm", "list", "--json").stdout.strip() in ("[]", "")


def test_qemus_own_limiter_slows_the_guest_to_its_rate(shell, host):
    # 100 in each slice of one second, so the last 50 come after two.
    two_seconds = pytest.approx(2.0, rel=0.05)
    assert throttled_seconds(shell, two_seconds) == two_seconds


def test_limit_of_the_cgroup_holds_qemu_to_it(shell, host):
    cgroup = host / "sys/fs/cgroup"
    (cgroup / "cgroup.subtree_control").write_text("+bus_lock")
    (cgroup / "tenant").mkdir()
    (cgroup / "tenant/bus_lock.max").write_text("50 1000000")
    done = run_qemu(shell, 10_000, "--cgroup", "/tenant")
    assert (done.stdout, done.returncode) == (PRINTED, EXITED)
    seconds = bus_locks(shell)
    assert [n for n, second in enumerate(seconds, 1) if n > 50 + 50 * second + 1] == []
    statistics = (cgroup / "tenant/bus_lock.stat").read_text().split()
    assert statistics[:2] == ["nr_events", str(LOCKS)]


@pytest.mark.parametrize("host", ["plain-amd"], indirect=True)
def test_machine_without_bus_lock_exits_makes_qemu_say_so(shell, host):
    done = run_qemu(shell, 100)
    assert done.returncode == 1
    assert "bus lock detection unsupported" in done.stderr
