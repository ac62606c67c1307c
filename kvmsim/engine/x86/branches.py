"""The branches a guest takes, seen from the blocks it enters; they feed last-branch records.

A block that does not begin where the one before ended was reached by a branch, the last
instruction of that one. A jump to the very next instruction is not seen. Recording costs a Python
function per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86.backend import CODE_CALLBACK

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.vm import X86Vm

BYTES_PER_CYCLE = 4

#: Address and kind of the branch a block ends with; None: it does not end with one.
_End: TypeAlias = tuple[int, d.Branch] | None


class BranchFeed:
    """Watches the blocks of a VM while a vCPU's records are on.

    Args:
        vm: the VM.
    """

    def __init__(self, vm: X86Vm) -> None:
        self._vm = vm
        self._hook: int | None = None
        self._block: tuple[int, int] | None = None
        self._cpu: Cpu | None = None
        self._ends: dict[tuple[int, int], _End] = {}
        self._ambiguous: set[tuple[int, int]] = set()
        self._recorded_at = 0

    def watch(self, cpu: Cpu) -> None:
        """Execution of a vCPU begins: watch it if its records are on."""
        if cpu.lbr is None and self._hook is None:
            return
        on = cpu.lbr is not None and cpu.lbr.enabled
        self._cpu = cpu if on else None
        self._block = None
        if on and self._hook is None:
            self._hook = self._vm.unicorn.hook_block(CODE_CALLBACK(self._entered))
            # Every block is translated again, and its end noted then.
            self._ends.clear()
            self._ambiguous.clear()
            self._vm.unicorn.flush_code()
        elif not on and self._hook is not None:
            self._vm.unicorn.unhook(self._hook)
            self._vm.unicorn.flush_code()
            self._hook = None

    def stopped(self) -> None:
        """Execution stopped; a branch out of the last block may just have been taken."""
        block, self._block = self._block, None
        if block is None:
            return
        linear_rip = self._vm.linear_rip
        if not block[0] <= linear_rip <= block[0] + block[1]:
            self._left(block, linear_rip)

    def made(self, address: int, code: bytes) -> None:
        """A block was translated: note how it ends."""
        if self._hook is None:
            return
        key = (address, len(code))
        end = self._decode_end(code, address)
        if self._ends.setdefault(key, end) != end:
            # The same address in another address space, or changed code.
            self._ambiguous.add(key)

    def far(self, source: int, target: int) -> None:
        """The engine itself moved the guest: an exception, an interrupt, SYSCALL."""
        if self._cpu is not None:
            self._record(source, target, d.Branch.FAR)

    def _entered(self, _uc: int, address: int, size: int, _data: int) -> None:
        block, self._block = self._block, (address, size)
        if block is not None and block[0] + block[1] != address:
            self._left(block, address)

    def _left(self, block: tuple[int, int], target: int) -> None:
        end = self._end_of(block)
        if end is not None:
            self._record(end[0], target, end[1])

    def _record(self, source: int, target: int, kind: d.Branch) -> None:
        cpu = self._cpu
        if cpu is None or cpu.lbr is None:
            return
        used = self._vm.meter.used()
        cycles = max(0, used - self._recorded_at) // BYTES_PER_CYCLE
        self._recorded_at = used
        cpu.lbr.branch(source, target, kind, cpu.registers.cpl, cycles=cycles)

    def _end_of(self, block: tuple[int, int]) -> _End:
        """How a block ends."""
        if block in self._ends and block not in self._ambiguous:
            return self._ends[block]
        address, size = block
        return self._decode_end(self._vm.watch.read_code(address, size), address)

    def _decode_end(self, code: bytes, address: int) -> _End:
        at = last = 0
        found = None
        while at < len(code):
            found = d.decode(code, at, self._vm.mode)
            if found is None:
                return None
            last = at
            at += found.length
        kind = None if found is None else d.branch_of(found)
        return None if kind is None else (address + last, kind)
