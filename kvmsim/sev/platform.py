"""The platform side of the secure processor: its state, its certificates, its numbers."""

from __future__ import annotations

import hashlib

from kvmsim.abi.psp import PlatformState, Status
from kvmsim.sev import transport
from kvmsim.sev.errors import FirmwareError

API_MAJOR = 1
API_MINOR = 55
BUILD = 21
CHIP_ID_BYTES = 64


class Platform:
    """One secure processor.

    Args:
        chip: which one.

    Attributes:
        state: ``PlatformState``; no guest can be started in UNINIT.
        owned: a certificate of an owner was imported.
        chip_id: 64 bytes nobody else has.
        version: API major, API minor, build.
    """

    def __init__(self, chip: bytes) -> None:
        self.state = PlatformState.UNINIT
        self.owned = False
        self.chip_id = hashlib.sha512(b"chip" + chip).digest()
        self.version = bytes((API_MAJOR, API_MINOR, BUILD))
        self._oca = b""
        self._nonces = 0
        self._pek_generation = 0
        self._pdh_generation = 0

    def need(self, *states: PlatformState) -> None:
        """Refuse a command that does not fit the state; INVALID_PLATFORM_STATE."""
        if self.state not in states:
            raise FirmwareError(Status.INVALID_PLATFORM_STATE)

    def nonce(self) -> bytes:
        """16 bytes, never the same twice."""
        self._nonces += 1
        number = self._nonces.to_bytes(8, "little")
        return hashlib.sha256(b"nonce" + self.chip_id + number).digest()[:16]

    # -- identity --------------------------------------------------------------------------

    @property
    def pek_public(self) -> bytes:
        """Public value of the platform endorsement key."""
        return self._public(b"PEK", self._pek_generation)

    @property
    def pdh_public(self) -> bytes:
        """Public value of the platform's Diffie-Hellman key."""
        return self._public(b"PDH", self._pdh_generation)

    def _public(self, name: bytes, generation: int) -> bytes:
        return hashlib.sha256(name + self.chip_id + generation.to_bytes(4, "little")).digest()

    # -- commands --------------------------------------------------------------------------

    def init(self) -> None:
        """INIT or INIT_EX; nothing when it is initialised."""
        if self.state == PlatformState.UNINIT:
            self.state = PlatformState.INIT

    def factory_reset(self) -> None:
        """SHUTDOWN and FACTORY_RESET: new keys, no owner, not initialised."""
        self.state = PlatformState.UNINIT
        self.owned = False
        self._oca = b""
        self._pek_generation += 1
        self._pdh_generation += 1

    def pek_gen(self) -> None:
        """PEK_GEN: a new endorsement key, and with it a new Diffie-Hellman key."""
        self.need(PlatformState.INIT)
        self._pek_generation += 1
        self._pdh_generation += 1
        self.owned = False

    def pdh_gen(self) -> None:
        """PDH_GEN: a new Diffie-Hellman key."""
        self.need(PlatformState.INIT, PlatformState.WORKING)
        self._pdh_generation += 1

    def pek_csr(self, length: int) -> bytes:
        """PEK_CSR: a certificate to be signed. Too short a buffer is a query."""
        self.need(PlatformState.INIT, PlatformState.WORKING)
        if length < transport.CERT_BYTES:
            raise FirmwareError(Status.INVALID_LENGTH, (transport.CERT_BYTES,))
        return transport.certificate(b"PEK CSR", self.pek_public)

    def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        """PEK_CERT_IMPORT: the owner's signature."""
        self.need(PlatformState.INIT)
        if self.owned:
            raise FirmwareError(Status.ALREADY_OWNED)
        if transport.public_of(pek) != self.pek_public:
            raise FirmwareError(Status.INVALID_CERTIFICATE)
        transport.public_of(oca)
        self.owned = True
        self._oca = oca

    def pdh_cert_export(self, pdh_length: int, chain_length: int) -> tuple[bytes, bytes]:
        """PDH_CERT_EXPORT: the PDH certificate, and the chain PEK, OCA, CEK."""
        self.need(PlatformState.INIT, PlatformState.WORKING)
        pdh = transport.certificate(b"PDH", self.pdh_public)
        chain = (
            transport.certificate(b"PEK", self.pek_public)
            + (self._oca or transport.certificate(b"OCA", self._public(b"OCA", 0)))
            + transport.certificate(b"CEK", self._public(b"CEK", 0))
        )
        if pdh_length < len(pdh) or chain_length < len(chain):
            raise FirmwareError(Status.INVALID_LENGTH, (len(pdh), len(chain)))
        return pdh, chain

    def get_id(self, length: int) -> bytes:
        """GET_ID: the id of the chip in the only socket. Too short a buffer is a query."""
        if length < CHIP_ID_BYTES:
            raise FirmwareError(Status.INVALID_LENGTH, (CHIP_ID_BYTES,))
        return self.chip_id
