"""Whose the last-branch records of the host are, as the host tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvmsim.control.messages import LbrState

if TYPE_CHECKING:
    from kvmsim.host.lbr import LbrFacility
    from kvmsim.supervise.connection import HostConnection


def follow(facility: LbrFacility, connection: HostConnection, *, taken: bool) -> None:
    """Keep a supervisor's picture of the records the host's.

    Args:
        facility: the records, of the supervisor's own machine.
        connection: to the host.
        taken: whose they were when it attached.
    """

    def hear(params: bytes) -> None:
        if msgspec.json.decode(params, type=LbrState).taken:
            facility.take()
        else:
            facility.release()

    if taken:
        facility.take()
    connection.handle("lbr", hear)
