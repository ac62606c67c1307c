"""The methods by which a client supervisor uses its host.

The first call is ``client.attach``; what it holds from then on belongs to the connection and ends
with it.
"""

from __future__ import annotations

import os
from errno import EIO
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

from cgfs.control.errors import CommandError
from cgfs.control.server import Method
from kvmsim.control.client_messages import (
    Attach,
    BusLockRequest,
    EndCharge,
    ForCaller,
    FreeKey,
    KernelLine,
    Process,
    Settled,
    VmReport,
    WaiterNumber,
    WhereCharged,
)
from kvmsim.control.messages import Nothing

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.control.server import Connection, Peer
    from kvmsim.control.client_messages import Attached, Situation, TakenKey


class ClientApi(Protocol):
    """What a supervisor can ask for; every refusal is an error that ``explain`` knows."""

    def attached(self) -> Attached:
        """The machine."""

    async def settle(self, params: ForCaller) -> None:
        """Before a charge that would be refused: wait for what others give back."""

    def settled(self, params: Settled) -> None:
        """Everything closed before the notice ``settle`` has been given back."""

    def take_key(self, params: ForCaller) -> TakenKey:
        """An ASID or key, charged."""

    def free_key(self, params: FreeKey) -> None:
        """Give it back."""

    def charge(self, params: ForCaller) -> int:
        """A charge without a key: the destination of a move."""

    def uncharge(self, params: EndCharge) -> None:
        """End a charge."""

    def is_charged_to(self, params: WhereCharged) -> bool:
        """Whether a process is in the cgroup that carries a charge."""

    def bus_lock(self, params: BusLockRequest) -> bool:
        """Admit a bus lock, or queue it: then the notice ``admitted`` follows."""

    def withdraw(self, params: WaiterNumber) -> None:
        """Interrupt a wait."""

    def cancel(self, params: BusLockRequest) -> None:
        """Drop what a vCPU waits for or owes."""

    def follow(self, params: Process) -> Situation:
        """Tell what happens to a process from here on."""

    def unfollow(self, params: Process) -> None:
        """Tell it no longer."""

    def log(self, params: KernelLine) -> None:
        """The kernel printed a line."""

    def report(self, params: VmReport) -> None:
        """Note what the VMs do."""

    def close(self) -> None:
        """The supervisor is gone: everything it holds goes back."""


class ClientHost(Protocol):
    """Who lets supervisors in."""

    def attach_client(
        self, program: str, peer: Peer, notify: Callable[[str, object], None]
    ) -> ClientApi:
        """A supervisor has come."""


# What a supervisor calls, by the names of ClientApi.
_CALLS: dict[str, type[Any]] = {
    "take_key": ForCaller,
    "free_key": FreeKey,
    "charge": ForCaller,
    "uncharge": EndCharge,
    "is_charged_to": WhereCharged,
    "bus_lock": BusLockRequest,
    "withdraw": WaiterNumber,
    "cancel": BusLockRequest,
    "follow": Process,
    "unfollow": Process,
    "log": KernelLine,
    "report": VmReport,
    "settled": Settled,
}
_CHARGING = {"take_key", "charge"}


def client_methods(host: ClientHost) -> list[Method]:
    """Everything that a supervisor can call."""
    sessions: WeakKeyDictionary[Connection, ClientApi] = WeakKeyDictionary()

    async def attach(params: Attach, connection: Connection) -> Attached:
        if connection in sessions:
            raise CommandError("attached already", os.EX_PROTOCOL)
        session = host.attach_client(params.program, connection.peer, connection.notify)
        sessions[connection] = session
        connection.on_close.append(session.close)
        return session.attached()

    def method(name: str, params: type[Any]) -> Method:
        async def call(params: object, connection: Connection) -> object:
            session = sessions.get(connection)
            if session is None:
                raise CommandError("not attached", os.EX_PROTOCOL, EIO)
            if name in _CHARGING:
                await session.settle(cast("ForCaller", params))
            result: object = getattr(session, name)(params)
            return Nothing() if result is None else result

        return Method(f"client.{name}", params, call, connected=True)

    return [
        Method("client.attach", Attach, attach, connected=True),
        *(method(name, params) for name, params in _CALLS.items()),
    ]
