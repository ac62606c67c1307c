"""Debian's QEMU as a client: its own bus lock limiter, and the emulated kernel's.

Its guest is a script. Times are those of the calls, so that QEMU's start does not count.
"""

import json
import re
import shutil
import subprocess
import time

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


def command(machine, serial="stdio", options=("--trace", "trace")):
    words = (
        f"{QEMU} -accel kvm -m 16 -bios rom -nodefaults -display none -serial {serial} "
        f"-device isa-debug-exit,iobase=0xf4,iosize=1 -M {machine}"
    )
    return ("run", "--guest", "script:guest", *options, "--", *words.split())


def run_qemu(shell, ratelimit, *options):
    machine = f"pc,kernel_irqchip=off,bus-lock-ratelimit={ratelimit}"
    return shell.kvmsim(*command(machine, options=("--trace", "trace", *options)))


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


@pytest.mark.parametrize(
    "machine",
    [
        "pc",
        "pc -smp 4",
        "q35,kernel_irqchip=split -smp 2",
        "microvm",
        "pc -cpu host -sandbox on,obsolete=deny,spawn=deny",
    ],
)
def test_machines_of_every_kind_start(shell, host, machine):
    done = shell.kvmsim(*command(machine))
    assert (done.stdout, done.returncode) == (PRINTED, EXITED), done.stderr


def test_monitor_stops_and_continues_a_guest_that_halts(shell, host):
    (shell.home / "guest").write_text("hlt\n")
    client = (*command("pc", serial="none"), "-monitor", "stdio")
    done = shell.kvmsim(*client, input="stop\ncont\ninfo kvm\nquit\n")
    assert (done.returncode, "kvm support: enabled" in done.stdout) == (0, True), done.stderr


def sev_machine(shell):
    """A machine with a SEV guest. QEMU takes the position of the C-bit from the real processor."""
    machine = "q35,confidential-guest-support=sev -object sev-guest,id=sev,reduced-phys-bits=1"
    done = shell.kvmsim(*command(f"{machine},cbitpos=63", options=()))
    position = re.search(r"cbitpos check failed, host '(\d+)'", done.stderr)
    assert position, done.stderr
    return f"{machine},cbitpos={position[1]}"


@pytest.fixture
def tenant(host):
    cgroup = host / "sys/fs/cgroup"
    (cgroup / "cgroup.subtree_control").write_text("+misc")
    (cgroup / "tenant").mkdir()
    return cgroup / "tenant"


def becomes(file, text):
    """Waits for a control file to say something."""
    deadline = time.monotonic() + 20
    while file.read_text() != text and time.monotonic() < deadline:
        time.sleep(0.02)
    return file.read_text() == text


def test_sev_guest_holds_an_asid_of_its_cgroup_until_that_is_killed(shell, host, tenant):
    (shell.home / "guest").write_text("hlt\n")
    client = command(sev_machine(shell), options=("--cgroup", "/tenant"))
    with subprocess.Popen(
        ("kvmsim", *client), cwd=shell.home, env=shell.environment, stderr=subprocess.DEVNULL
    ) as process:
        charged = becomes(tenant / "misc.current", "sev 1\nsev_es 0\n")
        (tenant / "cgroup.kill").write_text("1")
    assert (charged, process.returncode) == (True, 128 + 9)
    assert becomes(tenant / "misc.current", "sev 0\nsev_es 0\n")


def test_sev_guest_over_the_limit_of_its_cgroup_makes_qemu_say_so(shell, host, tenant):
    machine = sev_machine(shell)
    (tenant / "misc.max").write_text("sev 0")
    done = shell.kvmsim(*command(machine, options=("--cgroup", "/tenant")))
    assert done.returncode == 1
    assert "failed to initialize ret=-16" in done.stderr  # EBUSY
    assert (tenant / "misc.events").read_text() == "sev.max 1\nsev_es.max 0\n"
