"""The per-user directory for sockets and entries, and what is registered there.

One entry per mount: ``KEY.json`` says which directory is served by which process, ``KEY.sock``
is its control socket, ``KEY.log`` what it logs; KEY is a digest of the mounted directory. An entry
whose process has gone is stale: the process is known by pid and start time, so that a reused pid
is not mistaken for it.
"""

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cgfs.control.errors import CommandError, from_oserror

NAME = "kvmsim"
OVERRIDE = "KVMSIM_RUNTIME_DIR"
KEY_DIGITS = 16
SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its final NUL


class Entry(msgspec.Struct, frozen=True):
    """What is known about one mount without asking its process.

    ``started`` is the process's start time in clock ticks since boot (field 22 of
    /proc/PID/stat). ``created`` tells whether the directory was made for the mount and is to be
    removed with it.
    """

    kind: str
    directory: str
    pid: int
    started: int
    uid: int
    created: bool = False

    @property
    def alive(self) -> bool:
        """Whether the process that wrote the entry still runs (as the user who wrote it)."""
        return start_time(self.pid) == self.started and owner(self.pid) == self.uid


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def owner(pid: int) -> int | None:
    """The user a process runs as; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except FileNotFoundError:
        return None


def candidates(uid: int, environment: dict[str, str]) -> list[Path]:
    """Where a user's runtime directory may be, the preferred place first.

    ``KVMSIM_RUNTIME_DIR`` is the only place if it is set: for whoever must not meet other hosts.
    """
    if chosen := environment.get(OVERRIDE):
        return [Path(chosen).absolute()]  # a server in the background is in another directory
    base = environment.get("XDG_RUNTIME_DIR", "")
    places = [Path(base) / NAME] if base.startswith("/") else []
    places.append(Path("/run") / NAME if uid == 0 else Path(f"/tmp/{NAME}-{uid}"))
    return places


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    """One such directory; make it with ``RuntimeDir.mine``."""

    path: Path

    @classmethod
    def mine(cls) -> "RuntimeDir":
        """The directory of the calling user, created if it is not there.

        Raises:
            CommandError: every place for it is missing or belongs to somebody else.
        """
        refusals = []
        for path in candidates(os.geteuid(), dict(os.environ)):
            try:
                _make_private(path)
            except (OSError, CommandError) as error:
                refusals.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            else:
                return cls(path)
        raise CommandError(f"no runtime directory ({'; '.join(refusals)})", os.EX_OSERR)

    @classmethod
    def readable(cls) -> list["RuntimeDir"]:
        """Every directory whose entries concern the calling user.

        A host started with another environment (a login session, a service) is found too; root
        finds those of all users, after its own.
        """
        places = candidates(os.geteuid(), dict(os.environ))
        if os.geteuid() == 0 and OVERRIDE not in os.environ:
            places += sorted(Path("/run/user").glob(f"*/{NAME}"))
            places += sorted(Path("/tmp").glob(f"{NAME}-*"))
        found = dict.fromkeys(path for path in places if _is_private(path))
        return [cls(path) for path in found]

    def socket(self, directory: Path) -> Path:
        """The control socket of the mount on a directory."""
        return self._file(directory, ".sock")

    def log(self, directory: Path) -> Path:
        """The log of the process behind a directory."""
        return self._file(directory, ".log")

    def frozen(self, directory: Path) -> Path:
        """The record of real processes that the server has stopped."""
        return self._file(directory, ".frozen")

    def read(self, directory: Path) -> Entry | None:
        """The entry of a directory (a resolved path), stale or not."""
        return _read(self._file(directory, ".json"))

    def entries(self) -> list[Entry]:
        """All entries, oldest first, stale ones too."""
        entries = [_read(path) for path in self.path.glob("*.json")]
        return sorted((e for e in entries if e), key=lambda e: (e.started, e.directory))

    def write(self, entry: Entry) -> None:
        """Registers a mount, in one step for whoever reads.

        Raises:
            CommandError: it cannot be written.
        """
        path = self._file(Path(entry.directory), ".json")
        new = path.with_suffix(".new")
        try:
            new.write_bytes(msgspec.json.encode(entry))
            new.replace(path)
        except OSError as error:  # write(2) does not say which file it was
            raise from_oserror(error, str(path)) from error

    def remove(self, directory: Path) -> None:
        """Forgets a mount: everything that is kept for it."""
        for suffix in (".json", ".sock", ".log", ".frozen", ".new"):
            self._file(directory, suffix).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other commands of this user from starting or clearing a mount meanwhile."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # A server forked meanwhile has a copy of the descriptor, which must not keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _file(self, directory: Path, suffix: str) -> Path:
        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:KEY_DIGITS]
        return self.path / f"{digest}{suffix}"


def find_entry(directory: Path) -> tuple[RuntimeDir, Entry] | None:
    """The entry of a directory wherever it was written; a live one before a stale one."""
    found = [
        (runtime, entry) for runtime in RuntimeDir.readable() if (entry := runtime.read(directory))
    ]
    found.sort(key=lambda pair: not pair[1].alive)
    return found[0] if found else None


def _read(path: Path) -> Entry | None:
    try:
        owner = path.stat().st_uid
        entry = msgspec.json.decode(path.read_bytes(), type=Entry)
    except (FileNotFoundError, msgspec.DecodeError):
        return None  # never registered, cleared meanwhile, or not written by us
    # Root reads the entries of others and acts on them: nobody may speak for another user.
    return entry if entry.uid == owner else None


def _make_private(path: Path) -> None:
    if len(os.fsencode(path)) + len("/.sock") + KEY_DIGITS > SOCKET_PATH_BYTES:
        raise CommandError("too long for the path of a socket")
    parent = path.parent.stat()
    # A session directory kept in the environment across su belongs to somebody else.
    if parent.st_uid != os.geteuid() and not parent.st_mode & stat.S_ISVTX:
        raise CommandError(f"{path.parent} is not ours")
    path.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(path):
        raise CommandError("it is not a directory of this user alone")


def _is_private(path: Path) -> bool:
    """A real directory that nobody else can write to, owned by us (or, for root, by its user)."""
    try:
        found = path.lstat()
    except OSError:
        return False
    owners = {os.geteuid()} if os.geteuid() else {found.st_uid}
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid in owners
        and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    )


def open_log(path: Path) -> int:
    """Opens a log file for appending, private to its user.

    Raises:
        CommandError: it cannot be created.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_oserror(error, f"cannot open the log {path}") from error
