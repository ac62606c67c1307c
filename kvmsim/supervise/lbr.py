"""Whose the last-branch records of the host are, as the host tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvmsim.control.messages import LbrState
from kvmsim.kvm.run import GUEST

if TYPE_CHECKING:
    from kvmsim.kvm.system import System
    from kvmsim.supervise.connection import HostConnection


def follow(system: System, connection: HostConnection, *, taken: bool) -> None:
    """Keep a supervisor's picture of the records the host's.

    Args:
        system: the supervisor's KVM, on a machine of its own.
        connection: to the host.
        taken: whose they were when it attached.
    """
    facility = system.machine.lbr_facility

    def hear(params: bytes) -> None:
        if not msgspec.json.decode(params, type=LbrState).taken:
            facility.release()
            return
        facility.take()
        for vm in system.vms:
            for vcpu in vm.vcpus.values():
                # The processor is told by an interrupt, which is an exit of the guest on it.
                if vcpu.phase == GUEST:
                    vcpu.kick(vcpu.since_ns)

    if taken:
        facility.take()
    connection.handle("lbr", hear)
