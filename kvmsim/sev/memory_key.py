"""What a guest's memory looks like from outside: bytes under the key of the guest.

MODEL: the cipher is a stream that depends on the key and on the offset in the page. Hardware tweaks
with the physical address instead; the offset survives a mapping somewhere else, as physical memory
does, and this model knows no physical addresses. One operation both encrypts and decrypts.
"""

from __future__ import annotations

import hashlib

PAGE_BYTES = 4096


class MemoryKey:
    """A memory encryption key.

    Args:
        secret: what the key is made from.
    """

    __slots__ = ("_pad", "_secret")

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._pad = b""

    def apply(self, address: int, data: bytes) -> bytes:
        """Encrypt or decrypt bytes that are at an address."""
        if not self._pad:
            self._pad = hashlib.shake_256(b"memory" + self._secret).digest(PAGE_BYTES)
        offset = address % PAGE_BYTES
        pages = (offset + len(data) + PAGE_BYTES - 1) // PAGE_BYTES
        return xor(data, (self._pad * pages)[offset : offset + len(data)])


def xor(data: bytes, stream: bytes) -> bytes:
    """Combine two byte strings of one length."""
    mixed = int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")
    return mixed.to_bytes(len(data), "little")
