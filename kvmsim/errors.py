"""Errors of kvmsim.

KvmsimError
├── KvmError     an ioctl or KVM_RUN refused, with the errno its caller sees
└── ConfigError  a preset that cannot be used; one line, names the file and the key
"""

from __future__ import annotations

import errno as errno_names


class KvmsimError(Exception):
    """Base of every error kvmsim raises on purpose."""


class KvmError(KvmsimError):
    """A call into KVM failed.

    A refused charge keeps the cgroup's own error as ``__cause__``, which names the cgroup, the file
    and the value.

    Args:
        errno: positive error number, as in ``errno.EINVAL``.
        message: what was refused and why; the error's name when empty.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{message} ({name})" if message else name)
        self.errno = errno


class ConfigError(KvmsimError):
    """A preset or option that cannot be used. The message is one line."""
