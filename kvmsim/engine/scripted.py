r"""An engine that plays a written list of stops.

From Python: ``Scripted([BusLock(after_ns=1000), Hlt()])``. From a file, one stop per line::

    # word and options        a comment runs to the end of the line
    bus-lock  after=100us
    io        after=1ms  port=0x3f8  data=68690a
    io                   port=0x60   size=1            without data: an IN
    mmio      gpa=0xfebc0000  size=4  bus-lock         "bus-lock": rides on this exit
    mmio      gpa=0xfebc0000  data=01000000
    hlt       wake=10ms
    loop      3                                        all lines above, three times in all

==============  ====================================================================
word            options of its own
==============  ====================================================================
bus-lock
hlt             wake=TIME
io              port=N, size=1|2|4, data=HEX, count=N (elements of an IN)
mmio            gpa=N, size=1..8, data=HEX (1 to 8 bytes)
shutdown
internal-error  suberror=N, data=N,N,...
debug           exception=N, dr6=N, dr7=N
irq-window
eintr                                            a signal for the vCPU's thread
in-kernel
==============  ====================================================================

Every stop takes ``after=TIME``, ``cpl=0..3``, ``insn-len=N`` and (but ``bus-lock`` itself)
``bus-lock``. TIME is a whole number with ``ns`` (default), ``us``, ``ms`` or ``s``; N is decimal or
0x-hexadecimal. ``loop`` is the last line; ``loop`` alone repeats for ever. After the last stop the
guest halts for good.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmsim.engine.base import (
    BusLock,
    Debug,
    Hlt,
    InKernel,
    InternalError,
    Io,
    IrqWindow,
    Mmio,
    Shutdown,
    Signal,
)
from kvmsim.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmsim.engine.base import GuestVcpu, Stop

_UNITS_NS = {"": 1, "ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_TIME = re.compile(r"([0-9]{1,18})(ns|us|ms|s|)")
_U64 = 2**64 - 1


class Scripted:
    """Plays stops one after the other.

    Args:
        stops: what happens, in order.
        times: how often the list is played; ``None``: for ever.

    Attributes:
        played: stops given out so far.
    """

    __slots__ = ("_left", "_next", "_stops", "played")

    def __init__(self, stops: Sequence[Stop], times: int | None = 1) -> None:
        self._stops = tuple(stops)
        self._left = times if self._stops else 0
        self._next = 0
        self.played = 0

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """The next stop of the list; once it is over, a halt without end."""
        del vcpu
        if self._left == 0:
            return Hlt()
        stop = self._stops[self._next]
        self.played += 1
        self._next += 1
        if self._next == len(self._stops):
            self._next = 0
            if self._left is not None:
                self._left -= 1
        return stop


def parse(text: str, name: str) -> Scripted:
    """Read a script.

    Args:
        text: the lines.
        name: the file, for messages.

    Raises:
        ConfigError: a line that is no stop; one line, with file and line number.
    """
    stops: list[Stop] = []
    times: int | None = 1
    ended_at = 0
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            if ended_at:
                raise _Mistake(f'"loop" in line {ended_at} was to be the last line')
            if words[0] == "loop":
                times = _loop(words[1:])
                ended_at = number
            else:
                stops.append(_stop(words[0], words[1:]))
        except _Mistake as mistake:
            msg = f"{name}:{number}: {mistake}"
            raise ConfigError(msg) from None
    return Scripted(stops, times)


class _Mistake(Exception):
    """What is wrong with a line."""


def _number(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text, 16 if text[:2] in {"0x", "0X"} else 10)
        except ValueError:
            raise _Mistake(f'"{text}" is not a number') from None
        if not low <= value <= high:
            raise _Mistake(f"{text} is not in {low} to {high}")
        return value

    return convert


def _time(text: str) -> int:
    found = _TIME.fullmatch(text)
    if found is None:
        raise _Mistake(f'"{text}" is not a time (such as 100, 20us, 3ms or 1s)')
    return int(found[1]) * _UNITS_NS[found[2]]


def _hex(text: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise _Mistake(f'"{text}" is not bytes in hexadecimal') from None
    if not data:
        raise _Mistake("no bytes given")
    return data


def _numbers(text: str) -> tuple[int, ...]:
    convert = _number(0, _U64)
    return tuple(convert(part) for part in text.split(","))


Converters = dict[str, "Callable[[str], object]"]

_COMMON: Converters = {"after": _time, "cpl": _number(0, 3), "insn-len": _number(0, 15)}
_FIELDS = {"after": "after_ns", "insn-len": "insn_len", "wake": "wake_after_ns"}
_WORDS: dict[str, tuple[Callable[..., Stop], Converters]] = {
    "bus-lock": (BusLock, {}),
    "hlt": (Hlt, {"wake": _time}),
    "io": (
        Io,
        {
            "port": _number(0, 0xFFFF),
            "size": _number(1, 4),
            "data": _hex,
            "count": _number(1, 1024),
        },
    ),
    "mmio": (Mmio, {"gpa": _number(0, _U64), "size": _number(1, 8), "data": _hex}),
    "shutdown": (Shutdown, {}),
    "internal-error": (InternalError, {"suberror": _number(1, 4), "data": _numbers}),
    "debug": (
        Debug,
        {"exception": _number(0, 31), "dr6": _number(0, _U64), "dr7": _number(0, _U64)},
    ),
    "irq-window": (IrqWindow, {}),
    "eintr": (Signal, {}),
    "in-kernel": (InKernel, {}),
}


def _loop(options: list[str]) -> int | None:
    if len(options) > 1:
        raise _Mistake('"loop" takes one number or none')
    return _number(1, _U64)(options[0]) if options else None


def _stop(word: str, options: list[str]) -> Stop:
    if word not in _WORDS:
        raise _Mistake(f'"{word}" is not a stop (there are: {", ".join(_WORDS)})')
    make, own = _WORDS[word]
    values: dict[str, object] = {}
    for option in options:
        name, equals, text = option.partition("=")
        field = _FIELDS.get(name, name)
        convert = own.get(name) or _COMMON.get(name)
        if option == "bus-lock" and word != "bus-lock":
            values["bus_lock"] = True
        elif convert is None or not equals:
            raise _Mistake(f'"{option}" is not an option of {word}')
        elif field in values:
            raise _Mistake(f"{name} is given twice")
        else:
            values[field] = convert(text)
    stop = make(**values)
    _vet_widths(stop)
    return stop


def _vet_widths(stop: Stop) -> None:
    """Sizes the ABI has no room for."""
    if isinstance(stop, Io):
        if stop.size == 3:
            raise _Mistake("size of io is 1, 2 or 4")
        if len(stop.data) % stop.size:
            raise _Mistake(f"{len(stop.data)} bytes are no whole number of elements")
    elif isinstance(stop, Mmio) and len(stop.data) > 8:
        raise _Mistake("mmio writes at most 8 bytes")
