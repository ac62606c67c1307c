"""A client program on a running host: the supervisor put together from its parts."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import trio

from cgfs.control.errors import CommandError, from_oserror
from kvmsim import interpose
from kvmsim.control.client_messages import Attach, Attached, KernelLine, VmReport
from kvmsim.control.messages import Nothing
from kvmsim.errors import KvmError
from kvmsim.host.machine import Machine
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.system import System
from kvmsim.supervise import lbr
from kvmsim.supervise.accounting import SocketAccounting
from kvmsim.supervise.connection import HostConnection
from kvmsim.supervise.faults import Faults
from kvmsim.supervise.keys import HostKeys
from kvmsim.supervise.reporter import Reporter
from kvmsim.supervise.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import IO

    from kvmsim.interpose.clients import Process
    from kvmsim.interpose.roles import Tap
    from kvmsim.interpose.supervisor import Supervisor
    from kvmsim.kvm.dispatch import KvmFile
    from kvmsim.supervise.script import Script

log = logging.getLogger(__name__)

LOOK_FOR_ENDED_S = 1.0
"""Between two looks whether processes that the host tells about have ended."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a client is to be run.

    Attributes:
        argv: program and arguments.
        socket: of the host.
        procs: the ``cgroup.procs`` file of the cgroup to start in; None: where the caller is.
        cgroup_dir: cgroup tree to show on /sys/fs/cgroup; None: the machine's own.
        script: what its guests do; None: they halt for ever, unless they execute code.
        executes: its guests execute the x86 code in their memory; goes without a script.
        trace: where to write its calls; None: nowhere.
    """

    argv: Sequence[str]
    socket: Path
    procs: Path | None = None
    cgroup_dir: Path | None = None
    script: Script | None = None
    executes: bool = False
    trace: IO[bytes] | None = None


class Taps:
    """Several taps in a row; every one sees every call, the first that wants it to fail decides.

    Args:
        taps: in order.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._taps = tuple(taps)

    def called(self, file: KvmFile, request: int, arg: int, caller: Process) -> int | None:
        """A call is about to be carried out."""
        errnos = [tap.called(file, request, arg, caller) for tap in self._taps]
        return next(filter(None, errnos), None)

    def returned(
        self, file: KvmFile, request: int, arg: int, caller: Process, result: int, now_ns: int
    ) -> None:
        """A call is about to be answered."""
        for tap in self._taps:
            tap.returned(file, request, arg, caller, result, now_ns)


class HostedClient:
    """The KVM of one client tree, on a host in another process.

    Args:
        options: what to run.
        connection: to the host.

    Attributes:
        system: that KVM.

    Raises:
        CommandError: the host does not let us in.
    """

    def __init__(self, options: ClientOptions, connection: HostConnection) -> None:
        self._options = options
        self._connection = connection
        program = os.path.basename(options.argv[0])  # noqa: PTH119 - a word, not a path
        try:
            attached = connection.call("client.attach", Attach(program), Attached)
        except KvmError as error:
            raise CommandError(str(error)) from error
        self._accounting = SocketAccounting(connection)
        machine = Machine(attached.preset, None, self._accounting)
        machine.kernel_log.on_line = self._tell_line
        self.system = System(machine, f"{attached.name} {attached.directory}".encode())
        lbr.follow(self.system, connection, taken=attached.lbr_taken)
        self.system.keys = HostKeys(machine, connection)
        self._reporter = Reporter(self.system, connection)

    def _tell_line(self, line: str) -> None:
        """What the kernel prints is in the host's log."""
        self._connection.post("client.log", KernelLine(line))

    def run(self) -> int:
        """Run the client to its end; its exit status.

        Raises:
            kvmsim.interpose.Unavailable: calls cannot be trapped here.
            kvmsim.interpose.CommandNotRun: the program could not be executed.
            CommandError: the client cannot be put into its cgroup.
        """
        options = self._options
        sev = self.system.machine.preset.sev is not None
        emulated = interpose.Emulated(
            system=self.system,
            devices={"sev": SevFile(self.system)} if sev else {},
            engine=options.script.engine if options.script else None,
            executes=options.executes,
            tap=self._tap(),
            beside=self._beside,
        )
        status = interpose.run(
            options.argv,
            emulated,
            cgroup_dir=os.fspath(options.cgroup_dir) if options.cgroup_dir else None,
            before_exec=self._place,
        )
        self._settle()
        return status

    def _tap(self) -> Tap:
        taps: list[Tap] = [self._reporter]
        if self._options.trace is not None:
            taps.append(Trace(self._options.trace))
        if self._options.script is not None and self._options.script.faults:
            taps.append(Faults(self._options.script.faults))
        return Taps(taps) if len(taps) > 1 else self._reporter

    def _place(self, pid: int) -> None:
        """Put the client into its cgroup, before its program starts."""
        procs = self._options.procs
        if procs is not None:
            try:
                procs.write_text(str(pid))
            except OSError as error:
                raise from_oserror(error, f"cannot move the client into {procs.parent}") from error

    async def _beside(self, supervisor: Supervisor) -> None:
        """Listen to the host and tell it about VMs, as long as the client runs."""
        self._accounting.now_ns = supervisor.loop.catch_up
        self._connection.on_lost.append(supervisor.interrupt_all)

        def settle(params: bytes) -> None:
            supervisor.note_closes()
            self._connection.post("client.settled", msgspec.Raw(params))

        self._connection.handle("settle", settle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._connection.run)
            nursery.start_soon(self._reporter.run)
            nursery.start_soon(self._forget_ended)

    async def _forget_ended(self) -> None:
        while True:
            await trio.sleep(LOOK_FOR_ENDED_S)
            for pid in self._accounting.followed():
                if not os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC240, PTH110 - no disk, often
                    self._accounting.forget_process(pid)

    def _settle(self) -> None:
        """Wait until the host has taken everything back that the client let go of."""
        try:
            self._connection.call("client.report", VmReport(), Nothing)
        except KvmError:
            log.debug("the host was gone before the client")


def run_client(options: ClientOptions) -> int:
    """Run a client program on a running host.

    Returns:
        Its exit status; 128 and the signal's number if one ended it.

    Raises:
        CommandError: something is missing here; one line.
        kvmsim.interpose.CommandNotRun: the program could not be executed.
    """
    with ExitStack() as stack:
        try:
            connection = HostConnection.to(options.socket)
        except OSError as error:
            raise from_oserror(error, f"cannot reach the host at {options.socket}") from error
        stack.callback(connection.close)
        try:
            return HostedClient(options, connection).run()
        except interpose.Unavailable as reason:
            raise CommandError(str(reason), os.EX_UNAVAILABLE) from reason
