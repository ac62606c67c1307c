"""A program on the machine's own KVM, with its calls written down.

Nothing is emulated: every call goes on to the kernel, so its result is not known here. Chosen
capabilities can be answered otherwise, to see what a program makes of that.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import TYPE_CHECKING, cast

import trio

from kvmsim.abi.ioctls import KVM_CHECK_EXTENSION
from kvmsim.interpose import memory
from kvmsim.interpose.filter import NR_IOCTL
from kvmsim.interpose.launch import Command, launch
from kvmsim.interpose.notify import Listener, answer_calls
from kvmsim.interpose.run import attend, signals_waiting
from kvmsim.supervise import decode
from kvmsim.supervise.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

    from kvmsim.interpose.notify import Notification
    from kvmsim.kvm.client import Client

_KINDS = (
    (re.compile(r".*/dev/kvm"), "system"),
    (re.compile(r".*/dev/sev"), "sev"),
    (re.compile(r"anon_inode:\[?kvm-vm\]?"), "vm"),
    (re.compile(r"anon_inode:\[?kvm-vcpu:[0-9]+\]?"), "vcpu"),
)
_LOW32 = 0xFFFF_FFFF


def pass_through(argv: Sequence[str], answers: Mapping[int, int], output: IO[bytes] | None) -> int:
    """Run a program on the machine's own /dev/kvm.

    Args:
        argv: program and arguments.
        answers: capability -> what KVM_CHECK_EXTENSION returns for it.
        output: where its calls are written; None: nowhere.

    Returns:
        Its exit status; 128 and the signal's number if one ended it.

    Raises:
        kvmsim.interpose.Unavailable: calls cannot be trapped here.
        kvmsim.interpose.CommandNotRun: the program could not be executed.
    """
    with signals_waiting() as mask:
        launched = launch(Command(argv=argv, devices=(), signal_mask=mask))
        listener = Listener(launched.listener)
        recorder = _Recorder(answers, Trace(output) if output else None)
        try:
            answer = partial(recorder.handle, listener)
            return trio.run(attend, launched, partial(answer_calls, listener, answer))
        finally:
            listener.close()
            os.close(launched.pidfd)


class _Memory:
    """The part of a caller that decoding arguments needs."""

    def __init__(self, thread: int) -> None:
        self._thread = thread

    def read(self, address: int, size_bytes: int) -> bytes:
        return memory.read(self._thread, address, size_bytes)


class _Recorder:
    """Writes calls down and lets them go on."""

    def __init__(self, answers: Mapping[int, int], trace: Trace | None) -> None:
        self._answers = answers
        self._trace = trace

    def handle(self, listener: Listener, notification: Notification) -> None:
        number, tid, nr, _, fd, request, arg = notification
        request &= _LOW32
        kind = _kind(tid, fd & _LOW32) if nr == NR_IOCTL else None
        if kind is None:
            listener.go_on(number)
            return
        result = None
        if request == KVM_CHECK_EXTENSION and kind in {"system", "vm"}:
            result = self._answers.get(arg)
        if self._trace is not None:
            self._record(self._trace, tid, kind, request, arg, result)
        if result is None:
            listener.go_on(number)
        else:
            listener.answer(number, result)

    def _record(
        self, trace: Trace, tid: int, kind: str, request: int, arg: int, result: int | None
    ) -> None:
        record: dict[str, object] = {
            "pid": _tgid(tid),
            "tid": tid,
            "file": kind,
            "call": decode.request_name(kind, request),
            "arg": decode.argument(request, arg, cast("Client", _Memory(tid))),
        }
        trace.write(record, trace.now_ns(), result)


def _kind(tid: int, fd: int) -> str | None:
    """What a thread has open under a number; None for nothing of KVM's."""
    try:
        target = os.readlink(f"/proc/{tid}/fd/{fd}")  # noqa: PTH115 - on the way of every call
    except OSError:
        return None
    return next((word for pattern, word in _KINDS if pattern.fullmatch(target)), None)


def _tgid(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/status", "rb") as status:  # noqa: PTH123 - no path object needed
            return int(status.read().split(b"\nTgid:", 1)[1].split(None, 1)[0])
    except (OSError, IndexError, ValueError):
        return 0
