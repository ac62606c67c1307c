"""Accounting by a host in another process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from kvmsim.control.client_messages import (
    BusLockRequest,
    EndCharge,
    ForCaller,
    Process,
    Situation,
    WaiterNumber,
    WhereCharged,
)
from kvmsim.control.messages import Nothing
from kvmsim.errors import KvmError
from kvmsim.host.accounting import AsidCharge

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.core.budget import Waiter
    from kvmsim.supervise.connection import HostConnection


class HostCharge(AsidCharge):
    """A charge the host keeps.

    Attributes:
        number: the host's number for it; 0 once it has ended.
    """

    __slots__ = ("number",)

    def __init__(self, kind: str, number: int) -> None:
        super().__init__(kind, ())
        self.number = number


class SocketAccounting:
    """The host's answers to what KVM asks (:class:`kvmsim.host.accounting.Accounting`).

    A charge or an admission is one blocking round trip. Whether a limit applies to a process is
    asked once; the host tells when that changes.

    Args:
        connection: to the host, attached.

    Attributes:
        now_ns: the supervisor's time, for waits that end.
        on_situation: called when a limit, freeze or move has changed what a process lives with.
    """

    def __init__(self, connection: HostConnection) -> None:
        self.now_ns: Callable[[], int] = time.monotonic_ns
        self.on_situation: Callable[[Situation], None] | None = None
        self._connection = connection
        self._last_number = 0
        self._numbers: dict[Waiter, int] = {}
        self._waiters: dict[int, Waiter] = {}
        self._situations: dict[int, Situation] = {}
        connection.handle("admitted", self._hear_admitted)
        connection.handle("situation", self._hear_situation)
        connection.on_lost.append(self._lost)

    # -- charges ---------------------------------------------------------------------------------

    def charge_asid(self, pid: int, kind: str) -> AsidCharge:
        """Charge one unit to the cgroup a process is in now.

        Raises:
            KvmError: the host refuses, or is gone (EIO). A charge of an ASID together with the ASID
                is :class:`kvmsim.supervise.keys.HostKeys`.
        """
        return HostCharge(kind, self._connection.call("client.charge", ForCaller(pid, kind), int))

    def uncharge_asid(self, charge: AsidCharge, kind: str | None = None) -> None:
        """End a charge, once."""
        if isinstance(charge, HostCharge) and charge.number:
            number, charge.number = charge.number, 0
            self._connection.post("client.uncharge", EndCharge(number, kind))

    def is_charged_to(self, pid: int, charge: AsidCharge) -> bool:
        """Whether the cgroup a process is in now is the one that carries a charge."""
        number = charge.number if isinstance(charge, HostCharge) else 0
        return self._connection.call("client.is_charged_to", WhereCharged(pid, number), bool)

    # -- bus locks -------------------------------------------------------------------------------

    def bus_lock(self, pid: int, waiter: Waiter, now_ns: int) -> bool:
        """Ask for admission; without a host everything is admitted: the guest's end is near."""
        del now_ns
        number = self._numbers.get(waiter)
        if number is None:
            self._last_number += 1
            number = self._numbers[waiter] = self._last_number
            self._waiters[number] = waiter
        try:
            admitted = self._connection.call("client.bus_lock", BusLockRequest(pid, number), bool)
        except KvmError:
            admitted = True
        if admitted:
            self._forget(waiter)
        return admitted

    def bus_lock_withdraw(self, waiter: Waiter, now_ns: int) -> None:
        """Leave the queue, unless the admission is on its way already: then it counts."""
        number = self._numbers.get(waiter)
        if number is None:
            return
        params = WaiterNumber(number)
        try:
            self._connection.call("client.withdraw", params, Nothing)
        except KvmError:
            return
        if self._connection.take("admitted", msgspec.json.encode(params)):
            self._forget(waiter)
            waiter.admitted(now_ns)

    def bus_lock_cancel(self, pid: int, waiter: Waiter, now_ns: int) -> None:
        """The vCPU is gone: drop its event, asked for or not."""
        del now_ns
        number = self._numbers.get(waiter, 0)
        if number:
            self._forget(waiter)
        self._connection.post("client.cancel", BusLockRequest(pid, number))

    def bus_lock_moved(self, pid: int, waiter: Waiter, now_ns: int) -> None:
        """Nothing: the host sees its processes move, and requeues what waits for them."""

    def bus_lock_limited(self, pid: int) -> bool:
        """Whether a finite ``bus_lock.max`` applies to a process."""
        situation = self._situations.get(pid)
        if situation is None:
            try:
                situation = self._connection.call("client.follow", Process(pid), Situation)
            except KvmError:
                return False
            self._situations[pid] = situation
        return situation.limited

    def followed(self) -> list[int]:
        """Processes the host tells about."""
        return list(self._situations)

    def forget_process(self, pid: int) -> None:
        """A process has ended."""
        if self._situations.pop(pid, None) is not None:
            self._connection.post("client.unfollow", Process(pid))

    def _forget(self, waiter: Waiter) -> None:
        del self._waiters[self._numbers.pop(waiter)]

    def _hear_admitted(self, params: bytes) -> None:
        number = msgspec.json.decode(params, type=WaiterNumber).waiter
        waiter = self._waiters.get(number)
        if waiter is not None:
            self._forget(waiter)
            waiter.admitted(self.now_ns())

    def _hear_situation(self, params: bytes) -> None:
        situation = msgspec.json.decode(params, type=Situation)
        if situation.pid in self._situations:
            self._situations[situation.pid] = situation
            if self.on_situation is not None:
                self.on_situation(situation)

    def _lost(self) -> None:
        """The host is gone: nobody waits for it any more."""
        now_ns = self.now_ns()
        for waiter in list(self._numbers):
            self._forget(waiter)
            waiter.admitted(now_ns)
