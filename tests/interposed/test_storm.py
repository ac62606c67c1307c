"""`tools/demo --guest x86`, after its setup: a real QEMU, a real guest, limits that hold."""

import shutil
import sys
from pathlib import Path

import pytest
from sessions.session import fuse, ordinary, shell

__all__ = ["fuse", "ordinary", "shell"]

TOOLS = Path(__file__).parents[2] / "tools"
STORM = ("env", f"PYTHONPATH={TOOLS}", sys.executable, "-m", "storm")


@pytest.fixture(params=["shell", "ordinary"])
def session(request, fuse):
    """A session of root and one of an ordinary user."""
    del fuse
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64 (Debian's qemu-system-x86)")
    pytest.importorskip("matplotlib", reason="needs matplotlib (tools/setup demo)")
    pytest.importorskip("unicorn", reason="needs the extra x86")
    return request.getfixturevalue(request.param)


def test_limits_hold_and_are_drawn(session):
    done = session.run(*STORM, "--seconds", "1.5")
    if "seccomp" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    assert done.stdout.endswith("demo: the picture is in bus-locks.png\n")
    assert (session.home / "bus-locks.png").read_bytes().startswith(b"\x89PNG")


def test_machine_without_qemu_is_told_what_is_missing(shell):
    done = shell.run("env", "PATH=/nonexistent", *STORM[1:])
    assert (done.returncode, done.stdout) == (69, "")
    assert (
        done.stderr
        == "demo: needs qemu-system-x86_64: on Debian, apt-get install qemu-system-x86\n"
    )
