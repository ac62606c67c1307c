"""One JSON object per call of a client.

::

    {"time_ns": 81250, "pid": 4712, "tid": 4712, "file": "vm", "call": "KVM_ENABLE_CAP",
     "arg": {"cap": 193, "flags": 0, "args": [2, 0, 0, 0], "name": "KVM_CAP_X86_BUS_LOCK_EXIT"},
     "result": 0, "errno": null, "took_ns": 9100}

``time_ns`` counts from the start of the trace. ``arg`` is a number, or the structure as the client
passed it; ``out`` is the structure afterwards, if KVM has changed it. A pointer that cannot be read
is ``{"address": N}``. A failed call has ``result`` -1 and the name of its errno. A KVM_RUN that
returned 0 has ``exit``. ``result`` is null where the call is carried out by the real kernel.
"""

from __future__ import annotations

import logging
import time
from typing import IO, TYPE_CHECKING

import msgspec

from cgfs.control.errors import errno_word
from kvmsim.abi.ioctls import KVM_RUN
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.dispatch import SystemFile, VcpuFile, VmFile
from kvmsim.kvm.vcpu import Vcpu
from kvmsim.supervise import decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.interpose.clients import Process
    from kvmsim.kvm.dispatch import KvmFile

log = logging.getLogger(__name__)

_KINDS = ((VcpuFile, "vcpu"), (VmFile, "vm"), (SystemFile, "system"), (SevFile, "sev"))


class Trace:
    """A trace that is being written; a tap of the supervisor.

    Args:
        output: where the lines go; if it takes no more, the trace ends and the client goes on.
        clock_ns: time, from wherever.
    """

    def __init__(self, output: IO[bytes], clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._output = output
        self._clock_ns = clock_ns
        self._broken = False
        self._start_ns = clock_ns()
        self._begun: dict[object, tuple[int, dict[str, object]]] = {}

    def called(self, file: KvmFile, request: int, arg: int, caller: Process) -> None:
        """A call is about to be carried out."""
        kind = kind_of(file)
        record: dict[str, object] = {
            "pid": caller.pid,
            "tid": caller.thread.number,
            "file": kind,
            "call": decode.request_name(kind, request),
            "arg": decode.argument(request, arg, caller),
        }
        self._begun[_key(file, request)] = (self._clock_ns(), record)

    def returned(
        self, file: KvmFile, request: int, arg: int, caller: Process, result: int, now_ns: int
    ) -> None:
        """A call is about to be answered."""
        del now_ns
        start_ns, record = self._begun.pop(_key(file, request), (0, {}))
        if not record:
            return
        if result >= 0 and decode.reads_back(request):
            after = decode.argument(request, arg, caller)
            if after != record["arg"]:
                record["out"] = after
        if result == 0 and request == KVM_RUN and isinstance(file, Vcpu):
            record["exit"] = decode.run_exit(file.run)
        self.write(record, start_ns, result)

    def write(self, record: dict[str, object], start_ns: int, result: int | None) -> None:
        """Write one line.

        Args:
            record: who called what.
            start_ns: when, by the clock.
            result: value or negative errno; None: not known.
        """
        number = -result if result is not None and result < 0 else 0
        line = {
            "time_ns": start_ns - self._start_ns,
            **record,
            "result": -1 if number else result,
            "errno": errno_word(number) if number else None,
            "took_ns": None if result is None else self._clock_ns() - start_ns,
        }
        if not self._broken:
            try:
                self._output.write(msgspec.json.encode(line) + b"\n")
            except OSError as error:
                self._broken = True
                log.warning("the trace ends here: %s", error.strerror)

    def now_ns(self) -> int:
        """The present, for ``write``."""
        return self._clock_ns()


def kind_of(file: KvmFile) -> str:
    """What a descriptor is, in one word."""
    for of_kind, word in _KINDS:
        if isinstance(file, of_kind):
            return word
    return type(file).__name__.lower()


def _key(file: KvmFile, request: int) -> object:
    """Only KVM_RUN can be waiting while others are called, one for each vCPU."""
    return file if request == KVM_RUN else None
