"""Running a program against an emulated host, from start to exit status."""

from __future__ import annotations

import os
import resource
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from kvmsim.interpose.cgroup_calls import CgroupCalls
from kvmsim.interpose.errors import Unavailable
from kvmsim.interpose.launch import Command, launch
from kvmsim.interpose.notify import Listener
from kvmsim.interpose.supervisor import Supervisor
from kvmsim.vmm.run_loop import RunLoop
from kvmsim.vmm.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from kvmsim.engine.base import GuestEngine
    from kvmsim.interpose.launch import Launched
    from kvmsim.interpose.roles import OtherCalls, Tap
    from kvmsim.kvm.dispatch import KvmFile
    from kvmsim.kvm.system import System
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.vmm.timeline import Limiter

_FORWARDED = (signal.SIGTERM, signal.SIGHUP)
_RECEIVED = (*_FORWARDED, signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Emulated:
    """The host a client is to see.

    Attributes:
        system: its KVM, the file behind ``/dev/kvm``.
        devices: further nodes below /dev and the files behind them, as ``{"sev": ...}``.
        engine: makes the guest of a new vCPU; None: guests halt for ever.
        executes: guests execute the x86 code in their memory; ``engine`` is not used then.
        limiter: admits bus locks, if that happens in this process.
        tap: sees every call.
        beside: a task to run as long as the client does.
    """

    system: System
    devices: Mapping[str, KvmFile] | None = None
    engine: Callable[[Vcpu], GuestEngine] | None = None
    executes: bool = False
    limiter: Limiter | None = None
    tap: Tap | None = None
    beside: Callable[[Supervisor], Awaitable[None]] | None = None


def run(
    argv: Sequence[str],
    emulated: Emulated,
    *,
    env: Mapping[str, str] | None = None,
    cgroup_dir: str | None = None,
    before_exec: Callable[[int], None] | None = None,
) -> int:
    """Run a program and everything it starts until the last of them has ended.

    Not to be called with an event loop or threads running: it forks.

    Args:
        argv: program and arguments.
        emulated: the host it sees.
        env: its environment; this process's by default.
        cgroup_dir: cgroup tree to show on /sys/fs/cgroup.
        before_exec: called with the client's pid before its program starts.

    Returns:
        The program's exit status; 128 and the signal's number if one ended it.

    Raises:
        Unavailable: calls cannot be trapped here.
        CommandNotRun: the program could not be executed.
    """
    files: dict[str, KvmFile] = {"kvm": emulated.system, **(emulated.devices or {})}
    with signals_waiting() as mask:
        command = Command(
            argv=argv,
            env=env,
            devices=tuple(files),
            parameters=emulated.system.machine.parameters,
            cgroup_dir=cgroup_dir,
            before_exec=before_exec,
            signal_mask=mask,
        )
        other_calls = CgroupCalls(Path(cgroup_dir).stat().st_dev) if cgroup_dir else None
        launched = launch(command)
        try:
            return trio.run(supervise, launched, emulated, files, other_calls)
        finally:
            os.close(launched.pidfd)


@contextmanager
def signals_waiting() -> Iterator[set[int]]:
    """Keep signals from the fork until trio looks for them: the client's end comes first.

    Yields:
        What was blocked before, for the client.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _RECEIVED)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


async def supervise(
    launched: Launched,
    emulated: Emulated,
    files: Mapping[str, KvmFile],
    other_calls: OtherCalls | None = None,
) -> int:
    """Serve a launched client until its tree has ended; its exit status."""
    _allow_many_descriptors()
    stall_ns = emulated.system.machine.bus_lock_stall_ns
    loop = RunLoop(Timeline(emulated.limiter, bus_lock_stall_ns=stall_ns))
    emulated.system.epoch_ns = time.time_ns() - loop.now_ns()
    listener = Listener(launched.listener)
    try:
        supervisor = Supervisor(
            listener,
            {identity: files[name] for identity, name in launched.devices.items()},
            loop,
            engine=emulated.engine,
            executes=emulated.executes,
            tap=emulated.tap,
            other_calls=other_calls,
        )
    except OSError as error:
        os.kill(launched.pid, signal.SIGKILL)
        listener.close()
        os.waitpid(launched.pid, 0)  # noqa: ASYNC222 - nothing else is going on
        raise Unavailable(f"cannot watch the client's descriptors: {error.strerror}") from error

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            if emulated.beside is not None:
                nursery.start_soon(emulated.beside, supervisor)
                await trio.lowlevel.checkpoint()  # it starts before the first call is answered
            await supervisor.serve()
            nursery.cancel_scope.cancel()

    try:
        return await attend(launched, serve)
    finally:
        supervisor.close()


async def attend(launched: Launched, serve: Callable[[], Awaitable[None]]) -> int:
    """Look after a launched program while its calls are answered; its exit status.

    Args:
        launched: the program.
        serve: answers its calls; returns when no task of its tree is left.
    """
    ended: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_reap, launched, ended)
        await nursery.start(_forward_signals, launched, ended, nursery.cancel_scope)
        await serve()
        nursery.cancel_scope.cancel()
    if not ended:  # at this very moment, or its filter would still be in use
        ended.append(os.waitpid(launched.pid, 0)[1])  # noqa: ASYNC222
    code = os.waitstatus_to_exitcode(ended[0])
    return code if code >= 0 else 128 - code


async def _reap(launched: Launched, ended: list[int]) -> None:
    """Take the program's status as soon as it ends; its children go on.

    Before Linux 6.11 a task that nobody has waited for keeps its filter in use.
    """
    await trio.lowlevel.wait_readable(launched.pidfd)
    ended.append(os.waitpid(launched.pid, 0)[1])  # noqa: ASYNC222


async def _forward_signals(
    launched: Launched,
    ended: list[int],
    service: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The client ends first; an interrupt from the terminal reaches it by itself.

    With the program ended, a signal ends the service of what it left behind.
    """
    with trio.open_signal_receiver(*_RECEIVED) as received:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _RECEIVED)
        task_status.started()
        async for number in received:
            if ended:  # its number may be another's
                service.cancel()
            elif number in _FORWARDED:
                os.kill(launched.pid, number)


def _allow_many_descriptors() -> None:
    """Every object takes one here; the client has its own limit already."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
