"""What /proc says about processes: state, family, credentials, pending signals.

One open, read and close per question, and no parsing beyond the asked fields: the root cgroup's
`cgroup.procs` asks about every process of the machine. A task that vanishes meanwhile is None,
never an error, and so is one that a `hidepid` mount hides.
"""

import os
from contextlib import suppress
from dataclasses import dataclass

PF_NO_SETAFFINITY = 0x04000000
PF_KTHREAD = 0x00200000
KTHREADD_PID = 2
DEAD_STATES = frozenset("ZX")
STOPPED_STATES = frozenset("Tt")
VFORK_WAITS = frozenset(
    {b"kernel_clone", b"wait_for_vfork_done", b"_do_fork", b"do_fork"}
)  # the names the sleeping function had, Linux 3.x to 6.x


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/TID/stat that matter here.

    Attributes:
        tid: the task asked about.
        state: one letter; `Z` and `X` are dead, `T` stopped, `t` traced and stopped.
        ppid: process id of the parent.
        flags: PF_* bits.
        nr_threads: threads of the process that are not yet released, a dead leader included.
        start_ticks: start time in clock ticks since boot; with the pid it names a process for good.
    """

    tid: int
    state: str
    ppid: int
    flags: int
    nr_threads: int
    start_ticks: int

    @property
    def kthread(self) -> bool:
        """A task of the kernel itself, which takes no signals."""
        return bool(self.flags & PF_KTHREAD)

    @property
    def pinned(self) -> bool:
        """A kernel thread that must not change its cgroup.

        Linux 6.12 cgroup.c cgroup_procs_write_start(): `no_cgroup_migration`, which only kthreadd
        keeps for life, or PF_NO_SETAFFINITY, which per-CPU kernel threads have.
        """
        return self.kthread and bool(self.flags & PF_NO_SETAFFINITY or self.tid == KTHREADD_PID)


@dataclass(frozen=True, slots=True)
class Status:
    """The fields of /proc/TID/status that matter here.

    Attributes:
        tgid: the process the task belongs to.
        tracer: pid of the tracer, 0 for none.
        pids: the task's number in each pid namespace, ours first, its own last.
        uid: effective uid.
        ruid: real uid.
        suid: saved uid.
        pending: signals waiting for the thread or the process; bit n-1 is signal n.
        blocked: blocked signals of this thread.
        ignored: ignored signals.
        caught: signals with a handler.
    """

    tgid: int
    tracer: int
    pids: tuple[int, ...]
    uid: int
    ruid: int
    suid: int
    pending: int
    blocked: int
    ignored: int
    caught: int


def slurp(path: str, size_bytes: int = 4096) -> bytes | None:
    """The start of one /proc file; None if the task is gone or hidden."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, size_bytes)
    except OSError:  # ESRCH: the task died between open and read
        return None
    finally:
        os.close(fd)


def read_stat(tid: int) -> Stat | None:
    """Read /proc/TID/stat; any thread's id will do."""
    text = slurp(f"/proc/{tid}/stat")
    if not text:
        return None
    # The command name may hold blanks and parentheses; the last one ends it.
    fields = text[text.rindex(b")") + 2 :].split(b" ", 20)
    return Stat(
        tid=tid,
        state=chr(fields[0][0]),
        ppid=int(fields[1]),
        flags=int(fields[6]),
        nr_threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


def state(path: str) -> str | None:
    """The state letter in a stat file, read without looking at the rest."""
    text = slurp(path)
    return chr(text[text.rindex(b")") + 2]) if text else None


def read_status(tid: int) -> Status | None:
    """Read /proc/TID/status; any thread's id will do."""
    text = slurp(f"/proc/{tid}/status", 1 << 17)  # a task may be in 65536 groups
    if not text:
        return None
    rows = dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)
    real, effective, saved, _ = (int(uid) for uid in rows[b"Uid"].split())
    return Status(
        tgid=int(rows[b"Tgid"]),
        tracer=int(rows[b"TracerPid"]),
        pids=tuple(int(pid) for pid in rows[b"NSpid"].split()),
        uid=effective,
        ruid=real,
        suid=saved,
        pending=int(rows[b"SigPnd"], 16) | int(rows[b"ShdPnd"], 16),
        blocked=int(rows[b"SigBlk"], 16),
        ignored=int(rows[b"SigIgn"], 16),
        caught=int(rows[b"SigCgt"], 16),
    )


def all_pids() -> list[int]:
    """Every process number in /proc, zombies included, ascending."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208


def live_tgids() -> list[int]:
    """Every process with a live thread, ascending."""
    return [pid for pid in all_pids() if process_alive(pid)]


def process_alive(tgid: int) -> bool:
    """Whether any thread of the process lives; a dead leader may leave others behind."""
    letter = state(f"/proc/{tgid}/stat")
    if letter is None:
        return False
    return letter not in DEAD_STATES or bool(live_threads(tgid))


def tids(tgid: int) -> list[int]:
    """Every thread of the process that is not yet released, ascending."""
    with suppress(OSError):
        return sorted(map(int, os.listdir(f"/proc/{tgid}/task")))  # noqa: PTH208
    return []


def live_threads(tgid: int) -> list[int]:
    """The live threads of a process, ascending.

    Only the leader is asked for its state: any other thread is released in the moment it dies,
    unless a tracer has not collected it yet.
    """
    found = tids(tgid)
    if tgid in found and state(f"/proc/{tgid}/stat") in DEAD_STATES | {None}:
        found.remove(tgid)
    return found


def thread_states(tgid: int) -> dict[int, str]:
    """State letter of every live thread of a process, by tid."""
    letters = {tid: state(f"/proc/{tgid}/task/{tid}/stat") for tid in tids(tgid)}
    return {tid: got for tid, got in letters.items() if got is not None and got not in DEAD_STATES}


def waits_for_vfork(tid: int) -> bool:
    """Whether a task in state D waits for its vfork child to exec or exit."""
    return slurp(f"/proc/{tid}/wchan") in VFORK_WAITS
