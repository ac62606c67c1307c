"""The worlds that are measured side by side; each is taken down to the last trace.

A world offers up to three things to work on; what it cannot offer is None, and the table shows a
dash.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 10
GROUP = "limit"


class MissingWorldError(Exception):
    """This machine cannot show the world; the text says why."""


@dataclass(frozen=True)
class World:
    """What one world offers.

    Attributes:
        name: Heading of its column.
        limit: A file that holds a limit and that nobody changes.
        texts: Two values the limit file takes.
        counter: A file whose text may be another at every read.
        nest: A directory; a cgroup made in it has the full set of files.
        server: Process id of the program that answers, if there is one.
    """

    name: str
    limit: Path | None = None
    texts: tuple[str, str] = ("", "")
    counter: Path | None = None
    nest: Path | None = None
    server: int | None = None


# Controllers by how close their files are to ours: one number to limit, one number to count.
_KERNEL_FILES = {
    "hugetlb": ("hugetlb.2MB.max", "hugetlb.2MB.current", ("2097152", "4194304")),
    "pids": ("pids.max", "pids.current", ("1000", "2000")),
    "memory": ("memory.max", "memory.current", ("1073741824", "2147483648")),
}


@contextlib.contextmanager
def kernel(_scratch: Path) -> Iterator[World]:
    """Yields the machine's own cgroup2, in a cgroup of ours that is removed afterwards."""
    root = _cgroup2_mount()
    with contextlib.ExitStack() as stack:
        top = root / f"bench.{os.getpid()}"
        try:
            name = _enable_one(root, stack)
            top.mkdir()
            stack.callback(top.rmdir)
            (top / "cgroup.subtree_control").write_text(f"+{name}")
            (top / GROUP).mkdir()
            stack.callback((top / GROUP).rmdir)
        except OSError as error:
            raise MissingWorldError(f"cgroup2 cannot be written: {error}") from error
        limit, counter, texts = _KERNEL_FILES[name]
        (top / GROUP / limit).write_text(texts[0])
        yield World("kernel", top / GROUP / limit, texts, top / GROUP / counter, top)


def _cgroup2_mount() -> Path:
    """Returns where the machine's cgroup2 is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _source, target, kind, *_rest = line.split()
        if kind == "cgroup2":
            return Path(target)
    raise MissingWorldError("no cgroup2 is mounted")


def _enable_one(root: Path, stack: contextlib.ExitStack) -> str:
    """Enables the first controller that can be compared; the stack takes it back if it was off."""
    control = root / "cgroup.subtree_control"
    available = (root / "cgroup.controllers").read_text().split()
    for name in _KERNEL_FILES:
        if name in available:
            if name not in control.read_text().split():
                control.write_text(f"+{name}")
                stack.callback(_write_if_possible, control, f"-{name}")
            return name
    raise MissingWorldError(f"cgroup2 has none of the controllers {', '.join(_KERNEL_FILES)}")


def _write_if_possible(file: Path, text: str) -> None:
    """Writes; somebody else may have come to need the controller meanwhile."""
    with contextlib.suppress(OSError):
        file.write_text(text)


@contextlib.contextmanager
def lxcfs(scratch: Path) -> Iterator[World]:
    """Yields Debian's lxcfs, a FUSE server in C with live files, in a directory of its own."""
    program = shutil.which("lxcfs")
    if program is None:
        raise MissingWorldError("lxcfs is not installed")
    target = scratch / "lxcfs"
    command = [program, "-f", "-p", str(scratch / "lxcfs.pid"), str(target)]
    with served(command, target, target / "proc/uptime") as server:
        uptime = target / "proc/uptime"
        # It stands for an unchanged file as well: lxcfs knows only one way to serve one.
        yield World("lxcfs", limit=uptime, counter=uptime, server=server.pid)


@contextlib.contextmanager
def c_libfuse(scratch: Path) -> Iterator[World]:
    """Yields limit.c: what any FUSE server could do at best with a live file."""
    program = compiled("limit", scratch, libraries=("fuse3",))
    target = scratch / "limit.mount"
    with served([str(program), str(target)], target, target / "counter") as server:
        yield World("C libfuse", counter=target / "counter", server=server.pid)


@contextlib.contextmanager
def ours(scratch: Path) -> Iterator[World]:
    """Yields a `cgfs mount` with every controller enabled for the cgroups below the first level."""
    program = Path(sys.executable).with_name("cgfs")
    target = scratch / "cgfs"
    command = [str(program), "mount", "--foreground", str(target)]
    with served(command, target, target / "cgroup.controllers") as server:
        top = target / "bench"
        enable_all(target)
        top.mkdir()
        enable_all(top)
        group = top / GROUP
        group.mkdir()
        (group / "encryption_ids.sev.max").write_text("5")
        yield World(
            "cgfs",
            limit=group / "encryption_ids.sev.max",
            texts=("5", "7"),
            counter=group / "encryption_ids.sev.current",
            nest=top,
            server=server.pid,
        )


def enable_all(cgroup: Path) -> None:
    """Gives the children of a cgroup the full set of files."""
    controllers = (cgroup / "cgroup.controllers").read_text().split()
    (cgroup / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


@contextlib.contextmanager
def served(
    command: Sequence[str], target: Path, witness: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a FUSE server in the foreground and yields once `witness` is there.

    Raises:
        MissingWorldError: It could not be started, or gave up; with its last words.
    """
    target.mkdir()
    log = target.with_suffix(".log")
    with log.open("wb") as output:
        try:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise MissingWorldError(f"{command[0]}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + START_SECONDS
        while not witness.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace").strip().splitlines() or ["said nothing"]
                raise MissingWorldError(f"{Path(command[0]).name}: {words[-1]}")
            time.sleep(0.02)
        yield server
    finally:
        _take_down(server, target)


def _take_down(server: subprocess.Popen[bytes], target: Path) -> None:
    """Ends the server, whatever state it is in, and its mount with it."""
    server.terminate()
    try:
        server.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if os.path.ismount(target) or not _answers(target):
        # It may have gone meanwhile, and nothing else can be done about a failure.
        subprocess.run(["fusermount3", "-u", "-z", str(target)], check=False, capture_output=True)


def _answers(directory: Path) -> bool:
    """Returns False where a mount has lost its server."""
    try:
        directory.stat()
    except OSError:
        return False
    return True


def compiled(name: str, scratch: Path, libraries: Sequence[str] = ()) -> Path:
    """Compiles NAME.c, which stands beside this file, and returns the program.

    Raises:
        MissingWorldError: No compiler, no library, or the compiler's own complaint.
    """
    program = scratch / name
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(program)]
    command.append(str(Path(__file__).with_name(f"{name}.c")))
    try:
        if libraries:
            command += _output("pkg-config", "--cflags", "--libs", *libraries).split()
        _output(*command)
    except FileNotFoundError as error:
        raise MissingWorldError(f"{error.filename} is not installed: run tools/setup") from error
    except subprocess.CalledProcessError as error:
        complaint: str = error.stderr.strip() or "no output"
        raise MissingWorldError(f"{error.cmd[0]}: {complaint.splitlines()[0]}") from error
    return program


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
