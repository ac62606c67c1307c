"""A host's files without a mount: the same tree that FUSE serves, by path."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cgfs.core.caller import KERNEL
from cgfs.errors import CgroupError
from cgfs.views.tree import ROOT, Ino, Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.core.caller import Caller


class Files:
    """Reads and writes the files of a host, as a process of the host would.

    Every refusal is a ``CgroupError`` with the errno the system call would return.

    Args:
        tree: of the host.
        now_ns: the model's time.
        caller: who asks; root by default.
    """

    def __init__(self, tree: Tree, now_ns: Callable[[], int], caller: Caller = KERNEL) -> None:
        self._tree = tree
        self._now_ns = now_ns
        self._caller = caller

    def read(self, path: str) -> str:
        """The text of a file, such as ``sys/fs/cgroup/misc.capacity``."""
        self._tree.before_access()
        return os.fsdecode(self._tree.read(self._ino(path), self._caller))

    def write(self, path: str, text: str) -> None:
        """Gives a command to a control file; a newline at the end is allowed."""
        self._tree.before_access()
        self._tree.write(self._ino(path), os.fsencode(text), self._caller, self._now_ns())

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Makes a cgroup."""
        self._tree.before_access()
        parent, _, name = path.rstrip("/").rpartition("/")
        self._tree.mkdir(self._ino(parent), os.fsencode(name), mode, self._caller, self._now_ns())

    def rmdir(self, path: str) -> None:
        """Removes a cgroup."""
        self._tree.before_access()
        parent, _, name = path.rstrip("/").rpartition("/")
        self._tree.rmdir(self._ino(parent), os.fsencode(name), self._caller, self._now_ns())

    def listdir(self, path: str = "") -> list[str]:
        """The names in a directory."""
        self._tree.before_access()
        return [os.fsdecode(name) for name, _ in self._tree.readdir(self._ino(path))]

    def _ino(self, path: str) -> Ino:
        ino = ROOT
        for name in filter(None, path.split("/")):
            found = self._tree.lookup(ino, os.fsencode(name))
            if found is None:
                raise CgroupError(errno.ENOENT, f"{path}: no such file or directory")
            ino = found
        return ino
