import pytest
from sessions.session import fuse, ordinary, shell

__all__ = ["fuse", "ordinary", "shell"]


@pytest.fixture
def host(shell, fuse):
    """A small host, mounted on the home's ``host``."""
    started = shell.kvmsim("up", "host", "--preset", "lab-amd", "--seed", "1")
    assert (started.returncode, started.stderr) == (0, "")
    directory = shell.home / "host"
    yield directory
    if shell.processes():
        shell.kvmsim("down", directory)
