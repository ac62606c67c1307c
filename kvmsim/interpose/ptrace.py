"""Stopping threads of a client, and letting one make a system call of ours.

A thread that waits for the answer to a trapped call stops no sooner than it has it; one that waits
for another thing of the kernel's uninterruptibly does not stop at all and is not to be asked.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress
from errno import EPERM, ESRCH
from typing import Any, Final

from kvmsim.errors import KvmError
from kvmsim.interpose import memory
from kvmsim.interpose.libc import checked

PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B

_WALL: Final = 0x4000_0000
_SYSCALL: Final = b"\x0f\x05"
_STOPS: Final = 16

#: PTRACE_O_TRACESYSGOOD, and how a stop at a system call then looks.
_TELL_CALLS: Final = 1
_SIGTRAP: Final = 5
_CALL_STOP: Final = _SIGTRAP | 0x80

_SIGNALS_BYTES: Final = 8  # of a set of signals

# struct user_regs_struct, in 64-bit words.
_REGS: Final = struct.Struct("=27Q")
_R10, _R9, _R8, _RAX, _RDX, _RSI, _RDI, _RIP = 7, 8, 9, 10, 12, 13, 14, 16
_ARGUMENTS: Final = (_RDI, _RSI, _RDX, _R10, _R8, _R9)

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Tracee:
    """A thread held by ptrace.

    Args:
        number: the thread.

    Raises:
        OSError: EPERM it is traced already or not ours to trace; ESRCH it is gone.
    """

    __slots__ = ("_signal", "_status", "_stopped", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._signal = 0
        self._status = 0
        self._stopped = False
        _ptrace(PTRACE_SEIZE, number, _TELL_CALLS)

    def interrupt(self) -> None:
        """Let it stop as soon as it can."""
        _ptrace(PTRACE_INTERRUPT, self.number)

    def wait(self) -> None:
        """Wait until it has stopped.

        Raises:
            OSError: ESRCH, it ended instead.
        """
        options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | _WALL
        seen = os.waitid(os.P_PID, self.number, options)
        if seen is None or seen.si_code not in (os.CLD_TRAPPED, os.CLD_STOPPED):
            # Its status is for whoever waits for the end of the client.
            raise ProcessLookupError(ESRCH, f"thread {self.number} ended")
        os.waitpid(self.number, os.WUNTRACED | _WALL)
        self._stopped = True
        self._status = status = seen.si_status
        if seen.si_code == os.CLD_TRAPPED and 0 < status < 0x80:
            self._signal = status  # caught on its way; delivered by detach

    def detach(self) -> None:
        """Let it go on by itself. Nothing, if it has ended."""
        if self._stopped:
            with suppress(OSError):
                _ptrace(PTRACE_DETACH, self.number, self._signal)
            self._stopped = False

    def call(self, number: int, *arguments: int) -> int:
        """Let a thread that has just returned from a system call make another one.

        Signals wait meanwhile: one that was caught at a stop of another kind would be lost, or
        come without what was sent along.

        Returns:
            What the call returned, negative errno included.

        Raises:
            OSError: it ended, or did not come from a system call.
        """
        before = self._registers()
        self._came_from_call(before[_RIP])
        registers = list(before)
        registers[_RAX] = number
        registers[_RIP] = before[_RIP] - len(_SYSCALL)
        for register, value in zip(_ARGUMENTS, arguments, strict=False):
            registers[register] = value
        blocked = self._block_signals()
        self._set_registers(registers)
        try:
            self._to_call_stop()  # on its way in
            self._to_call_stop()
            result = self._registers()[_RAX]
        finally:
            if self._stopped:
                self._set_registers(before)
                self._signals(PTRACE_SETSIGMASK, blocked)
        return result - (1 << 64) if result >> 63 else result

    def _to_call_stop(self) -> None:
        """Let it go on to the next end of a system call, or to the beginning of one."""
        for _ in range(_STOPS):
            _ptrace(PTRACE_SYSCALL, self.number)
            self._stopped = False
            self.wait()
            if self._status == _CALL_STOP:
                return
        raise PermissionError(EPERM, "the call was not made")

    def _block_signals(self) -> int:
        """Let all signals wait; the mask that held."""
        blocked = self._signals(PTRACE_GETSIGMASK, 0)
        self._signals(PTRACE_SETSIGMASK, (1 << 64) - 1)
        return blocked

    def _signals(self, request: int, mask: int) -> int:
        """Get or set the mask of blocked signals."""
        buffer = ctypes.c_uint64(mask)
        _ptrace(request, self.number, ctypes.addressof(buffer), _SIGNALS_BYTES)
        return buffer.value

    def repeat(self, number: int) -> None:
        """Let a thread that has just returned from a system call make it once more.

        Its arguments are still in their registers. A signal that was caught on the way comes
        first, before the call: who has one to handle is not to be asked.

        Args:
            number: of the call.

        Raises:
            OSError: it ended, or did not come from a system call.
        """
        registers = list(self._registers())
        self._came_from_call(registers[_RIP])
        registers[_RAX] = number
        registers[_RIP] -= len(_SYSCALL)
        self._set_registers(registers)

    @property
    def has_signal(self) -> bool:
        """Whether a signal was caught on its way to the thread."""
        return self._signal != 0

    def _came_from_call(self, pointer: int) -> None:
        """Refuse a thread that is not just behind a system call (EPERM)."""
        try:
            came_from = memory.read(self.number, pointer - len(_SYSCALL), len(_SYSCALL))
        except KvmError as error:
            raise PermissionError(EPERM, str(error)) from error
        if came_from != _SYSCALL:
            raise PermissionError(EPERM, "not stopped behind a system call")

    def _registers(self) -> tuple[int, ...]:
        buffer = ctypes.create_string_buffer(_REGS.size)
        _ptrace(PTRACE_GETREGS, self.number, ctypes.addressof(buffer))
        return _REGS.unpack(buffer.raw)

    def _set_registers(self, values: list[int] | tuple[int, ...]) -> None:
        buffer = ctypes.create_string_buffer(_REGS.pack(*values), _REGS.size)
        _ptrace(PTRACE_SETREGS, self.number, ctypes.addressof(buffer))


def _ptrace(request: int, thread: int, data: int = 0, address: int = 0) -> None:
    checked(int(_libc.ptrace(request, thread, address or None, data or None)))
