"""Memory types of locked operands: whether an access is a bus lock (kvm.md A.1).

What the page tables say of a page is kept until translation or memory types change, for a locked
loop asks at every turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86 import paging, sites
from kvmsim.engine.x86.lock_code import CalmPages

if TYPE_CHECKING:
    from kvmsim.engine.x86.memory import Memory
    from kvmsim.engine.x86.paging import Mtrrs
    from kvmsim.engine.x86.registers import Registers

_IA32_PAT = 0x277


class Operands:
    """The operands of one VM.

    Args:
        live: registers of the vCPU that executes.
        memory: guest memory.

    Attributes:
        calm: numbers of pages known to be write-back memory, whoever accesses them.
        calm_pages: the same for machine code.
    """

    def __init__(self, live: Registers, memory: Memory) -> None:
        self.calm: set[int] = set()
        self.calm_pages = CalmPages()
        self._live = live
        self._memory = memory
        self._types: dict[int, bool] = {}

    def forget(self) -> None:
        """Memory types are others from now on."""
        self.calm.clear()
        self.calm_pages.clear()
        self._types.clear()

    def classify(
        self, mtrrs: Mtrrs, at: int, size: int, *, user: bool | None = None
    ) -> tuple[bool, bool]:
        """Whether a locked access splits on write-back memory, and whether it is a bus lock.

        Neither, when the page tables do not allow it or it is #GP: there is a fault first.

        Args:
            mtrrs: those of the vCPU.
            at: linear address.
            size: of the operand, in bytes.
            user: the access is one of ring 3; None: if the code is.
        """
        if size == 16 and at & 15:
            return False, False
        crosses = (at & 63) + size > sites.LINE
        types = self._types
        user = self._live.cpl == 3 if user is None else user
        first, last = (at >> 12) << 1 | user, (at + size - 1 >> 12) << 1 | user
        try:
            here = types[first] if first in types else self._type(mtrrs, first, at)
            there = here
            if last != first:
                there = types[last] if last in types else self._type(mtrrs, last, at + size - 1)
        except paging.PageFault:
            return False, False
        return crosses and here and there, crosses or not here

    def _type(self, mtrrs: Mtrrs, key: int, at: int) -> bool:
        """Whether a page the guest may write is write-back memory."""
        live = self._live
        paged = bool(live.cr0 & paging.CR0_PG)
        user = bool(key & 1)
        found = paging.translate(live, self._memory, at, write=True, user=user, touch=False)
        answer = paging.is_write_back(found, live.msr(_IA32_PAT) or 0, mtrrs, paging=paged)
        self._types[key] = answer
        if answer:
            self.calm.add(key >> 1)
            self.calm_pages.add(key >> 1)
        return answer
