"""What the emulated kernel prints while it runs, as dmesg would show it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LINES = 1000


class KernelLog(deque[str]):
    """The last lines, oldest first.

    Attributes:
        on_line: called with each line as it is printed; None: nobody listens.
    """

    def __init__(self) -> None:
        super().__init__(maxlen=LINES)
        self.on_line: Callable[[str], object] | None = None

    def print(self, line: str) -> None:
        """Print a line."""
        self.append(line)
        if self.on_line is not None:
            self.on_line(line)
