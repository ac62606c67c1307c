"""Which guest the firmware has bound to which ASID."""

from __future__ import annotations

from kvmsim.abi.psp import Status
from kvmsim.sev.errors import FirmwareError


class Bindings:
    """The firmware's side of the ASIDs.

    Attributes:
        flushes: how often the data fabric was flushed.
    """

    __slots__ = ("_bound", "_unflushed", "flushes")

    def __init__(self) -> None:
        self._bound: set[int] = set()
        self._unflushed: set[int] = set()
        self.flushes = 0

    def bind(self, asid: int) -> None:
        """Give an ASID to a guest.

        Raises:
            FirmwareError: ASID_OWNED, another guest has it; DFFLUSH_REQUIRED, one had it and the
                caches may still know. KVM flushes before it hands an ASID out again.
        """
        if asid in self._bound:
            raise FirmwareError(Status.ASID_OWNED)
        if asid in self._unflushed:
            raise FirmwareError(Status.DFFLUSH_REQUIRED)
        self._bound.add(asid)

    def unbind(self, asid: int) -> None:
        """The guest is gone."""
        self._bound.remove(asid)
        self._unflushed.add(asid)

    def flush(self) -> None:
        """What was unbound can be bound."""
        self.flushes += 1
        self._unflushed.clear()
