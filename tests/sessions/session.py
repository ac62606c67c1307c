"""Commands as real processes: a directory of their own, no host of the user's in sight."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]
# As an installed console script: the interpreter by its path, the program by its name.
SCRIPT = """#!{python}
import sys
import tempfile
import time
sys.path.insert(0, {source!r})
from {program}.cli import main
main()
"""


@dataclass
class Shell:
    """A user's session: an environment, a home, and programs to call in it."""

    home: Path
    environment: dict[str, str]

    def run(self, *command, cwd=None, **options):
        """Runs a command to its end and keeps what it printed."""
        return subprocess.run(
            command,
            cwd=cwd or self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )

    def kvmsim(self, *arguments, **options):
        return self.run("kvmsim", *map(str, arguments), **options)

    def cgfs(self, *arguments, **options):
        return self.run("cgfs", *map(str, arguments), **options)

    @property
    def runtime(self):
        """Where this session's sockets and entries are."""
        return Path(self.environment["KVMSIM_RUNTIME_DIR"])

    def leftovers(self):
        """What a session must not leave: entries, sockets, logs, mounts and servers."""
        registered = [path.name for path in self.runtime.glob("*")]
        mounts = Path("/proc/self/mountinfo").read_text()
        below = [line for line in mounts.splitlines() if str(self.home) in line]
        return registered + below + [f"pid {pid}" for pid in self.processes()]

    def server(self):
        """The process behind the only mount of this session."""
        [entry] = self.runtime.glob("*.json")
        return json.loads(entry.read_bytes())["pid"]

    def processes(self):
        """Everything that knows this session's runtime directory, servers and their helpers."""
        wanted = os.fsencode(f"KVMSIM_RUNTIME_DIR={self.environment['KVMSIM_RUNTIME_DIR']}")
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (proc / "environ").read_bytes().split(b"\0"):
                    found.append(int(proc.name))
            except OSError:
                continue
        return found


@pytest.fixture
def shell(tmp_path):
    """A session that must leave nothing behind."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("kvmsim", "cgfs"):
        script = programs / program
        text = SCRIPT.format(python=sys.executable, program=program, source=str(SOURCE))
        script.write_text(text)
        script.chmod(0o755)
    for name in ("home", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    environment = {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Apart from the hosts of whoever runs the tests.
        "KVMSIM_RUNTIME_DIR": str(tmp_path / "run/kvmsim"),
        "LC_ALL": "C.UTF-8",
    }
    session = Shell(tmp_path / "home", environment)
    yield session
    left = session.leftovers()
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:  # fusermount3 notices the end of its server
        time.sleep(0.02)
        left = session.leftovers()
    for pid in session.processes():
        os.kill(pid, signal.SIGKILL)
    for name in ("host", "other", "tree"):
        subprocess.run(["umount", "-l", session.home / name], capture_output=True, check=False)
    assert left == []


NOBODY = 65534

# In a mount namespace of its own, so that the machine's device and directories stay as they are:
# a device for everybody or for root alone, and a way to the interpreter if that is in a closed
# directory.
BECOME_NOBODY = """
set -e
mknod "$DEVICE" c 10 229; chmod "$DEVICE_MODE" "$DEVICE"
mount --bind "$DEVICE" /dev/fuse; rm "$DEVICE"
if [ -n "$CLOSED" ]; then
    mkdir prefix; mount --bind "$PREFIX" prefix
    mount -t tmpfs -o mode=755 none "$CLOSED"
    mkdir -p "$PREFIX"; mount --bind prefix "$PREFIX"; umount prefix; rmdir prefix
fi
setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
eval "$THEN"
"""


@dataclass
class OrdinaryShell(Shell):
    """A session of a user who is not root, in a directory that this user can reach."""

    open_device: bool = True
    then: str = ""

    def run(self, *command, cwd=None, **options):
        """Runs a command as that user."""
        closed = [p for p in Path(sys.base_prefix).parents if not p.stat().st_mode & 0o001]
        environment = {
            "DEVICE": str(self.home / "fuse"),
            "DEVICE_MODE": "666" if self.open_device else "600",
            "CLOSED": str(closed[-1]) if closed else "",
            "PREFIX": sys.base_prefix,
            # What root does afterwards, in the same mount namespace.
            "THEN": self.then,
        }
        plain = Shell(self.home, self.environment | environment)
        become = ("unshare", "-m", "sh", "-c", BECOME_NOBODY, "sh")
        return plain.run(*become, *command, cwd=cwd, **options)


@pytest.fixture
def ordinary(shell):
    """An ordinary user's session."""
    place = Path(tempfile.mkdtemp(prefix="kvmsim-session-"))
    place.chmod(0o755)
    shutil.copytree(shell.home.parent / "bin", place / "bin")
    for name in ("home", "run"):
        (place / name).mkdir()
        os.chown(place / name, NOBODY, NOBODY)
    environment = shell.environment | {
        "HOME": str(place / "home"),
        "KVMSIM_RUNTIME_DIR": str(place / "run/kvmsim"),
        "PATH": f"{place}/bin:{os.environ['PATH']}",
    }
    session = OrdinaryShell(place / "home", environment)
    yield session
    for pid in session.processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(place)


def why_no_fuse():
    """Says why nothing can be mounted here; None if it can."""
    device = Path("/dev/fuse")
    if not device.exists() or not stat.S_ISCHR(device.stat().st_mode):
        return "needs /dev/fuse"
    if not os.access(device, os.R_OK | os.W_OK):
        return "needs permission to open /dev/fuse"
    return None


@pytest.fixture
def fuse():
    """Skips where nothing can be mounted."""
    if reason := why_no_fuse():
        pytest.skip(reason)
