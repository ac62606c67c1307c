"""Who hears of changes in the model.

A listener is called from inside model calls. It must only take note: calling back into the
model from it is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cgfs.core.cgroup import Cgroup
    from cgfs.core.node import Node


class ModelListener(Protocol):
    """What the model tells the view."""

    def modified(self, node: Node, slot: int) -> None:
        """An events file generated an event."""

    def changed(self, node: Node, slot: int) -> None:
        """The text of a CONFIG file changed by something else than a write to itself."""

    def appeared(self, cgrp: Cgroup, node: Node) -> None:
        """The files of ``node`` appeared in ``cgrp`` (``node is cgrp``: the directory itself)."""

    def vanished(self, cgrp: Cgroup, node: Node) -> None:
        """The files of ``node`` went from ``cgrp`` (``node is cgrp``: the directory itself)."""


class Silence:
    """The listener of a model that nobody watches.

    Args:
        nodes: what owns files, by block number; nobody holds a removed one open.
    """

    def __init__(self, nodes: dict[int, Node]) -> None:
        self._nodes = nodes

    def modified(self, node: Node, slot: int) -> None:
        """Ignore an event."""

    def changed(self, node: Node, slot: int) -> None:
        """Ignore a change of text."""

    def appeared(self, cgrp: Cgroup, node: Node) -> None:
        """Ignore new files."""

    def vanished(self, cgrp: Cgroup, node: Node) -> None:
        """Drop what owned removed files."""
        if not node.online:
            self._nodes.pop(node.block, None)
