"""How an SEV guest travels: certificates, session blobs, packets.

Sizes and what each authentication code covers follow the SEV API (AMD publication 55766); the
algorithms are a MODEL: no elliptic curves and no AES, every secret is a SHA-256 of named parts. So
a stream of one emulated platform is understood by any other, the platform it was not meant for
refuses it, and a client can compute whatever an owner of the guest could::

    transport integrity key (TIK)   sha256("TIK" + dh blob + session blob)[:16]     at a launch
    transport encryption key (TEK)  sha256("TEK" + dh blob + session blob)[:16]
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from kvmsim.abi.psp import Status
from kvmsim.sev.errors import FirmwareError
from kvmsim.sev.memory_key import xor

#: Every certificate of the platform itself: PDH, PEK, OCA, CEK.
CERT_BYTES = 2084
#: What ``SEND_START`` makes and ``RECEIVE_START`` takes.
SESSION_BYTES = 128
#: Flags, initialisation vector, authentication code: the header of a packet.
HEADER_BYTES = 4 + 16 + 32
KEY_BYTES = 16

# First byte of what a code covers (SEV API, "HMAC" of each command).
SECRET_TAG = b"\x01"
SEND_TAG = b"\x02"
MEASURE_TAG = b"\x04"


@dataclass(frozen=True, slots=True)
class TransportKeys:
    """Keys that protect what goes in and out of a guest.

    Attributes:
        tek: encrypts.
        tik: authenticates.
    """

    tek: bytes
    tik: bytes

    def code(self, *parts: bytes) -> bytes:
        """Authentication code of some bytes."""
        return hmac.digest(self.tik, b"".join(parts), "sha256")

    def crypt(self, iv: bytes, data: bytes) -> bytes:
        """Encrypt or decrypt the data of a packet."""
        return xor(data, hashlib.shake_256(self.tek + iv).digest(len(data)))


def owner_keys(dh: bytes, session: bytes) -> TransportKeys:
    """Keys of a launch, from the blobs the guest's owner gave (both may be empty)."""
    return TransportKeys(_secret(b"TEK", dh, session), _secret(b"TIK", dh, session))


def _secret(name: bytes, *parts: bytes) -> bytes:
    return hashlib.sha256(name + b"".join(parts)).digest()[:KEY_BYTES]


# -- certificates --------------------------------------------------------------------------


def certificate(usage: bytes, public: bytes) -> bytes:
    """A certificate: version 1, its use, a public value, and a checksum for a signature."""
    body = (1).to_bytes(4, "little") + usage.ljust(12, b"\0") + public
    body = body.ljust(CERT_BYTES - 32, b"\0")
    return body + hashlib.sha256(body).digest()


def public_of(cert: bytes) -> bytes:
    """The public value of a certificate.

    Raises:
        FirmwareError: INVALID_CERTIFICATE.
    """
    body = cert[:-32]
    if len(cert) != CERT_BYTES or hashlib.sha256(body).digest() != cert[-32:]:
        raise FirmwareError(Status.INVALID_CERTIFICATE)
    return cert[16:48]


# -- session -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """What two platforms share: each knows its own PDH and was given the other's."""

    wrapping: TransportKeys

    @classmethod
    def between(cls, one: bytes, other: bytes, nonce: bytes) -> Link:
        """The link of two platforms by their public values, in any order."""
        shared = hashlib.sha256(b"".join(sorted((one, other)))).digest()
        return cls(
            TransportKeys(_secret(b"KEK", shared, nonce), _secret(b"KIK", shared, nonce)),
        )


def wrap_session(
    link_ends: tuple[bytes, bytes], nonce: bytes, keys: TransportKeys, policy: int
) -> bytes:
    """The session blob of SEND_START: nonce, wrapped keys, vector, two codes."""
    link = Link.between(*link_ends, nonce).wrapping
    iv = _secret(b"IV", nonce)
    wrapped = link.crypt(iv, keys.tek + keys.tik)
    return nonce + wrapped + iv + link.code(wrapped, iv) + keys.code(policy.to_bytes(4, "little"))


def unwrap_session(link_ends: tuple[bytes, bytes], session: bytes, policy: int) -> TransportKeys:
    """Take the keys out of a session blob.

    Raises:
        FirmwareError: INVALID_LENGTH; BAD_MEASUREMENT: meant for another platform, changed on the
            way, or given with another policy.
    """
    if len(session) != SESSION_BYTES:
        raise FirmwareError(Status.INVALID_LENGTH)
    nonce, wrapped, iv = session[:16], session[16:48], session[48:64]
    link = Link.between(*link_ends, nonce).wrapping
    if link.code(wrapped, iv) != session[64:96]:
        raise FirmwareError(Status.BAD_MEASUREMENT)
    both = link.crypt(iv, wrapped)
    keys = TransportKeys(both[:KEY_BYTES], both[KEY_BYTES:])
    if keys.code(policy.to_bytes(4, "little")) != session[96:]:
        raise FirmwareError(Status.BAD_MEASUREMENT)
    return keys


# -- packets -------------------------------------------------------------------------------


def seal(
    keys: TransportKeys, tag: bytes, iv: bytes, plain: bytes, suffix: bytes = b""
) -> tuple[bytes, bytes]:
    """Make a packet: its header and its data.

    Args:
        keys: of the guest.
        tag: ``SECRET_TAG`` or ``SEND_TAG``.
        iv: 16 bytes, used once.
        plain: what is inside.
        suffix: covered besides: the measurement, for a secret.
    """
    data = keys.crypt(iv, plain)
    flags = bytes(4)
    return flags + iv + _packet_code(keys, tag, flags + iv, data, suffix), data


def unseal(
    keys: TransportKeys, tag: bytes, header: bytes, data: bytes, suffix: bytes = b""
) -> bytes:
    """Open a packet.

    Raises:
        FirmwareError: INVALID_LENGTH of the header; BAD_MEASUREMENT.
    """
    if len(header) != HEADER_BYTES:
        raise FirmwareError(Status.INVALID_LENGTH, (HEADER_BYTES, len(data)))
    if _packet_code(keys, tag, header[:20], data, suffix) != header[20:]:
        raise FirmwareError(Status.BAD_MEASUREMENT)
    return keys.crypt(header[4:20], data)


def _packet_code(
    keys: TransportKeys, tag: bytes, start: bytes, data: bytes, suffix: bytes
) -> bytes:
    length = len(data).to_bytes(4, "little")
    return keys.code(tag, start, length, length, data, suffix)
