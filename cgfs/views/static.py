"""Directories and text files of a host root that are no cgroup files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cgfs.core.caller import KERNEL
from cgfs.core.cftype import CFType, Kind
from cgfs.core.node import DIRECTORY, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cgfs.core.caller import Caller
    from cgfs.core.roots import Roots

_DIRECTORY_MODE = 0o555


class TextFile(Node):
    """A read-only file; its only slot is 1.

    Args:
        roots: the host, for a block number.
        text: generates the content.
        kind: LIVE where the content changes without :meth:`Tree.text_changed`.
    """

    __slots__ = ("_rows", "text")

    def __init__(self, roots: Roots, text: Callable[[], str], kind: Kind = Kind.CONFIG) -> None:
        super().__init__(roots.next_block(), KERNEL, 0)
        self.text = text
        self._rows = (CFType("", show=_text_show, kind=kind),)

    @property
    def rows(self) -> Sequence[CFType]:
        """One row."""
        return self._rows


def _text_show(file: TextFile, _caller: Caller) -> str:
    return file.text()


class Directory(Node):
    """A directory that nobody can change through the mount.

    Attributes:
        entries: text files, further directories, and roots of hierarchies.
    """

    __slots__ = ("entries",)

    def __init__(self, roots: Roots, entries: dict[str, Node] | None = None) -> None:
        super().__init__(roots.next_block(), KERNEL, 0)
        self.entries: dict[str, Node] = {} if entries is None else entries

    @property
    def rows(self) -> Sequence[CFType]:
        """None: only slot 0 is in use."""
        return ()

    def default_mode(self, slot: int) -> int:
        """Permission bits of the directory."""
        assert slot == DIRECTORY
        return _DIRECTORY_MODE

    def subdirectory(self, roots: Roots, path: str) -> Directory:
        """The directory at a relative path below, made where missing."""
        directory = self
        for name in path.split("/"):
            entry = directory.entries.setdefault(name, Directory(roots))
            assert isinstance(entry, Directory)
            directory = entry
        return directory
