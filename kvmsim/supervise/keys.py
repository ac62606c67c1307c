"""Encryption keys of a host in another process.

Charging and taking a key is one request: either both happened or neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.control.client_messages import ForCaller, FreeKey, TakenKey
from kvmsim.sev.asid import Asid
from kvmsim.sev.keys import Key, Keys
from kvmsim.supervise.accounting import HostCharge

if TYPE_CHECKING:
    from kvmsim.host.machine import Machine
    from kvmsim.supervise.connection import HostConnection


class HostKeys(Keys):
    """The host's ASIDs and trust domain keys.

    Args:
        machine: whose they are.
        connection: to the host.
    """

    __slots__ = ("_connection",)
    ALLOCATES = False

    def __init__(self, machine: Machine, connection: HostConnection) -> None:
        super().__init__(machine)
        self._connection = connection

    def take_asid(self, pid: int, *, es: bool) -> Key:
        """See :meth:`kvmsim.sev.keys.Keys.take_asid`; EIO: the host is gone."""
        self.asids.check_range(es=es)
        return self._take(pid, "sev_es" if es else "sev")

    def free_asid(self, key: Key) -> None:
        """See :meth:`kvmsim.sev.keys.Keys.free_asid`."""
        self._free(key, tdx=False)

    def take_tdx(self, pid: int) -> Key:
        """See :meth:`kvmsim.sev.keys.Keys.take_tdx`; EIO: the host is gone."""
        return self._take(pid, "tdx")

    def free_tdx(self, key: Key) -> None:
        """See :meth:`kvmsim.sev.keys.Keys.free_tdx`."""
        self._free(key, tdx=True)

    def _take(self, pid: int, kind: str) -> Key:
        taken = self._connection.call("client.take_key", ForCaller(pid, kind), TakenKey)
        return Key(Asid(taken.number), HostCharge(kind, taken.charge))

    def _free(self, key: Key, *, tdx: bool) -> None:
        charge = key.charge
        if key.kind != charge.kind:  # after a move that charged the wrong kind
            self._accounting.uncharge_asid(charge, key.kind)
        number = 0
        if isinstance(charge, HostCharge):
            number, charge.number = charge.number, 0
        self._connection.post("client.free_key", FreeKey(key.asid, number, tdx))
