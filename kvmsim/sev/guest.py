"""A guest as the firmware knows it, by handle: its state, policy, keys and digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvmsim.abi.psp import GuestState, Status
from kvmsim.abi.sev import SEV_POLICY_ES, SEV_POLICY_NODBG, SEV_POLICY_NOSEND
from kvmsim.sev.errors import FirmwareError

if TYPE_CHECKING:
    from kvmsim.sev.memory_key import MemoryKey
    from kvmsim.sev.transport import TransportKeys


class Guest:
    """A guest that was launched or received and not decommissioned.

    Args:
        handle: its number, 1 or more.
        policy: ``SEV_POLICY_*`` and the minimum API version.
        state: where it begins.
        memory_key: of its memory; shared with another guest when it was launched so.
        keys: what protects its packets.

    Attributes:
        asid: what it is bound to, 0 while it is not.
        digest: SHA-256 over what was loaded, in order.
        measurement: what LAUNCH_MEASURE answered last; a secret is tied to it.
    """

    __slots__ = (
        "asid",
        "digest",
        "handle",
        "keys",
        "measurement",
        "memory_key",
        "policy",
        "state",
    )

    def __init__(
        self,
        handle: int,
        policy: int,
        state: GuestState,
        memory_key: MemoryKey,
        keys: TransportKeys,
    ) -> None:
        self.handle = handle
        self.policy = policy
        self.state = state
        self.memory_key = memory_key
        self.keys = keys
        self.asid = 0
        self.digest = hashlib.sha256()
        self.measurement = bytes(32)

    @property
    def es(self) -> bool:
        """Whether the policy asks for SEV-ES."""
        return bool(self.policy & SEV_POLICY_ES)

    def need(self, *states: GuestState) -> None:
        """Refuse a command that does not fit the state; INVALID_GUEST_STATE."""
        if self.state not in states:
            raise FirmwareError(Status.INVALID_GUEST_STATE)

    def need_debug(self) -> None:
        """Refuse to look inside against the policy; POLICY_FAILURE."""
        if self.policy & SEV_POLICY_NODBG:
            raise FirmwareError(Status.POLICY_FAILURE)

    def need_send(self) -> None:
        """Refuse to send against the policy; POLICY_FAILURE."""
        if self.policy & SEV_POLICY_NOSEND:
            raise FirmwareError(Status.POLICY_FAILURE)
