"""Extended attributes, with the limits of kernfs (Linux 6.12 fs/kernfs/inode.c)."""

from __future__ import annotations

from errno import EINVAL, ENODATA, ENOSPC, EOPNOTSUPP
from typing import TYPE_CHECKING

from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.node import Attributes

_PREFIXES = (b"user.", b"trusted.", b"security.")
_MAX_USER_XATTRS = 128
_MAX_USER_SIZE = 128 << 10


def _vet_prefix(name: bytes) -> None:
    if not name.startswith(_PREFIXES):
        raise CgroupError(EOPNOTSUPP)
    if name in _PREFIXES:
        raise CgroupError(EINVAL)


def set(own: Attributes, name: bytes, value: bytes) -> None:  # noqa: A001 - the verb of xattr(7)
    """Set an attribute; an old value is counted until the new one is in.

    Raises:
        CgroupError: EOPNOTSUPP for another prefix, EINVAL for nothing behind it, ENOSPC above
            128 attributes or 131072 bytes of ``user.*``.
    """
    _vet_prefix(name)
    if own.xattrs is None:
        own.xattrs = {}
    if name.startswith(b"user."):
        sizes = [len(v) for n, v in own.xattrs.items() if n.startswith(b"user.")]
        if len(sizes) >= _MAX_USER_XATTRS or sum(sizes) + len(value) > _MAX_USER_SIZE:
            raise CgroupError(ENOSPC)
    own.xattrs[name] = value


def get(own: Attributes | None, name: bytes) -> bytes:
    """Value of an attribute.

    Raises:
        CgroupError: EOPNOTSUPP for another prefix, EINVAL for nothing behind it, ENODATA.
    """
    _vet_prefix(name)
    if own is None or own.xattrs is None or name not in own.xattrs:
        raise CgroupError(ENODATA)
    return own.xattrs[name]


def names(own: Attributes | None) -> list[bytes]:
    """Names, the greatest first (Linux 6.2 fs/xattr.c: a tree walked from its right end)."""
    return sorted(own.xattrs, reverse=True) if own is not None and own.xattrs else []


def remove(own: Attributes | None, name: bytes) -> None:
    """Remove an attribute.

    Raises:
        CgroupError: EOPNOTSUPP for another prefix, EINVAL for nothing behind it, ENODATA.
    """
    get(own, name)
    assert own is not None
    assert own.xattrs is not None
    del own.xattrs[name]
