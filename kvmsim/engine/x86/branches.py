"""The branches a guest takes, seen from the blocks it enters; they feed last-branch records.

While the records of some vCPU are on, something is called at the start of every block. Where the
block before did not end, its last instruction was a branch; where it did end there, it was one if
it always is, and if it depends, the flags tell. Only blocks that were executed to their end count:
the others end in a stop.

What is called is machine code. It knows blocks by a table of their ends, filled when a block is
translated, and writes the records itself; Python is called for blocks the table has no room for,
for addresses that hold different code at times, and for conditional jumps to where the next
instruction is anyway. On hosts without machine code it is called for all.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmsim.engine.x86 import conditions, machine_code
from kvmsim.engine.x86 import decode as d
from kvmsim.engine.x86.backend import CODE_CALLBACK
from kvmsim.engine.x86.registers import HFLAGS, U32, U64

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.vm import X86Vm

BYTES_PER_CYCLE = 4

SLOTS = 1 << 14
SLOT_WORDS = 4
#: Of a slot's kind, and of what it means to go straight on: ask Python.
ASK = 1 << 31
#: Instructions behind which the engine itself, not the emulator, moves the guest.
ENGINES = frozenset({0xCC, 0xCD, 0xCE, 0xF1, 0x0F05, 0x0F34})
#: Words of the control block. LAST: address of the last block's slot, 0 without one. BYTES: of code
#: since the last record. ACTIONS: see ``LastBranches.actions``, ring 0 and the others. NEXT: who is
#: to be called at the start of a block too, and with what. WAY: slots of the blocks a branch was
#: recorded between last, and the flags then; a loop goes the same way again and again.
LAST, BYTES, ACTIONS, RECORDS, DEPTH_MASK, HFLAGS_AT, PYTHON, TABLE, NEXT, NEXT_DATA = range(10)
WAY, WORDS = 10, 13
NO_WAY = 1

# Called with (uc: rdi, address: rsi, size: edx, control block: rcx). A slot of the table is: the
# block's address, its last instruction's, its size and the bit of the branch's kind (32 bits each),
# what it means to go straight on. The records are as ``LastBranches.address`` says.
_ENTERED = bytes.fromhex(
    # The way it went the last time it was recorded? Then it is again.
    "4c 8b 01 48 8b 41 58 4c 3b 41 50 75 1f"  # r8 = slot of the last block; the one from there?
    "48 39 30 75 1a 39 50 10 75 15"  # rax = slot it went to; this block?
    "4c 8b 51 28 45 8b 12 44 33 51 60 41 f6 c2 03"  # the same privilege level?
    "0f 84 a1 00 00 00"  # record
    # full:
    "48 89 f0 48 c1 e8 05 31 f0"  # rax = address >> 5 ^ address
    "25 ff 3f 00 00 c1 e0 05 48 03 41 38"  # rax = slot of this block
    "48 39 30 0f 85 dd 00 00 00"  # another address? Python
    "39 50 10 0f 85 d4 00 00 00"  # another size? Python
    "4d 85 c0 74 5e"  # no last block? enter
    "45 8b 48 14 45 85 c9 0f 88 c2 00 00 00"  # r9d = its kind; ASK? Python
    "74 4f"  # no branch? enter
    "45 8b 50 10 4d 03 10 49 39 f2 75 0f"  # does it end where this one begins? if not: taken
    "45 8b 50 18 45 85 d2 0f 88 a7 00 00 00 74 34"  # what that means: Python, or no branch
    # taken:
    "4c 8b 51 28 45 8b 12 44 8b 59 10"  # r10d = flags; r11d = actions for ring 0
    "41 f6 c2 03 74 04 44 8b 59 14"  # in another one? those for the others
    "45 85 cb 75 25"  # is this kind recorded? keep
    "41 c1 eb 10 45 85 cb 74 11"  # does it take away? if not: enter
    "4c 8b 51 18 4d 8b 1a 49 ff cb 4c 23 59 20 4d 89 1a"  # TOS - 1
    # enter:
    "48 89 01 89 d2 48 01 51 08 eb 55"  # the last block is this one; count its bytes; next
    # keep:
    "4c 89 41 50 48 89 41 58 44 89 51 60"  # this is the way it went
    # record:
    "4c 8b 51 18 4d 8b 1a 49 ff c3 4c 23 59 20 4d 89 1a"  # TOS + 1
    "4f 8d 54 da 08 4d 8b 40 08 4d 89 02"  # FROM = its last instruction
    "49 89 b2 00 01 00 00"  # TO = address
    "4c 8b 41 08 49 c1 e8 02 41 b9 ff ff 00 00 4d 39 c8 4d 0f 47 c1"  # cycles, 65535 at most
    "4d 89 82 00 02 00 00"  # INFO
    "48 89 01 89 d2 48 89 51 08"  # the last block is this one; bytes since the record are its
    # next:
    "4c 8b 41 40 4d 85 c0 74 07 48 8b 49 48 41 ff e0 c3"  # call who comes next, if there is one
    # Python:
    "ff 61 30"
)


@cache
def _entered() -> int | None:
    """Address of the machine code, the same for all VMs; None: there can be none here."""
    code = machine_code.new()
    if code is None:
        return None
    _CODE.append(code)
    return code.place(_ENTERED)


_CODE: list[machine_code.Code] = []


@cache
def _function(address: int) -> Any:  # noqa: ANN401 - a function of ctypes
    """A function of machine code, for Python to call."""
    return CODE_CALLBACK(address)


class _End(NamedTuple):
    """How a block ends.

    Attributes:
        source: address of its last instruction.
        kind: what branch that is; None: none, or one the engine takes.
        found: the instruction.
        target: where it leads, if that stands in it.
    """

    source: int
    kind: d.Branch | None
    found: d.Instruction | None = None
    target: int | None = None


class BranchFeed:
    """Watches the blocks of a VM while records of some vCPU are on.

    Args:
        vm: the VM.
        native: use machine code; by default where the host can.

    Attributes:
        active: anything is watched.
    """

    def __init__(self, vm: X86Vm, *, native: bool | None = None) -> None:
        self._vm = vm
        self._hook: int | None = None
        self.active = False
        self._cpu: Cpu | None = None
        self._recording: set[Cpu] = set()
        self._ends: dict[tuple[int, int], _End] = {}
        self._ambiguous: set[tuple[int, int]] = set()
        #: The last block, where its slot is the one for blocks that have none of their own.
        self._block = (0, 0)
        self._control = (ctypes.c_uint64 * WORDS)()
        self._actions = (ctypes.c_uint32 * 2).from_buffer(self._control, 8 * ACTIONS)
        self._native = native is not False
        self._table: Any = None
        self._callbacks: list[object] = []

    # -- on and off ------------------------------------------------------------------------------

    def watch(self, cpu: Cpu) -> None:
        """Execution of a vCPU begins, or goes on with its records as they are now."""
        lbr = cpu.lbr
        if lbr is None and self._hook is None:
            return
        on = lbr is not None and lbr.enabled
        self._cpu = cpu if on else None
        self._control[LAST] = 0
        self._control[WAY] = NO_WAY
        if on:
            self._recording.add(cpu)
        else:
            self._recording.discard(cpu)
        if on and self._hook is None:
            self._install()
        elif self._hook is not None and not self._recording:
            self._remove(self._hook)
        for user in (False, True):
            self._actions[user] = lbr.actions(user=user) if on and lbr is not None else 0
        if lbr is not None:
            self._control[RECORDS] = lbr.address
            self._control[DEPTH_MASK] = lbr.depth - 1

    def _install(self) -> None:
        unicorn, control = self._vm.unicorn, self._control
        if self._table is None:
            # One more slot than the table has: that of a block without one.
            self._table = (ctypes.c_uint64 * (SLOT_WORDS * (SLOTS + 1)))()
            control[TABLE] = control[WAY + 1] = ctypes.addressof(self._table)
            self._table[SLOT_WORDS * SLOTS + 2] = ASK << 32
            python = CODE_CALLBACK(self._entered)
            self._callbacks.append(python)
            control[PYTHON] = ctypes.cast(python, ctypes.c_void_p).value or 0
        control[HFLAGS_AT] = ctypes.addressof(ctypes.c_char.from_buffer(unicorn.env)) + HFLAGS
        entered = (_entered() if self._native else None) or control[PYTHON]
        self._hook = unicorn.hook_block(ctypes.c_void_p(entered), ctypes.addressof(control))
        self.active = True
        words = (ctypes.c_uint64.from_buffer(control, 8 * word) for word in (NEXT, NEXT_DATA))
        self._vm.meter.give_way(*words)
        # Every block is translated again, and its end noted then.
        self._ends.clear()
        self._ambiguous.clear()
        unicorn.flush_code()

    def _remove(self, hook: int) -> None:
        self._vm.unicorn.unhook(hook)
        self._hook = None
        self.active = False
        self._vm.meter.take_back()
        self._vm.unicorn.flush_code()

    # -- what happens ----------------------------------------------------------------------------

    def stopped(self, *, trapped: bool = False) -> None:
        """Execution stopped; a branch out of the last block may just have been taken.

        Args:
            trapped: by the #DB behind a single step: the block was executed to its end.
        """
        block = self._leave()
        if block is None:
            return
        address, size = block
        rip = self._vm.linear_rip
        if trapped or not address <= rip <= address + size:
            self._left(block, rip)

    def made(self, address: int, code: bytes) -> None:
        """A block was translated, to be executed next: note how it ends."""
        if self._hook is None:
            return
        block = self._leave()
        if block is not None:
            self._left(block, address)
        key = (address, len(code))
        end = self._decode_end(code, address)
        if self._ends.setdefault(key, end) != end:
            # The same address in another address space, or changed code.
            self._ambiguous.add(key)
        self._fill(key)

    def far(self, source: int, target: int) -> None:
        """The engine itself moved the guest: an exception, an interrupt, SYSCALL."""
        if self._cpu is not None:
            self._control[LAST] = 0
            self._record(source, target, d.Branch.FAR)

    def _entered(self, uc: int, address: int, size: int, _data: int) -> None:
        block = self._leave()
        if block is not None:
            self._left(block, address)
        key = (address, size)
        slot = self._fill(key)
        if slot == SLOTS:
            self._block = key
        control = self._control
        control[LAST] = control[TABLE] + 8 * SLOT_WORDS * slot
        control[BYTES] += size
        if control[NEXT]:
            _function(control[NEXT])(uc, address, size, control[NEXT_DATA])

    def _leave(self) -> tuple[int, int] | None:
        """The last block entered, which is none from here on."""
        control = self._control
        last, control[LAST] = control[LAST], 0
        if not last:
            return None
        word = (last - control[TABLE]) // 8
        if word == SLOT_WORDS * SLOTS:
            return self._block
        return self._table[word], self._table[word + 2] & 0xFFFF_FFFF

    def _left(self, block: tuple[int, int], target: int) -> None:
        """A block was executed to its end, and went on somewhere."""
        end = self._end_of(block)
        if end.kind is None:
            return
        if target == sum(block):
            if not self._straight_on(end):
                return
        elif end.target not in {None, target} and block[0] <= target < sum(block):
            # It changed its own code: the emulator goes on in the middle of it.
            return
        self._record(end.source, target, end.kind)

    def _straight_on(self, end: _End) -> bool:
        """Whether a block that went straight on did so by a branch."""
        if end.kind is not d.Branch.CONDITIONAL or end.found is None:
            return True
        if end.target != end.source + end.found.length:
            return False
        unicorn = self._vm.unicorn
        return conditions.taken(end.found, unicorn.computed_flags(), unicorn.q)

    def _record(self, source: int, target: int, kind: d.Branch) -> None:
        cpu = self._cpu
        if cpu is None or cpu.lbr is None:
            return
        cycles = self._control[BYTES] // BYTES_PER_CYCLE
        if cpu.lbr.branch(source, target, kind, cpu.registers.cpl, cycles=cycles):
            self._control[BYTES] = 0

    # -- ends of blocks --------------------------------------------------------------------------

    def _fill(self, key: tuple[int, int]) -> int:
        """Put a block into the table; its slot, or the one of blocks without."""
        end = self._ends.get(key)
        if end is None or key in self._ambiguous:
            return SLOTS
        address, size = key
        slot = (address >> 5 ^ address) & SLOTS - 1
        kind = 0 if end.kind is None else 1 << end.kind
        straight = int(end.kind is not None)
        if end.kind is d.Branch.CONDITIONAL and end.found is not None:
            straight = ASK if end.target == end.source + end.found.length else 0
        words = (address, end.source, size | kind << 32, straight)
        self._table[SLOT_WORDS * slot : SLOT_WORDS * (slot + 1)] = words
        self._control[WAY] = NO_WAY
        return slot

    def _end_of(self, block: tuple[int, int]) -> _End:
        """How a block ends."""
        end = self._ends.get(block)
        if end is not None and block not in self._ambiguous:
            return end
        address, size = block
        return self._decode_end(self._vm.watch.read_code(address, size), address)

    def _decode_end(self, code: bytes, address: int) -> _End:
        at = last = 0
        found = None
        while at < len(code):
            found = d.decode(code, at, self._vm.mode)
            if found is None:
                return _End(address + last, None)
            last = at
            at += found.length
        if found is None or found.opcode in ENGINES:
            return _End(address + last, None)
        return _End(address + last, d.branch_of(found), found, self._target(found, address + at))

    def _target(self, found: d.Instruction, following: int) -> int | None:
        """Where a relative branch leads; None for any other."""
        kind = d.branch_of(found)
        if kind not in {d.Branch.CONDITIONAL, d.Branch.CALL, d.Branch.JUMP}:
            return None
        wide = found.opcode in {0xE8, 0xE9} or found.opcode > 0xFF
        width = (2 if found.bits == 16 and self._vm.mode != 64 else 4) if wide else 1
        offset = int.from_bytes(found.code[-width:], "little", signed=True)
        return (following + offset) & (U64 if self._vm.mode == 64 else U32)
