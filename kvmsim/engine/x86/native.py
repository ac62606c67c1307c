"""What machine code does around the emulator on x86-64 hosts: exact stops, and no abort.

Unicorn 2.1.4 looks for a request to stop at the start of each block, behind each memory access and
behind each code callback. The look behind a memory access goes back to the beginning of the
instruction, which has stored already: stopped there, ``inc [mem]`` counts twice (Unicorn issues
1355 and 823). It also costs up to half the speed of loops over memory. All these looks are
translated by one function, ``check_exit_request``, which the library calls through its table:
what is put in the slot lets only the call pass that belongs to code callbacks. From then on another
thread may ask for a stop at any time, and gets it at the start of a block.

Such a request must not be ``uc_emu_stop``: callbacks are left out from the moment it sets its flag,
a moment before execution ends. :meth:`Native.kick` sets a flag of its own and has the emulator
leave translated code for its main loop. That asks behind all resets, at the beginning as well,
whether an exception stops it, and is answered by a function that looks at the flag first.

A store to where there is no memory relied on the look behind it; :meth:`Native.leaving` makes a
callback that leaves the translated code itself.

The translator calls ``abort()`` for some code (``lock bts eax, ecx``, Unicorn issue 2358) and where
its assertions fail. In a thread that executes a guest that becomes a stop: the emulator's own way
out of translated code leads back to its main loop, from translation as from execution.

The slots are the library's, so other users of Unicorn in the same process have these looks changed
too; ``abort`` is as before for them.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from typing import TYPE_CHECKING

from kvmsim.engine.x86 import address_bits, machine_code
from kvmsim.engine.x86.dispatch import Dispatch
from kvmsim.engine.x86.library import Library
from kvmsim.engine.x86.machine_code import Code, u64

if TYPE_CHECKING:
    from collections.abc import Callable

# Words of an instance.
KICKED, ABORTED, HANDLE, CPU, FLAGS = range(5)
_STOP_INTERRUPT = bytes.fromhex("83 fe 06 0f 94 c0 c3")  # cmp esi, 6; sete al; ret
_SEARCH_WORDS = 200
_WRITES = (20, 22)  # UC_MEM_WRITE_UNMAPPED, UC_MEM_WRITE_PROT
_RFLAGS = 253
_OLD_EXCEPTION = 5496
_RIP, _CC_SRC, _CC_OP, _STATUS_FLAGS = 128, 152, 168, 0x8D5


def _call(address: int) -> bytes:
    return b"\x48\xb8" + u64(address) + b"\xff\xd0"  # mov rax, address; call rax


def _jump(address: int) -> bytes:
    return b"\x48\xb8" + u64(address) + b"\xff\xe0"  # mov rax, address; jmp rax


def _load(register: str, value: int) -> bytes:
    """Load a 64-bit register of the calling convention."""
    opcodes = {"rdi": b"\x48\xbf", "rsi": b"\x48\xbe", "rdx": b"\x48\xba", "rcx": b"\x48\xb9"}
    return opcodes[register] + u64(value)


class Process:
    """What is done once for a process and its library.

    Args:
        cdll: the library.
        code: where its machine code goes.

    Raises:
        LookupError: the library is not what this module knows.
    """

    def __init__(self, cdll: ctypes.CDLL, code: Code) -> None:
        self.code = code
        self.library = library = Library(cdll, "uc_emu_start")
        address_bits.widen(library)
        self._calls_out: int | None = None
        self._checks = library.slot("check_exit_request_x86_64")
        self._check = self._checks.value
        self.loop_exit = library.symbol("cpu_loop_exit_x86_64")
        self.emu_start = library.symbol("uc_emu_start")
        self.emu_stop = library.symbol("uc_emu_stop")
        self.cpu_exit = library.symbol("cpu_exit")
        self.reg_read = library.symbol("uc_reg_read")
        self._memory_map_io = library.symbol("memory_map_io_x86_64")
        libc = ctypes.CDLL(None)
        key = ctypes.c_uint32()
        if libc.pthread_key_create(ctypes.byref(key), None):
            raise LookupError("pthread_key_create")
        self._key = key.value
        self._set = ctypes.cast(libc.pthread_setspecific, ctypes.c_void_p).value or 0
        self._get = ctypes.cast(libc.pthread_getspecific, ctypes.c_void_p).value or 0
        abort = ctypes.cast(libc.abort, ctypes.c_void_p).value or 0
        library.slot("abort").value = code.place(self._abort_stub(abort))
        self.dispatch: Dispatch | None = None
        with contextlib.suppress(LookupError, OSError):
            self.dispatch = Dispatch(library, code)

    def _abort_stub(self, abort: int) -> bytes:
        """Leave translation or execution; without a guest in this thread, abort."""
        leave = (
            b"\x48\xc7\x40\x08\x01\x00\x00\x00"  # mov qword [rax+8], 1: ABORTED
            b"\x48\x89\xc3"  # mov rbx, rax
            b"\x48\x8b\x7b\x10"  # mov rdi, [rbx+16]: HANDLE
            + _call(self.emu_stop)
            + b"\x48\x8b\x7b\x18"  # mov rdi, [rbx+24]: CPU
            + _call(self.loop_exit)
        )
        return (
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + _load("rdi", self._key)
            + _call(self._get)
            + b"\x48\x85\xc0"  # test rax, rax
            + b"\x74"  # jz
            + bytes([7 + len(leave)])
            + b"\x48\x83\x78\x08\x00"  # cmp qword [rax+8], 0
            + b"\x75"  # jne: it did not help
            + bytes([len(leave)])
            + leave
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + _jump(abort)
        )

    # -- looks for a request to stop ---------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether looks behind memory accesses are gone."""
        return self._calls_out is not None

    def record_checks(self) -> ctypes.c_uint64:
        """Note from where the next looks are translated; where that is noted."""
        place = ctypes.c_uint64()
        self._checks.value = self.code.place(
            b"\x48\x8b\x04\x24"  # mov rax, [rsp]
            + _load("rcx", ctypes.addressof(place))
            + b"\x48\x89\x01"  # mov [rcx], rax
            + _jump(self._check)
        )
        return place

    def keep_checks_of(self, caller: int) -> None:
        """Translate only the looks a caller wants; 0: all of them."""
        called = caller and self.library.holds(caller) and ctypes.string_at(caller - 5, 1)
        if called != b"\xe8":
            self._checks.value = self._check
            return
        self._calls_out = caller
        self._checks.value = self.code.place(
            b"\x48\xb8" + u64(caller) + b"\x48\x39\x04\x24"  # mov rax, caller; cmp [rsp], rax
            b"\x74\x01\xc3" + _jump(self._check)  # je +1; ret
        )

    # -- functions for one instance ----------------------------------------------------------------

    def stop_interrupt(self, handle: int) -> ctypes.c_uint64 | None:
        """Where an instance has the function that says whether an exception stops it."""
        words = (ctypes.c_uint64 * _SEARCH_WORDS).from_address(handle)
        for at in range(1, _SEARCH_WORDS):
            if words[at] != self._memory_map_io or not self.library.holds(words[at - 1]):
                continue
            if ctypes.string_at(words[at - 1], len(_STOP_INTERRUPT)) == _STOP_INTERRUPT:
                return ctypes.c_uint64.from_address(handle + 8 * (at - 1))
        return None

    def start_stub(self, words: int, handle: int, env: int) -> bytes:
        """(address) -> error number, with RFLAGS in the words and settled."""

        def is_in_guest(value: bytes) -> bytes:
            return _load("rdi", self._key) + value + _call(self._set)

        return (
            b"\x53\x48\x89\xfb"  # push rbx; mov rbx, rdi
            + is_in_guest(_load("rsi", words))
            + b"\x48\xb8"
            + u64(env + _OLD_EXCEPTION)
            + b"\xc7\x00\xff\xff\xff\xff"  # mov rax, ...; mov dword [rax], -1
            + _load("rdi", handle)
            + b"\x48\x89\xde"  # mov rsi, rbx
            + _load("rdx", (1 << 64) - 1)
            + b"\x31\xc9\x45\x31\xc0"  # xor ecx, ecx; xor r8d, r8d
            + _call(self.emu_start)
            + b"\x89\xc3"  # mov ebx, eax
            + is_in_guest(b"\x31\xf6")  # xor esi, esi
            + _load("rdi", handle)
            + _load("rsi", _RFLAGS)
            + _load("rdx", words + 8 * FLAGS)
            + _call(self.reg_read)
            + self._settle_flags(words, env)
            + b"\x89\xd8\x5b\xc3"  # mov eax, ebx; pop rbx; ret
        )

    def _settle_flags(self, words: int, env: int) -> bytes:
        """Note flags that were computed lazily, as ``Registers.settle_flags`` does."""
        return (
            _load("rcx", words + 8 * FLAGS)
            + b"\x48\x8b\x01\x25"  # mov rax, [rcx]; and eax, the status flags
            + _STATUS_FLAGS.to_bytes(4, "little")
            + _load("rcx", env)
            + b"\x48\x89\x81"  # mov [rcx + ...], rax
            + _CC_SRC.to_bytes(4, "little")
            + b"\xc7\x81"  # mov dword [rcx + ...], 1
            + _CC_OP.to_bytes(4, "little")
            + b"\x01\x00\x00\x00"
        )

    def kick_stub(self, words: int) -> bytes:
        """(handle, exception) -> whether it stops the emulator."""
        return (
            b"\x83\xfe\x06\x0f\x94\xc0"  # cmp esi, 6; sete al
            + _load("rcx", words)
            + b"\x83\x39\x00\x75\x01\xc3"  # cmp dword [rcx], 0; jne +1; ret
            + b"\x50"  # push rax
            + _call(self.emu_stop)
            + b"\x58\xc3"  # pop rax; ret
        )

    def ask_stub(self, words: int) -> bytes:
        """() -> nothing: ask for a stop; only a note where the instance is gone."""
        return (
            _load("rcx", words)
            + b"\xc7\x01\x01\x00\x00\x00"  # mov dword [rcx], 1: KICKED
            + b"\x48\x8b\x79\x18"  # mov rdi, [rcx+24]: CPU
            + b"\x48\x85\xff\x75\x01\xc3"  # test rdi, rdi; jne +1; ret
            + _jump(self.cpu_exit)
        )

    def leave_stub(self, callback: int, words: int) -> bytes:
        """An access callback that leaves translated code after writes."""
        leave = (
            _load("rcx", words) + b"\x48\x8b\x79\x10" + _call(self.emu_stop)
        )  # mov rdi, [rcx+16]
        leave += _load("rcx", words) + b"\x48\x8b\x79\x18" + _call(self.loop_exit)  # [rcx+24]
        kinds = bytes([0x83, 0xFB, _WRITES[0], 0x74, 0x05, 0x83, 0xFB, _WRITES[1], 0x75])
        return (
            b"\x53\x89\xf3"  # push rbx; mov ebx, esi
            + _call(callback)
            + kinds  # cmp ebx, ...; je leave; cmp ebx, ...; jne end
            + bytes([len(leave)])
            + leave
            + b"\x5b\xc3"  # end: pop rbx; ret
        )


@cache
def process(path: str) -> Process | None:
    """The process's, for the library of a file; None: not on this host, or not with this one."""
    code = machine_code.new()
    if code is None:
        return None
    try:
        return Process(ctypes.CDLL(path), code)
    except (LookupError, OSError, StopIteration):
        return None


class Native:
    """The machine code of one instance.

    Args:
        owner: the process's.
        handle: the instance.
        cpu: its CPU's state, which begins with what the emulator calls ``CPUState``.
        env: the architectural part of that.

    Raises:
        LookupError: the instance is not what this module knows.
    """

    def __init__(self, owner: Process, handle: int, cpu: int, env: int) -> None:
        self._owner = owner
        self._words = (ctypes.c_uint64 * 5)(0, 0, handle, cpu, 0)
        words = ctypes.addressof(self._words)
        asked = owner.stop_interrupt(handle)
        if asked is None:
            raise LookupError("stop_interrupt")
        self.code = Code()
        self.handle, self.emu_stop = handle, owner.emu_stop
        asked.value = self.code.place(owner.kick_stub(words))
        start = self.code.place(owner.start_stub(words, handle, env))
        self.start: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(start)
        #: The same from where RIP is: an argument takes longer than the call.
        self.go_on: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_int)(
            self.code.place(b"\x48\xbf" + u64(env + _RIP) + b"\x48\x8b\x3f" + _jump(start))
        )  # mov rdi, ...; mov rdi, [rdi]
        #: Stop at the start of the next block, from any thread; stays in force until rearmed. It
        #: keeps Python's lock, so that the flag and the request come at one time.
        self.kick = ctypes.PYFUNCTYPE(None)(self.code.place(owner.ask_stub(words)))

    @property
    def flags(self) -> int:
        """RFLAGS when the emulator stopped."""
        return self._words[FLAGS]

    @property
    def kicked(self) -> bool:
        """Whether somebody kicked since :meth:`rearm`."""
        return bool(self._words[KICKED])

    def rearm(self) -> None:
        """Forget kicks."""
        self._words[KICKED] = 0

    def found_at(self, address: int, callback: int) -> None:
        """The instance has a code callback at an address."""
        if self._owner.dispatch is not None:
            self._owner.dispatch.add(self.handle, address, callback)

    def forget(self) -> None:
        """The instance is about to go: another may be at its address, and a kick be under way."""
        self._words[CPU] = 0
        if self._owner.dispatch is not None:
            self._owner.dispatch.forget(self.handle)

    def aborted(self) -> bool:
        """Whether the emulator gave up since this was asked last."""
        aborted = bool(self._words[ABORTED])
        self._words[ABORTED] = 0
        return aborted

    def leaving(self, callback: ctypes.c_void_p) -> int:
        """A callback of a callback that does not say yes: translated code is left after it."""
        words = ctypes.addressof(self._words)
        return self.code.place(self._owner.leave_stub(callback.value or 0, words))
