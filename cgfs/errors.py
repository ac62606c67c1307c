"""The family of errors of this package.

CgfsError
├── CgroupError          a request is refused; carries the errno a system call would return
│   └── ChargeRefused    a limit or a capacity is exhausted; names the cgroup, file and value
└── MountError           a mount cannot be made or taken down (raised by the adapters)
"""

from __future__ import annotations

import errno
import os


class CgfsError(Exception):
    """Base of every error this package raises on purpose."""


class CgroupError(CgfsError):
    """A request the model refuses.

    Attributes:
        errno: what the system call returns, positive.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or os.strerror(errno))
        self.errno = errno


class ChargeRefused(CgroupError):
    """A charge would pass a limit or the machine's capacity (EBUSY).

    Attributes:
        resource: "sev", "sev_es", "tdx" or a name from a preset.
        cgroup: path of the cgroup that refused, "/" for the root.
        file: the control file that holds the value, such as "misc.max".
        value: that value as the file shows it, such as "sev 2".
    """

    def __init__(self, resource: str, cgroup: str, file: str, value: str) -> None:
        super().__init__(errno.EBUSY, f'cgroup {cgroup} is at {file} "{value}"')
        self.resource = resource
        self.cgroup = cgroup
        self.file = file
        self.value = value


class MountError(CgfsError):
    """A mount that cannot be made, or cannot be taken down; the text is one line for a person."""
