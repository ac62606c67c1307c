import pytest

from kvmsim.engine.base import BusLock, Debug, Hlt, InternalError, Io, IrqWindow, Mmio
from kvmsim.engine.scripted import Scripted, parse
from kvmsim.errors import ConfigError

SCRIPT = """\
# a guest
bus-lock  after=100us insn-len=7 cpl=3
io        after=1ms  port=0x3f8  data=68690a
io                   port=0x60 size=2 count=3
mmio      gpa=0xfebc0000  size=8  bus-lock   # rides on this exit
hlt       wake=10ms
internal-error suberror=4 data=1,0x2
debug     exception=1 dr6=0x800 dr7=0x400
irq-window after=7
"""


class NoVcpu:
    id = 0
    rip = 0
    input = b""


def play(engine, count):
    return [engine.next_stop(NoVcpu()) for _ in range(count)]


def test_script_file_gives_the_stops_it_names():
    assert play(parse(SCRIPT, "guest"), 8) == [
        BusLock(after_ns=100_000, insn_len=7, cpl=3),
        Io(after_ns=1_000_000, port=0x3F8, data=b"hi\n"),
        Io(port=0x60, size=2, count=3),
        Mmio(gpa=0xFEBC0000, size=8, bus_lock=True),
        Hlt(wake_after_ns=10_000_000),
        InternalError(suberror=4, data=(1, 2)),
        Debug(exception=1, dr6=0x800, dr7=0x400),
        IrqWindow(after_ns=7),
    ]


def test_after_the_last_stop_the_guest_halts_for_good():
    assert play(Scripted([BusLock()]), 3) == [BusLock(), Hlt(), Hlt()]


def test_empty_script_halts():
    assert play(Scripted([], times=None), 1) == [Hlt()]


def test_loop_with_a_number_plays_the_lines_that_often():
    engine = parse("bus-lock\nloop 2\n", "guest")
    assert play(engine, 3) == [BusLock(), BusLock(), Hlt()]
    assert engine.played == 2


def test_loop_alone_never_ends():
    assert play(parse("bus-lock\nloop", "guest"), 50) == [BusLock()] * 50


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("dance", "is not a stop (there are: bus-lock, hlt, io,"),
        ("hlt wake=soon", '"soon" is not a time'),
        ("hlt wake", '"wake" is not an option of hlt'),
        ("hlt port=1", '"port=1" is not an option of hlt'),
        ("io port=0x10000", "0x10000 is not in 0 to 65535"),
        ("io port=x", '"x" is not a number'),
        ("io port=-1", "-1 is not in 0 to 65535"),
        ("io size=3", "size of io is 1, 2 or 4"),
        ("io size=2 data=010203", "3 bytes are no whole number of elements"),
        ("io data=zz", '"zz" is not bytes in hexadecimal'),
        ("io data=", "no bytes given"),
        ("mmio data=010203040506070809", "mmio writes at most 8 bytes"),
        ("bus-lock bus-lock", '"bus-lock" is not an option of bus-lock'),
        ("bus-lock after=1 after=2", "after is given twice"),
        ("loop 0", "0 is not in 1 to"),
        ("loop 1 2", '"loop" takes one number or none'),
        ("loop\nhlt", '"loop" in line 2 was to be the last line'),
    ],
)
def test_bad_line_is_one_line_naming_file_and_line(line, complaint):
    with pytest.raises(ConfigError) as error:
        parse(f"bus-lock\n{line}\n", "my.script")
    message = str(error.value)
    assert complaint in message
    assert message.startswith("my.script:")
    assert "\n" not in message
