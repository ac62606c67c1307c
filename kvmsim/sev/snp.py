"""SNP guests, as far as their launch.

The launch digest is the real one (SEV-SNP firmware ABI, AMD publication 56860, 8.17.2): for each
page ``LD = sha384(LD, contents, 0x0070, page type, IMI 0, VMPL permissions 0, gpa)``, contents
being sha384 of a normal page or of a VMSA, and zeros for the other types. So tools that compute it
beforehand agree.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvmsim.abi.psp import Status
from kvmsim.abi.sev import KVM_SEV_SNP_PAGE_TYPE_NORMAL
from kvmsim.sev.errors import FirmwareError
from kvmsim.sev.memory_key import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.sev.bindings import Bindings

#: Page type of a VMSA; user space cannot ask for it.
VMSA_PAGE_TYPE = 2
#: Guest physical address under which every VMSA is measured.
VMSA_GPA = 0xFFFF_FFFF_F000
_PAGE_INFO_BYTES = 0x70


class SnpGuest:
    """A guest context page.

    Attributes:
        policy: ``SNP_POLICY_*``, None before the launch.
        asid: what it is bound to, 0 while it is not.
        digest: the launch digest so far, 48 bytes.
        finished: it may run.
        host_data: 32 bytes of the host, part of every report.
    """

    __slots__ = ("asid", "digest", "finished", "host_data", "policy")

    def __init__(self) -> None:
        self.policy: int | None = None
        self.asid = 0
        self.digest = bytes(48)
        self.finished = False
        self.host_data = bytes(32)


class Snp:
    """The SNP commands of one firmware.

    Args:
        bindings: of the ASIDs.
        begin: called with the name of a command before it runs.

    Attributes:
        initialised: SNP_INIT was done.
        guests: contexts that are not decommissioned.
        reported_tcb: as configured.
        flags: as configured.
        vlek: an endorsement key was loaded.
    """

    def __init__(self, bindings: Bindings, begin: Callable[[str], None]) -> None:
        self.initialised = False
        self.guests: list[SnpGuest] = []
        self.reported_tcb = 0
        self.flags = 0
        self.vlek = False
        self._bindings = bindings
        self._begin = begin

    def create(self) -> SnpGuest:
        """SNP_GCTX_CREATE."""
        self._begin("SNP_GCTX_CREATE")
        if not self.initialised:
            raise FirmwareError(Status.INVALID_PLATFORM_STATE)
        guest = SnpGuest()
        self.guests.append(guest)
        return guest

    def launch_start(self, guest: SnpGuest, policy: int) -> None:
        """SNP_LAUNCH_START."""
        self._begin("SNP_LAUNCH_START")
        guest.policy = policy

    def activate(self, guest: SnpGuest, asid: int) -> None:
        """SNP_ACTIVATE."""
        self._begin("SNP_ACTIVATE")
        self._bindings.bind(asid)
        guest.asid = asid

    def launch_update(self, guest: SnpGuest, gpa: int, page_type: int, page: bytes | None) -> None:
        """SNP_LAUNCH_UPDATE of one page; None: one of zeros."""
        self._begin("SNP_LAUNCH_UPDATE")
        if guest.finished:
            raise FirmwareError(Status.INVALID_GUEST_STATE)
        contents = bytes(48)
        if page_type in {KVM_SEV_SNP_PAGE_TYPE_NORMAL, VMSA_PAGE_TYPE}:
            contents = hashlib.sha384(page or bytes(PAGE_BYTES)).digest()
        info = guest.digest + contents + _PAGE_INFO_BYTES.to_bytes(2, "little")
        info += bytes((page_type, 0, 0, 0, 0, 0)) + gpa.to_bytes(8, "little")
        guest.digest = hashlib.sha384(info).digest()

    def launch_finish(self, guest: SnpGuest, host_data: bytes, id_block: bytes | None) -> None:
        """SNP_LAUNCH_FINISH.

        Raises:
            FirmwareError: INVALID_GUEST_STATE twice; BAD_MEASUREMENT or POLICY_FAILURE, the id
                block expects another digest or policy. Its signature is not looked at.
        """
        self._begin("SNP_LAUNCH_FINISH")
        if guest.finished:
            raise FirmwareError(Status.INVALID_GUEST_STATE)
        if id_block is not None:
            if id_block[:48] != guest.digest:
                raise FirmwareError(Status.BAD_MEASUREMENT)
            if int.from_bytes(id_block[88:96], "little") != guest.policy:
                raise FirmwareError(Status.POLICY_FAILURE)
        guest.host_data = host_data
        guest.finished = True

    def decommission(self, guest: SnpGuest) -> None:
        """SNP_DECOMMISSION; the ASID is free after a flush."""
        self.guests.remove(guest)
        if guest.asid:
            self._bindings.unbind(guest.asid)
            guest.asid = 0
