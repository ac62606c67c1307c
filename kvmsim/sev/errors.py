"""A refusal by the secure processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.errors import KvmsimError

if TYPE_CHECKING:
    from kvmsim.abi.psp import Status


class FirmwareError(KvmsimError):
    """A firmware command failed; the caller of an ioctl sees EIO and the status.

    Args:
        status: what the firmware answered.
        lengths: sizes it asks for, in the order of the command's own fields.
    """

    def __init__(self, status: Status, lengths: tuple[int, ...] = ()) -> None:
        super().__init__(f"firmware: {status.name} ({status.value})")
        self.status = status
        self.lengths = lengths
