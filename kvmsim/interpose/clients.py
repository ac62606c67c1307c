"""Who a trapped call comes from: threads, processes and address spaces.

Numbers of threads are used again, so nothing is remembered by number alone. A thread is held by an
open /proc/TID directory, which the kernel ties to that very thread: once it has ended, every look
through it fails. An address space is held by an open /proc/PID/mem, which reads nothing any more
once the process has executed another program or ended.
"""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EBADF, EFAULT, ESRCH
from typing import TYPE_CHECKING, Final, Protocol

from kvmsim.errors import KvmError
from kvmsim.interpose import libc, maps, memory

if TYPE_CHECKING:
    from kvmsim.kvm.dispatch import KvmFile
    from kvmsim.kvm.eventfds import Eventfd

FRESH_NS: Final = 100_000
"""For how long after a call a thread is taken to execute the same program: to execute another one
takes Linux longer."""

MAX_THREADS: Final = 4096
"""Threads remembered; beyond that the oldest are looked up again."""

_CAP_IPC_LOCK: Final = 14
_READ_AT_ONCE: Final = 1 << 20


class Calls(Protocol):
    """What a caller needs of whoever answers it."""

    def still_waits(self) -> bool:
        """Whether the present call still waits for its answer."""

    def file_of(self, thread: Thread, fd: int) -> KvmFile | None:
        """What a thread has open under a number, if it is ours."""

    def eventfd(self, pid: int, fd: int) -> Eventfd:
        """Hold an eventfd of a process; KvmError EBADF not open, EINVAL something else."""


class AddressSpace:
    """Identity of a client's memory."""

    __slots__ = ()


class Thread:
    """A thread that has called.

    Attributes:
        number: its number.
        directory: descriptor of its /proc directory; -1 when forgotten.
        process: whose it is, as of its last call.
        checked_ns: when that was last made sure of.
    """

    __slots__ = ("checked_ns", "directory", "number", "process")

    def __init__(self, number: int, directory: int, process: Process) -> None:
        self.number = number
        self.directory = directory
        self.process = process
        self.checked_ns = -FRESH_NS
        process.thread = self

    def text(self, name: str) -> bytes:
        """A file of its /proc directory.

        Raises:
            OSError: it has ended, or is not to be looked at.
        """
        if self.directory < 0:  # to make room for others; whoever asks knows it is still there
            return _text(f"/proc/{self.number}/{name}", None)
        return _text(name, self.directory)

    def waited_ns(self) -> int:
        """How long it has been ready to run and did not, since it began; 0 once it has ended."""
        try:
            # Its own time on the CPU, then the time it waited for one.
            return int(self.text("schedstat").split()[1])
        except OSError:
            return 0


class Process:
    """A process while it executes one program: the caller of KVM's calls.

    Attributes:
        pid: its number in this process's namespace; whose cgroup is charged.
        mm: its address space; a child made by vfork has its parent's until it executes.
        thread: the thread that called last, whose memory and descriptors are looked at.
    """

    __slots__ = ("_calls", "_mem", "_sharer", "mm", "pid", "thread")

    thread: Thread

    def __init__(self, pid: int, mem: int, calls: Calls, sharer: Process | None) -> None:
        self.pid = pid
        self.mm: object = AddressSpace() if sharer is None else sharer.mm
        self._mem = mem
        self._calls = calls
        self._sharer = sharer

    # -- as KVM's client -------------------------------------------------------------------

    @property
    def memlock_bytes(self) -> int | None:
        """See :class:`kvmsim.kvm.client.Client`."""
        try:
            capabilities = int(_after(self.thread.text("status"), b"CapEff:"), 16)
            limit = _after(self.thread.text("limits"), b"Max locked memory")
        except (OSError, ValueError):
            return 0
        if capabilities >> _CAP_IPC_LOCK & 1 or limit == b"unlimited":
            return None
        return int(limit)

    def file(self, fd: int) -> KvmFile | None:
        """See :meth:`kvmsim.kvm.client.Client.file`."""
        number = fd & 0xFFFF_FFFF
        file = self._calls.file_of(self.thread, number)
        if file is None:
            try:
                os.stat(f"fd/{number}", dir_fd=self.thread.directory)
            except OSError as error:
                raise KvmError(EBADF, f"descriptor {fd}") from error
        return file

    def eventfd(self, fd: int) -> Eventfd:
        """See :class:`kvmsim.kvm.eventfds.HasEventfds`."""
        return self._calls.eventfd(self.pid, fd & 0xFFFF_FFFF)

    def mapped(self, address: int, size_bytes: int, *, writable: bool) -> bool:
        """See :meth:`kvmsim.kvm.client.Client.mapped`."""
        try:
            text = self.thread.text("maps").decode(errors="replace")
        except OSError:
            return False
        found = maps.covering(text, address, size_bytes)
        if found is None:
            return False
        return all(mapping.writable if writable else mapping.readable for mapping in found)

    def read(self, address: int, size_bytes: int) -> bytes:
        """See :meth:`kvmsim.kvm.client.Client.read`."""
        return memory.read(self.thread.number, address, size_bytes)

    def write(self, address: int, data: bytes) -> None:
        """See :meth:`kvmsim.kvm.client.Client.write`."""
        # The caller's number may belong to another process by now, which is not to be touched.
        if not self._calls.still_waits():
            raise KvmError(EFAULT, "the caller is gone")
        memory.write(self.thread.number, address, data)

    # -- for the table ---------------------------------------------------------------------

    def is_current(self, instruction_pointer: int) -> bool:
        """Whether the process still executes the same program.

        Args:
            instruction_pointer: an address that is readable if it does.
        """
        if self._mem < 0:
            return False
        try:
            alive = bool(os.pread(self._mem, 1, instruction_pointer))
        except OSError:  # the address space is there, the address is not
            alive = True
        if alive and self._sharer is not None:
            # Its own program shows only in that it no longer shares its parent's memory.
            return libc.same_address_space(self.thread.number, self._sharer.thread.number)
        return alive

    def close(self) -> None:
        """Forget the address space. The object stays what VMs compare their callers with."""
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1


class Clients:
    """Every thread and process that has called and may call again.

    Args:
        calls: who answers them.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._threads: dict[int, Thread] = {}
        self._processes: dict[int, Process] = {}
        #: A thread that has called before, by number; the number may be another's by now.
        self.known = self._threads.get

    def meet(self, number: int) -> Thread:
        """Get to know the thread that has a number now.

        Raises:
            OSError: it has ended (ENOENT, ESRCH).
        """
        self.forget(number)
        if len(self._threads) >= MAX_THREADS:
            self._make_room()
        directory = os.open(f"/proc/{number}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            process = self._look_up(number, directory)
        except BaseException:
            os.close(directory)
            raise
        thread = self._threads[number] = Thread(number, directory, process)
        return thread

    def caller(self, thread: Thread, instruction_pointer: int, now_ns: int) -> Process:
        """The process of a thread, checked to execute what it did at its last call.

        Needed again ``FRESH_NS`` after the last check.

        Raises:
            OSError: it has ended.
        """
        process = thread.process
        if not process.is_current(instruction_pointer):
            process = thread.process = self._look_up(thread.number, thread.directory)
        thread.checked_ns = now_ns
        process.thread = thread
        return process

    def forget(self, number: int) -> None:
        """A thread's number does not mean what it did."""
        thread = self._threads.pop(number, None)
        if thread is not None:
            os.close(thread.directory)
            thread.directory = -1

    def close(self) -> None:
        """Let go of everything."""
        for number in list(self._threads):
            self.forget(number)
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def _look_up(self, number: int, directory: int) -> Process:
        """The process of a thread. Its first thread may have ended before the others."""
        pid = _tgid(directory)
        known = self._processes.get(pid)
        if known is not None and known.is_current(0):
            return known
        mem = os.open("mem", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        if known is not None:
            known.close()
            del self._processes[pid]
        self._forget_dead()
        sharer = next(
            (
                other
                for other in self._processes.values()
                if libc.same_address_space(number, other.thread.number)
            ),
            None,
        )
        process = self._processes[pid] = Process(pid, mem, self._calls, sharer)
        return process

    def _forget_dead(self) -> None:
        for pid, process in list(self._processes.items()):
            if not process.is_current(0):
                process.close()
                del self._processes[pid]

    def _make_room(self) -> None:
        for number in list(self._threads)[: MAX_THREADS // 2]:
            self.forget(number)


def _text(name: str, directory: int | None) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        parts = []
        while part := os.read(fd, _READ_AT_ONCE):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _after(text: bytes, label: bytes) -> bytes:
    """The first word behind a label."""
    _, found, rest = text.partition(b"\n" + label)
    if not found:
        msg = f"no {label.decode()}"
        raise ValueError(msg)
    return rest.split(None, 1)[0]


def _tgid(directory: int) -> int:
    """The process of a thread."""
    with suppress(ValueError):
        return int(_after(_text("status", directory), b"Tgid:"))
    raise ProcessLookupError(ESRCH, "no process of that thread")
