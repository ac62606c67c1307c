"""One row per control file, as ``struct cftype`` in Linux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgfs.core.caller import Caller

# The node is a Cgroup for core files and a Css for a controller's files.
Show = Callable[[Any, "Caller"], str]
Write = Callable[[Any, bytes, "Caller", int], None]

PAGE_SIZE = 4096


class Kind(Enum):
    """How a file's text may be served."""

    CONFIG = "config"
    """Changes only when somebody sets it: the kernel's page cache may serve it in between."""
    LIVE = "live"
    """Follows the machine: every read is answered by the model."""


class On(Enum):
    """In which cgroups a file exists."""

    EVERY = "every"
    ROOT = "root"
    NON_ROOT = "non-root"


@dataclass(frozen=True, slots=True, eq=False)
class CFType:
    """A control file.

    Attributes:
        name: full name, such as "misc.max".
        show: text of a read; None makes read(2) fail with EINVAL.
        write: takes the node, the text before the first NUL, the opener and the time in ns;
            raises CgroupError; None makes write(2) fail with EINVAL.
        on: where the file exists.
        kind: how it may be served.
        notify: whether it generates file-modified events.
        changes: names of CONFIG files of other cgroups whose text a write here may change.
        doc: one line for the reference.
        max_write: longest accepted write(2) in bytes; longer ones are E2BIG.
    """

    name: str
    show: Show | None = None
    write: Write | None = None
    on: On = On.EVERY
    kind: Kind = Kind.CONFIG
    notify: bool = False
    changes: tuple[str, ...] = ()
    doc: str = ""
    max_write: int = PAGE_SIZE

    @property
    def mode(self) -> int:
        """Permission bits of a fresh file: 0444, 0644 or 0200 (Linux cgroup_file_mode())."""
        return (0o444 if self.show else 0) | (0o200 if self.write else 0)

    def exists_on(self, *, root: bool) -> bool:
        """Whether a root (or a non-root) cgroup has this file."""
        return self.on is On.EVERY or (self.on is On.ROOT) is root


Listing = tuple[tuple[bytes, int], ...]


def listings(rows: tuple[CFType, ...]) -> dict[bool, Listing]:
    """Name and slot of the files that exist in a root (True) and in other cgroups (False)."""
    return {
        root: tuple(
            (row.name.encode(), slot)
            for slot, row in enumerate(rows, 1)
            if row.exists_on(root=root)
        )
        for root in (True, False)
    }
