"""Client supervisors on a host: what each holds, and what it is told.

A supervisor may act for processes of its own user; root's may for all. Whatever it holds (ASIDs,
charges, places in the bus lock queues, entries in debugfs) goes back when its connection ends.
"""

from __future__ import annotations

import logging
import os
from errno import EINVAL, EPERM, ESRCH
from typing import TYPE_CHECKING, cast

import trio

from cgfs.control.errors import CommandError, from_errno
from kvmsim.builder.client_vms import ClientVms
from kvmsim.control.client_messages import (
    Attached,
    Process,
    Settled,
    Situation,
    TakenKey,
    WaiterNumber,
)
from kvmsim.host.accounting import CHARGED_BY, AsidCharge
from kvmsim.sev.asid import Asid
from kvmsim.sev.keys import Key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    from cgfs.control.server import Peer
    from cgfs.controllers.bus_lock import BusLock
    from cgfs.core.cftype import CFType
    from kvmsim.builder.host import Host
    from kvmsim.control.client_messages import (
        BusLockRequest,
        EndCharge,
        ForCaller,
        FreeKey,
        KernelLine,
        VmReport,
        WhereCharged,
    )
    from kvmsim.control.messages import LbrState

    Notify = Callable[[str, object], None]

log = logging.getLogger(__name__)

TOGETHER_S = 0.001
"""Changes of limits within this time are told together."""

SETTLE_S = 0.1
"""How long supervisors may take to give back what has been closed; a stopped one never does."""


MAX_PROGRAM, MAX_LINE = 64, 200
"""Characters of a program's name, and of a line of the kernel, that are kept."""

CHARGE_FILES = ("misc.", "encryption_ids.")
"""Files that show charges begin so."""


class Clients:
    """All supervisors of a host.

    Args:
        host: the host.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sessions: dict[ClientSession, None] = {}
        self._limits_changed = trio.Event()
        limiter = host.roots.controllers.get("bus_lock")
        if limiter is not None:
            cast("BusLock", limiter).on_limits = self._note_limits

    def __iter__(self) -> Iterator[ClientSession]:
        return iter(list(self._sessions))

    def attach(self, program: str, peer: Peer, notify: Notify) -> ClientSession:
        """A supervisor has come."""
        session = ClientSession(self._host, program, peer, notify, self._sessions.pop)
        self._sessions[session] = None
        log.info("client %s (pid %d, uid %d) attached", program, peer.pid, peer.uid)
        return session

    def close(self) -> None:
        """The host ends."""
        for session in self:
            session.close()

    def tell_situations(self) -> None:
        """Tell every supervisor what limits apply by now, if that has changed."""
        for session in self:
            session.tell_situations()

    def tell_lbr(self, state: LbrState) -> None:
        """Tell every supervisor whose the last-branch records are."""
        for session in self:
            session.tell_lbr(state)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Tell changes of limits until cancelled."""
        task_status.started()
        while True:
            await self._limits_changed.wait()
            await trio.sleep(TOGETHER_S)
            self._limits_changed = trio.Event()
            self.tell_situations()

    def before_read(self, row: CFType) -> Coroutine[Any, Any, None] | None:
        """What to wait for before a count of charges is shown: see :meth:`settle`."""
        if not row.name.startswith(CHARGE_FILES) or not any(s.holds_keys for s in self._sessions):
            return None
        return self.settle()

    async def settle(self, asking: ClientSession | None = None) -> None:
        """Wait until all other supervisors have given back what their clients have closed."""
        asked = [session.ask_to_settle() for session in self if session is not asking]
        with trio.move_on_after(SETTLE_S):
            for answered in asked:
                await answered.wait()

    def _note_limits(self) -> None:
        self._limits_changed.set()


class ClientSession:
    """One supervisor.

    Args:
        host: its host.
        program: what it runs, for people.
        peer: the supervisor, as the kernel knows it.
        notify: tells it something.
        on_close: called with the session when it has given everything back.

    Attributes:
        program: as given, fit to be shown.
        peer: as given.
        vms: what it has reported of its VMs.
    """

    def __init__(
        self,
        host: Host,
        program: str,
        peer: Peer,
        notify: Notify,
        on_close: Callable[[ClientSession], object],
    ) -> None:
        self.program = "".join(c if c.isprintable() else "?" for c in program[:MAX_PROGRAM])
        self.peer = peer
        self.vms = ClientVms(host, self)
        self._host = host
        self._notify = notify
        self._on_close = on_close
        self._charges: dict[int, AsidCharge] = {}
        self._keys: dict[tuple[bool, int], None] = {}
        self._waiters: dict[int, ClientWaiter] = {}
        self._followed: dict[int, FollowedProcess] = {}
        self._last_charge = 0
        self._settling: dict[int, trio.Event] = {}
        self._last_settling = 0
        self._waits = False
        self._closed = False

    def attached(self) -> Attached:
        """The machine."""
        host = self._host
        directory = str(host.place.directory) if host.place else ""
        return Attached(host.name, host.preset, directory, host.machine.lbr_facility.taken)

    def tell_lbr(self, state: LbrState) -> None:
        """The last-branch records were taken from guests, or given back."""
        self._notify("lbr", state)

    # -- keys and charges ------------------------------------------------------------------------

    async def settle(self, params: ForCaller) -> None:
        """Before a charge that would be refused: wait for what others give back.

        One that waits itself has nothing to give back: a supervisor looks before it asks.
        """
        pid = self._vetted(params.pid)
        _vet_kind(params.kind)
        if self._host.accounting.fits(pid, params.kind):
            return
        self._waits = True
        try:
            self._all_settled()
            await self._host.clients.settle(self)
        finally:
            self._waits = False

    def ask_to_settle(self) -> trio.Event:
        """Ask for what has been closed; the event comes when it has been given back."""
        answered = trio.Event()
        if self._waits or not self._keys:
            answered.set()
            return answered
        self._last_settling += 1
        self._settling[self._last_settling] = answered
        self._notify("settle", Settled(self._last_settling))
        return answered

    def settled(self, params: Settled) -> None:
        """What was closed before a notice has been given back."""
        for number in [number for number in self._settling if number <= params.number]:
            self._settling.pop(number).set()

    def _all_settled(self) -> None:
        self.settled(Settled(self._last_settling))

    def take_key(self, params: ForCaller) -> TakenKey:
        """An ASID or key, charged to the cgroup of the calling process.

        Raises:
            CommandError: EPERM, ESRCH, EINVAL: the process or the kind.
            KvmError: EBUSY, ENOTTY, ENOSPC, EINVAL: as :class:`kvmsim.sev.keys.Keys`.
        """
        pid = self._vetted(params.pid)
        _vet_kind(params.kind)
        keys = self._host.system.keys
        tdx = params.kind == "tdx"
        key = keys.take_tdx(pid) if tdx else keys.take_asid(pid, es=params.kind == "sev_es")
        self._keys[tdx, key.asid] = None
        return TakenKey(key.asid, self._hold(key.charge))

    def free_key(self, params: FreeKey) -> None:
        """Give an ASID or key back; its charge ends."""
        if (params.tdx, params.number) not in self._keys:
            raise from_errno(f"key {params.number} is not held by this client", EINVAL)
        charge = self._end(params.charge) if params.charge else AsidCharge("", ())
        self._free(params.number, charge, tdx=params.tdx)

    def charge(self, params: ForCaller) -> int:
        """A charge without a key."""
        pid = self._vetted(params.pid)
        _vet_kind(params.kind)
        return self._hold(self._host.accounting.charge_asid(pid, params.kind))

    def uncharge(self, params: EndCharge) -> None:
        """End a charge."""
        self._host.accounting.uncharge_asid(self._end(params.charge), params.kind)

    def is_charged_to(self, params: WhereCharged) -> bool:
        """Whether a process is in the cgroup that carries a charge."""
        charge = self._charges.get(params.charge)
        if charge is None:
            raise from_errno(f"no charge {params.charge}", EINVAL)
        return self._host.accounting.is_charged_to(self._vetted(params.pid), charge)

    @property
    def holds_keys(self) -> bool:
        """Whether it has anything that a close could give back."""
        return bool(self._keys)

    def kinds_held(self) -> list[str]:
        """The kind of every charge."""
        return [charge.kind for charge in self._charges.values()]

    def _hold(self, charge: AsidCharge) -> int:
        self._last_charge += 1
        self._charges[self._last_charge] = charge
        return self._last_charge

    def _end(self, number: int) -> AsidCharge:
        charge = self._charges.pop(number, None)
        if charge is None:
            raise from_errno(f"no charge {number}", EINVAL)
        return charge

    def _free(self, number: int, charge: AsidCharge, *, tdx: bool) -> None:
        del self._keys[tdx, number]
        key = Key(Asid(number), charge)
        if tdx:
            self._host.system.keys.free_tdx(key)
        else:
            self._host.system.keys.free_asid(key)

    # -- bus locks -------------------------------------------------------------------------------

    def bus_lock(self, params: BusLockRequest) -> bool:
        """Admit a bus lock now (True), or queue it."""
        process = self._follow(params.pid)
        waiter = self._waiters.get(params.waiter)
        if waiter is None:
            waiter = ClientWaiter(params.waiter, process, self._admitted)
        self._host.catch_up()
        now_ns = self._host.timeline.now_ns
        self._waiters[params.waiter] = waiter
        if not self._host.accounting.bus_lock(process.pid, waiter, now_ns):
            return False
        self._waiters.pop(params.waiter, None)
        return True

    def withdraw(self, params: WaiterNumber) -> None:
        """Interrupt a wait. The event stays owed."""
        waiter = self._waiters.get(params.waiter)
        if waiter is not None:
            self._host.catch_up()
            now_ns = self._host.timeline.now_ns
            self._host.accounting.bus_lock_withdraw(waiter, now_ns)

    def cancel(self, params: BusLockRequest) -> None:
        """Drop what a vCPU waits for or owes; waiter 0 owes what it has never asked for."""
        if params.waiter:
            self._cancel(params.waiter)
            return
        try:
            process = FollowedProcess(self, params.pid, self._vetted(params.pid))
        except CommandError:  # it ended, and its descriptors with it
            return
        self._waiters[0] = ClientWaiter(0, process, self._admitted)
        self._cancel(0)

    def _cancel(self, number: int) -> None:
        self._host.catch_up()  # may admit it, and then the notice is on its way
        waiter = self._waiters.pop(number, None)
        if waiter is not None:
            now_ns = self._host.timeline.now_ns
            self._host.accounting.bus_lock_cancel(waiter.process.pid, waiter, now_ns)

    def _admitted(self, waiter: ClientWaiter) -> None:
        if self._waiters.pop(waiter.number, None) is not None:
            self._notify("admitted", WaiterNumber(waiter.number))

    def requeue(self, process: FollowedProcess, now_ns: int) -> None:
        """A process is in another cgroup: what it waits for, waits there."""
        for waiter in list(self._waiters.values()):
            if waiter.process is process:
                self._host.accounting.bus_lock_moved(process.pid, waiter, now_ns)

    # -- processes -------------------------------------------------------------------------------

    def follow(self, params: Process) -> Situation:
        """Tell what happens to a process from here on."""
        process = self._follow(params.pid)
        process.told = self.situation(process)
        return process.told

    def unfollow(self, params: Process) -> None:
        """Tell it no longer: the process has ended."""
        process = self._followed.pop(params.pid, None)
        if process is not None:
            self._host.roots.tasks.unfollow(process.pid, process)

    def situation(self, process: FollowedProcess) -> Situation:
        """What a process has to live with."""
        roots = self._host.roots
        cgrp = roots.cgroup_of(process.pid, roots.v2)
        limited = self._host.accounting.bus_lock_limited(process.pid)
        return Situation(process.number, limited, cgrp.e_freeze > 0, cgrp.path)

    def tell_situations(self) -> None:
        """Tell the supervisor what has changed for its processes."""
        for process in list(self._followed.values()):
            self.tell_situation(process)

    def tell_situation(self, process: FollowedProcess) -> None:
        """Tell the supervisor, if it knows this process otherwise."""
        situation = self.situation(process)
        if process.told is not None and process.told != situation:
            process.told = situation
            self._notify("situation", situation)

    def tell_killed(self, process: FollowedProcess) -> None:
        """A cgroup has killed a process."""
        self._notify("killed", Process(process.number))

    def _follow(self, number: int) -> FollowedProcess:
        process = self._followed.get(number)
        if process is None:
            process = FollowedProcess(self, number, self._vetted(number))
            self._followed[number] = process
            self._host.roots.tasks.follow(process.pid, process)
        return process

    def _vetted(self, number: int) -> int:
        """A process the supervisor may act for, by the host's number for it."""
        processes = self._host.roots.processes
        pid = processes.from_caller(self.peer.pid, number)
        if pid is None:
            raise from_errno(f"no process {number}", ESRCH)
        if self.peer.uid == 0:
            return pid
        found = processes.find(pid)
        if found is None:
            raise from_errno(f"no process {number}", ESRCH)
        if found.uid != self.peer.uid:
            raise from_errno(f"process {number} belongs to uid {found.uid}", EPERM)
        return pid

    # -- VMs, end --------------------------------------------------------------------------------

    def log(self, params: KernelLine) -> None:
        """The kernel printed a line."""
        line = "".join(c if c.isprintable() else "?" for c in params.line[:MAX_LINE])
        self._host.machine.kernel_log.print(line)

    def report(self, params: VmReport) -> None:
        """Note what the VMs do."""
        self.vms.report(params)

    def host_pid(self, number: int) -> int:
        """The host's number for a thread of the client; 0 if it has ended."""
        return self._host.roots.processes.from_caller(self.peer.pid, number) or 0

    def close(self) -> None:
        """The supervisor is gone: everything it holds goes back."""
        if self._closed:
            return
        self._closed = True
        self._all_settled()
        for number in list(self._followed):
            self.unfollow(Process(number))
        for number in list(self._waiters):
            self._cancel(number)
        for tdx, number in list(self._keys):
            self._free(number, AsidCharge("", ()), tdx=tdx)
        for number in list(self._charges):
            self._host.accounting.uncharge_asid(self._end(number))
        self.vms.close()
        self._on_close(self)
        log.info("client %s (pid %d) detached", self.program, self.peer.pid)


class ClientWaiter:
    """A vCPU of a client that waits for a bus lock, or owes one.

    Args:
        number: the supervisor's number for it.
        process: whose vCPU it is.
        on_admitted: called with the waiter when its turn has come.
    """

    __slots__ = ("_on_admitted", "number", "process")

    def __init__(
        self, number: int, process: FollowedProcess, on_admitted: Callable[[ClientWaiter], None]
    ) -> None:
        self.number = number
        self.process = process
        self._on_admitted = on_admitted

    def admitted(self, now_ns: int) -> None:
        """Its turn has come."""
        del now_ns
        self._on_admitted(self)


class FollowedProcess:
    """A client process whose supervisor is told what its cgroups do to it.

    Args:
        session: of the supervisor.
        number: the supervisor's number for the process.
        pid: the host's.

    Attributes:
        session: as given.
        number: as given.
        pid: as given.
        told: what the supervisor knows; None: it has not asked.
    """

    __slots__ = ("number", "pid", "session", "told")

    def __init__(self, session: ClientSession, number: int, pid: int) -> None:
        self.session = session
        self.number = number
        self.pid = pid
        self.told: Situation | None = None

    def killed(self, now_ns: int) -> None:
        """SIGKILL is on its way."""
        del now_ns
        self.session.tell_killed(self)

    def frozen(self, frozen: bool, now_ns: int) -> None:
        """Its cgroup was frozen or thawed."""
        del frozen, now_ns
        self.session.tell_situation(self)

    def moved(self, now_ns: int) -> None:
        """It is in another cgroup, or has ended."""
        self.session.requeue(self, now_ns)
        self.session.tell_situation(self)


def _vet_kind(kind: str) -> None:
    if kind not in CHARGED_BY:
        raise CommandError(f"no kind of key {kind!r}", os.EX_USAGE, EINVAL)
