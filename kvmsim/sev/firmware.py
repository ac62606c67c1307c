"""The secure processor, as KVM drives it: guests by handle, and the ASIDs they are bound to.

A MODEL after the SEV API: the states and statuses are those of kvm.md D.5. Commands take and give
Python values; memory is read and written by whoever calls. A refusal is a :class:`FirmwareError`.

What a measurement covers, so that a client can compute it::

    LD      = sha256(plaintext of every LAUNCH_UPDATE_DATA, VMSA page of every vCPU; in that order
              in which they were loaded). Addresses are not covered.
    measure = hmac_sha256(TIK, 0x04, API major, API minor, build, policy (u32), LD, nonce)
    blob    = measure (32 bytes), nonce (16 bytes)

TIK: see ``kvmsim.sev.transport``. The VMSA page: ``kvmsim.kvm.sev_vmsa``.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvmsim.abi.psp import GuestState, PlatformState, Status
from kvmsim.abi.sev import SEV_POLICY_NOKS
from kvmsim.sev import transport
from kvmsim.sev.bindings import Bindings
from kvmsim.sev.errors import FirmwareError
from kvmsim.sev.guest import Guest
from kvmsim.sev.memory_key import MemoryKey
from kvmsim.sev.platform import API_MAJOR, API_MINOR, Platform
from kvmsim.sev.snp import Snp

if TYPE_CHECKING:
    from collections.abc import Callable

MEASURE_BYTES = 32 + 16
REPORT_BYTES = 208
BLOCK_BYTES = 16


class Firmware:
    """The firmware of one machine.

    Args:
        chip: makes keys, ids and nonces of this machine differ from another's.
        min_sev_asid: lowest ASID of a guest that is not SEV-ES.

    Attributes:
        platform: the part that is not about one guest.
        guests: handle -> guest.
        before: called with the name of a command before it runs; may raise FirmwareError for a
            refusal, or KvmError for what the driver reports: ENODEV absent, EBUSY dead, ETIMEDOUT.
        bindings: guests and ASIDs.
        snp: the commands for SNP guests.
    """

    def __init__(self, chip: bytes = b"", min_sev_asid: int = 1) -> None:
        self.platform = Platform(chip)
        self.guests: dict[int, Guest] = {}
        self.before: Callable[[str], None] | None = None
        self.bindings = Bindings()
        self.snp = Snp(self.bindings, self.begin)
        self._min_sev_asid = min_sev_asid
        self._last_handle = 0

    def init(self) -> None:
        """INIT, if the platform is not initialised."""
        if self.platform.state == PlatformState.UNINIT:
            self.begin("INIT")
            self.platform.init()

    # -- life ------------------------------------------------------------------------------

    def launch_start(
        self, policy: int, handle: int = 0, dh: bytes = b"", session: bytes = b""
    ) -> int:
        """LAUNCH_START: a new guest, its handle.

        Args:
            policy: of the guest.
            handle: a guest to share the memory key with; 0: none.
            dh: the owner's Diffie-Hellman certificate.
            session: the owner's session blob.
        """
        self._begin_guest("LAUNCH_START", policy)
        key = self._memory_key(policy, handle)
        keys = transport.owner_keys(dh, session)
        return self._add(Guest(self._next(), policy, GuestState.LAUNCH_UPDATE, key, keys))

    def receive_start(self, policy: int, handle: int, pdh: bytes, session: bytes) -> int:
        """RECEIVE_START: a new guest from another platform, its handle.

        Args:
            policy: of the guest, as SEND_START gave it.
            handle: as for a launch.
            pdh: the sender's PDH certificate.
            session: what its SEND_START made.
        """
        self._begin_guest("RECEIVE_START", policy)
        ends = (transport.public_of(pdh), self.platform.pdh_public)
        keys = transport.unwrap_session(ends, session, policy)
        key = self._memory_key(policy, handle)
        return self._add(Guest(self._next(), policy, GuestState.RECEIVE_UPDATE, key, keys))

    def activate(self, handle: int, asid: int) -> None:
        """ACTIVATE: bind a guest to an ASID."""
        guest = self._guest("ACTIVATE", handle)
        if guest.asid:
            raise FirmwareError(Status.ACTIVE)
        if guest.es != (asid < self._min_sev_asid):
            raise FirmwareError(Status.INVALID_ASID)
        self.bindings.bind(asid)
        guest.asid = asid

    def deactivate(self, handle: int) -> None:
        """DEACTIVATE: the ASID is free after a flush."""
        guest = self._guest("DEACTIVATE", handle)
        if guest.asid:
            self.bindings.unbind(guest.asid)
            guest.asid = 0

    def decommission(self, handle: int) -> None:
        """DECOMMISSION: the firmware forgets a guest."""
        guest = self._guest("DECOMMISSION", handle)
        if guest.asid:
            raise FirmwareError(Status.ACTIVE)
        del self.guests[handle]
        if not self.guests and self.platform.state == PlatformState.WORKING:
            self.platform.state = PlatformState.INIT

    def df_flush(self) -> None:
        """DF_FLUSH: deactivated ASIDs can be used again."""
        self.begin("DF_FLUSH")
        self.bindings.flush()

    # -- launch ----------------------------------------------------------------------------

    def launch_update_data(self, handle: int, address: int, plain: bytes) -> bytes:
        """LAUNCH_UPDATE_DATA: measure bytes; what they are under the guest's key."""
        guest = self._guest("LAUNCH_UPDATE_DATA", handle, GuestState.LAUNCH_UPDATE)
        _aligned(address, len(plain))
        guest.digest.update(plain)
        return guest.memory_key.apply(address, plain)

    def launch_update_vmsa(self, handle: int, page: bytes) -> None:
        """LAUNCH_UPDATE_VMSA: measure a vCPU's state."""
        guest = self._guest("LAUNCH_UPDATE_VMSA", handle, GuestState.LAUNCH_UPDATE)
        guest.digest.update(page)

    def launch_measure(self, handle: int, length: int) -> bytes:
        """LAUNCH_MEASURE: the blob. Too short a buffer (``length``) is a query."""
        guest = self._guest("LAUNCH_MEASURE", handle, GuestState.LAUNCH_UPDATE)
        if length < MEASURE_BYTES:
            raise FirmwareError(Status.INVALID_LENGTH, (MEASURE_BYTES,))
        guest.state = GuestState.LAUNCH_SECRET
        nonce = self.platform.nonce()
        guest.measurement = guest.keys.code(
            transport.MEASURE_TAG,
            self.platform.version,
            guest.policy.to_bytes(4, "little"),
            guest.digest.digest(),
            nonce,
        )
        return guest.measurement + nonce

    def launch_secret(
        self, handle: int, address: int, length: int, header: bytes, data: bytes
    ) -> bytes:
        """LAUNCH_UPDATE_SECRET: what the owner sent, under the guest's key."""
        guest = self._guest("LAUNCH_UPDATE_SECRET", handle, GuestState.LAUNCH_SECRET)
        _aligned(address, length)
        if length < len(data):
            raise FirmwareError(Status.INVALID_LENGTH)
        plain = transport.unseal(guest.keys, transport.SECRET_TAG, header, data, guest.measurement)
        return guest.memory_key.apply(address, plain)

    def launch_finish(self, handle: int) -> None:
        """LAUNCH_FINISH: the guest may run."""
        guest = self._guest(
            "LAUNCH_FINISH", handle, GuestState.LAUNCH_UPDATE, GuestState.LAUNCH_SECRET
        )
        guest.state = GuestState.RUNNING

    # -- a guest that is there -------------------------------------------------------------

    def guest_status(self, handle: int) -> tuple[int, GuestState]:
        """GUEST_STATUS: policy and state."""
        guest = self._guest("GUEST_STATUS", handle)
        return guest.policy, guest.state

    def debug(self, handle: int, address: int, data: bytes, *, decrypt: bool) -> bytes:
        """DBG_DECRYPT and DBG_ENCRYPT: bytes as seen from the other side of the key."""
        guest = self._guest("DBG_DECRYPT" if decrypt else "DBG_ENCRYPT", handle)
        guest.need_debug()
        return guest.memory_key.apply(address, data)

    def attestation(self, handle: int, nonce: bytes, length: int) -> bytes:
        """ATTESTATION: nonce, launch digest, policy, and a code for a signature (208 bytes)."""
        guest = self._guest("ATTESTATION", handle)
        if length < REPORT_BYTES:
            raise FirmwareError(Status.INVALID_LENGTH, (REPORT_BYTES,))
        body = nonce + guest.digest.digest() + guest.policy.to_bytes(4, "little")
        body += (0x1002).to_bytes(4, "little") + (2).to_bytes(4, "little") + bytes(4)
        signature = hashlib.sha256(self.platform.pek_public + body).digest()
        return (body + signature).ljust(REPORT_BYTES, b"\0")

    # -- migration -------------------------------------------------------------------------

    def send_start(self, handle: int, pdh: bytes, length: int) -> tuple[int, bytes]:
        """SEND_START: the policy and the session blob. Too short a buffer is a query.

        Args:
            handle: which guest.
            pdh: the target's PDH certificate.
            length: of the buffer for the session.
        """
        guest = self._guest("SEND_START", handle, GuestState.RUNNING)
        guest.need_send()
        if length < transport.SESSION_BYTES:
            raise FirmwareError(Status.INVALID_LENGTH, (transport.SESSION_BYTES,))
        ends = (transport.public_of(pdh), self.platform.pdh_public)
        nonce = self.platform.nonce()
        keys = transport.owner_keys(b"send", nonce + self.platform.chip_id)
        session = transport.wrap_session(ends, nonce, keys, guest.policy)
        guest.keys = keys
        guest.state = GuestState.SEND_UPDATE
        return guest.policy, session

    def send_update_data(
        self, handle: int, address: int, encrypted: bytes, header_length: int, length: int
    ) -> tuple[bytes, bytes]:
        """SEND_UPDATE_DATA: header and data of a packet. Too short a buffer is a query."""
        guest = self._guest("SEND_UPDATE_DATA", handle, GuestState.SEND_UPDATE)
        wanted = len(encrypted) or 4096
        if header_length < transport.HEADER_BYTES or length < wanted:
            raise FirmwareError(Status.INVALID_LENGTH, (transport.HEADER_BYTES, wanted))
        _aligned(address, len(encrypted))
        plain = guest.memory_key.apply(address, encrypted)
        return transport.seal(guest.keys, transport.SEND_TAG, self.platform.nonce(), plain)

    def send_finish(self, handle: int) -> None:
        """SEND_FINISH: the guest has left."""
        guest = self._guest("SEND_FINISH", handle, GuestState.SEND_UPDATE)
        guest.state = GuestState.SENT

    def send_cancel(self, handle: int) -> None:
        """SEND_CANCEL: the guest stays."""
        guest = self._guest("SEND_CANCEL", handle, GuestState.SEND_UPDATE)
        guest.state = GuestState.RUNNING

    def receive_update_data(
        self, handle: int, address: int, length: int, header: bytes, data: bytes
    ) -> bytes:
        """RECEIVE_UPDATE_DATA: what a packet brought, under the guest's key."""
        guest = self._guest("RECEIVE_UPDATE_DATA", handle, GuestState.RECEIVE_UPDATE)
        _aligned(address, length)
        if length < len(data):
            raise FirmwareError(Status.INVALID_LENGTH)
        plain = transport.unseal(guest.keys, transport.SEND_TAG, header, data)
        return guest.memory_key.apply(address, plain)

    def receive_finish(self, handle: int) -> None:
        """RECEIVE_FINISH: the guest may run."""
        guest = self._guest("RECEIVE_FINISH", handle, GuestState.RECEIVE_UPDATE)
        guest.state = GuestState.RUNNING

    # -- parts -----------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """A command begins: let ``before`` refuse it."""
        if self.before is not None:
            self.before(name)

    def _begin_guest(self, name: str, policy: int) -> None:
        """A command that makes a guest begins."""
        self.begin(name)
        self.platform.need(PlatformState.INIT, PlatformState.WORKING)
        if (policy >> 16 & 0xFF, policy >> 24 & 0xFF) > (API_MAJOR, API_MINOR):
            raise FirmwareError(Status.POLICY_FAILURE)

    def _guest(self, name: str, handle: int, *states: GuestState) -> Guest:
        """The guest of a command, in one of the states it may be in."""
        self.begin(name)
        guest = self.guests.get(handle)
        if guest is None:
            raise FirmwareError(Status.INVALID_GUEST)
        if states:
            guest.need(*states)
        return guest

    def _memory_key(self, policy: int, handle: int) -> MemoryKey:
        if not handle:
            return MemoryKey(self.platform.nonce())
        shared = self.guests.get(handle)
        if shared is None:
            raise FirmwareError(Status.INVALID_GUEST)
        if (shared.policy | policy) & SEV_POLICY_NOKS or shared.policy != policy:
            raise FirmwareError(Status.POLICY_FAILURE)
        return shared.memory_key

    def _next(self) -> int:
        self._last_handle += 1
        return self._last_handle

    def _add(self, guest: Guest) -> int:
        self.guests[guest.handle] = guest
        self.platform.state = PlatformState.WORKING
        return guest.handle


def _aligned(address: int, length: int) -> None:
    """Memory goes through the firmware in whole blocks."""
    if address % BLOCK_BYTES:
        raise FirmwareError(Status.INVALID_ADDRESS)
    if length % BLOCK_BYTES:
        raise FirmwareError(Status.INVALID_LENGTH)
