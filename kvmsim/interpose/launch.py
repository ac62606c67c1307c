"""Starting a client: a forked child that installs the filter and becomes the client's program.

Has to happen before the process has threads or an event loop. The child makes its namespace,
installs the filter, hands the listener over a socket, waits for leave to go on and executes.
Anything that goes wrong comes back over the same socket as one line.
"""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EACCES, EBUSY, EINVAL, ENOSYS
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmsim.interpose import filter as bpf
from kvmsim.interpose import libc, namespace
from kvmsim.interpose.errors import CommandNotRun, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvmsim.interpose.namespace import Identity

SECCOMP_SET_MODE_FILTER: Final = 1
FILTER_FLAG_NEW_LISTENER: Final = 8
FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 32

_READY = b"ready"
_GO = b"go"
_EXEC_FAILED = b"exec"
_UNAVAILABLE = b"none"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and what it is to see.

    Attributes:
        argv: program and arguments; the program is searched for in PATH.
        env: its environment; this process's by default.
        devices: names below /dev to make, as ``kvm``.
        parameters: path below /sys/module -> text.
        cgroup_dir: tree to show on /sys/fs/cgroup.
        before_exec: called in this process with the client's pid before its program starts.
        signal_mask: signals blocked in it; None: as in this process.
    """

    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    devices: Sequence[str] = ("kvm",)
    parameters: Mapping[str, str] = field(default_factory=dict)
    cgroup_dir: str | None = None
    before_exec: Callable[[int], None] | None = None
    signal_mask: Iterable[int] | None = None


@dataclass(frozen=True, slots=True)
class Launched:
    """A client whose program has started.

    Attributes:
        pid: its pid, to be waited for.
        pidfd: its pidfd.
        listener: descriptor of its filter's listener.
        devices: (device, inode) of a node -> its name.
    """

    pid: int
    pidfd: int
    listener: int
    devices: Mapping[Identity, str]


class _Filter(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def launch(command: Command) -> Launched:
    """Start a client.

    Raises:
        Unavailable: trapping calls does not work here; the message says why.
        CommandNotRun: the program could not be executed.
        OSError: no process or descriptor to be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                _child(command, theirs)
            finally:
                os._exit(127)
        theirs.close()
        try:
            return _handshake(command, pid, ours)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise


def _handshake(command: Command, pid: int, channel: socket.socket) -> Launched:
    message, fds, _, _ = socket.recv_fds(channel, 1 << 16, 1)
    if not message.startswith(_READY):
        raise _failure(message)
    listener = fds[0]
    os.set_inheritable(listener, False)
    try:
        numbers = [int(word) for word in message[len(_READY) :].split()]
        identities = zip(numbers[::2], numbers[1::2], strict=True)
        devices = dict(zip(identities, command.devices, strict=True))
        if command.before_exec is not None:
            command.before_exec(pid)
        channel.send(_GO)
        # The socket closes with the exec, unless that fails.
        if failed := channel.recv(1 << 16):
            raise _failure(failed)
        return Launched(pid, os.pidfd_open(pid), listener, devices)
    except BaseException:
        os.close(listener)
        raise


def _failure(message: bytes) -> Exception:
    kind, _, rest = message.partition(b" ")
    if kind == _EXEC_FAILED:
        number, _, text = rest.partition(b" ")
        return CommandNotRun(int(number), text.decode(errors="replace"))
    text = rest if kind == _UNAVAILABLE else b"the client ended before its program was started"
    return Unavailable(text.decode(errors="replace"))


# -- in the child ------------------------------------------------------------------------------


def _child(command: Command, channel: socket.socket) -> None:
    """Become the client; returns only if that failed, and has then told the parent."""
    try:
        _refuse_tracer()
        devices = _make_namespace(command)
        listener = _install_filter(cgroup=command.cgroup_dir is not None)
    except Exception as error:  # it has nowhere else to go
        channel.send(_UNAVAILABLE + b" " + str(error).encode())
        return
    numbers = " ".join(f"{dev} {ino}" for dev, ino in devices)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))]
    channel.sendmsg([_READY + b" " + numbers.encode()], ancillary)
    os.close(listener)
    if channel.recv(16) != _GO:
        return
    # Python ignores these; programs do not expect that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if command.signal_mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, command.signal_mask)
    env = dict(os.environ if command.env is None else command.env)
    try:
        os.execvpe(command.argv[0], list(command.argv), env)
    except OSError as error:
        text = f"{command.argv[0]}: {error.strerror}"
        channel.send(_EXEC_FAILED + f" {error.errno} {text}".encode())


def _refuse_tracer() -> None:
    """A tracer that follows its processes would wait for stops this client does not make."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("TracerPid:") and line.split()[1] != "0":
            raise Unavailable(
                f"the client is traced by process {line.split()[1]} (strace or a debugger); "
                "use kvmsim run --trace, or attach to the client once it runs"
            )


def _make_namespace(command: Command) -> list[Identity]:
    step = "a mount namespace"
    try:
        namespace.enter()
        step = "a /dev of its own"
        devices = namespace.private_dev(command.devices)
        step = "/sys/module of the emulated host"
        namespace.module_parameters(command.parameters)
        if command.cgroup_dir is not None:
            step = f"{command.cgroup_dir} on /sys/fs/cgroup"
            namespace.cgroup_tree(command.cgroup_dir)
    except OSError as error:
        raise Unavailable(f"cannot give the client {step}: {error.strerror}") from error
    return [devices[name] for name in command.devices]


def _install_filter(*, cgroup: bool) -> int:
    """Install the filter; the listener's descriptor."""
    code = bpf.encode(bpf.program(cgroup=cgroup))
    argument = _Filter(len(code) // 8, code)
    flags = FILTER_FLAG_NEW_LISTENER | FILTER_FLAG_WAIT_KILLABLE_RECV
    try:
        try:
            return libc.seccomp(SECCOMP_SET_MODE_FILTER, flags, argument)
        except OSError as error:
            if error.errno != EACCES:
                raise
        # Without CAP_SYS_ADMIN a filter may only bind programs that gain no privileges.
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        return libc.seccomp(SECCOMP_SET_MODE_FILTER, flags, argument)
    except OSError as error:
        raise Unavailable(_why(error)) from error


def _why(error: OSError) -> str:
    if error.errno == EBUSY:
        return (
            "this process is already under a seccomp listener (another kvmsim run, or a "
            "container's); Linux allows one"
        )
    if error.errno in (EINVAL, ENOSYS):
        return "this kernel has no seccomp user notification with killable waits (Linux 5.19)"
    return f"the seccomp filter cannot be installed: {error.strerror}"
