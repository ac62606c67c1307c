"""A Linux kernel as guest: it boots, its clocks and processors work, every bus lock counts.

Asked for by KVMSIM_LINUX, the path of a kernel image (Debian's linux-image-cloud-amd64 has one).
It takes half a minute on a machine with nothing else to do.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sessions.session import fuse, shell

__all__ = ["fuse", "shell"]

KERNEL = os.environ.get("KVMSIM_LINUX", "")
QEMU = "qemu-system-x86_64"
LOCKS = 1000
SECONDS = 280
#: What a kernel says when its processor, clock or memory is not what it should be.
TROUBLE = (
    *("BUG", "WARNING", "Oops", "general protection", "segfault", "unchecked MSR", "Kernel panic"),
    *("soft lockup", "rcu: INFO", "unstable", "skewed", "spurious"),
)
INTEL = "host,vendor=GenuineIntel,family=6,model=143"

pytestmark = [
    pytest.mark.timeout(SECONDS + 20),
    pytest.mark.skipif(not KERNEL, reason="KVMSIM_LINUX names no kernel image"),
]


def entry(name, mode, content=b"", device=(0, 0), number=1):
    """One file of an initramfs (Linux, Documentation/driver-api/early-userspace)."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


@pytest.fixture
def initramfs(compiled, tmp_path):
    """The first program and its console."""
    program = Path(compiled("init", "-static", f"-DLOCKS={LOCKS}")).read_bytes()
    path = tmp_path / "initramfs"
    path.write_bytes(
        entry("dev", 0o40755)
        + entry("dev/console", 0o20600, device=(5, 1), number=2)
        + entry("init", 0o100755, program, number=3)
        + entry("TRAILER!!!", 0)
    )
    return path


@pytest.mark.parametrize(
    ("preset", "processor", "nr_cpus"),
    [("spr-buslock", INTEL, 1), ("spr-buslock", INTEL, 2), ("lab-amd", "host", 1)],
)
def test_kernel_boots_and_its_bus_locks_are_counted(
    shell, fuse, initramfs, preset, processor, nr_cpus
):
    del fuse
    if shutil.which(QEMU) is None:
        pytest.skip(f"needs {QEMU} (Debian's qemu-system-x86)")
    started = shell.kvmsim("up", "host", "--preset", preset)
    assert (started.returncode, started.stderr) == (0, "")
    try:
        cgroup = shell.home / "host/sys/fs/cgroup"
        (cgroup / "cgroup.subtree_control").write_text("+bus_lock")
        (cgroup / "tenant").mkdir()
        text = boot(shell, initramfs, processor, nr_cpus)
        counted = int((cgroup / "tenant/bus_lock.stat").read_text().split()[1])
    finally:
        shell.kvmsim("down", "host")
    said = [line for line in text.splitlines() if line.startswith("init: ")]
    assert said == [
        "init: slept well",
        f"init: {LOCKS} split",
        f"init: {LOCKS} whole",
        "init: 8 of 8 children ended well",
        f"init: {nr_cpus} processors",
    ]
    assert [line for line in text.splitlines() if any(word in line for word in TROUBLE)] == []
    # With more processors, those that start up wait in QEMU's BIOS for a lock that is in memory
    # of type WP, and every try is a bus lock.
    assert counted == LOCKS or (nr_cpus > 1 and counted > LOCKS)
    # The kernel on Intel's processors asks for the #DB, and says so ten times at most.
    assert ("init/1 took a bus_lock trap" in text) == (processor == INTEL)


def boot(shell, initramfs, processor, nr_cpus):
    """What a guest prints until it reboots."""
    options = (
        f"-accel kvm -M pc,bus-lock-ratelimit=1000000000 -cpu {processor} -smp {nr_cpus} -m 256"
        f" -nodefaults -no-reboot -display none -serial stdio -kernel {KERNEL} -initrd {initramfs}"
    )
    # On a busy machine a clock may take longer to read than the kernel believes.
    words = "console=ttyS0 panic=-1 tsc=reliable quiet loglevel=5"
    done = subprocess.run(
        ["kvmsim", "run", "--cgroup", "/tenant", "--", QEMU, *options.split(), "-append", words],
        cwd=shell.home,
        env=shell.environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
