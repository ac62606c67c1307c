"""Script files: sections of vCPUs, faults anywhere, mistakes by line."""

import pytest

from kvmsim.engine.base import BusLock, Hlt, Io, Shutdown, Signal
from kvmsim.errors import ConfigError
from kvmsim.supervise.script import parse

EXAMPLE = """\
# everybody else
io port=0x3f8 data=68

[vcpu 0]
bus-lock          # alone
shutdown
fail KVM_CREATE_VM 3 ENOMEM
[vcpu 2-3]
eintr after=1ms
loop 2
"""


class Vcpu:
    def __init__(self, number):
        self.id = number
        self.rip = 0
        self.input = b""


def play(script, vcpu, stops):
    engine = script.engine(Vcpu(vcpu))
    return [engine.next_stop(Vcpu(vcpu)) for _ in range(stops)]


def test_vcpu_with_a_section_plays_that_and_all_others_what_comes_first():
    script = parse(EXAMPLE, "s")
    assert play(script, 0, 3) == [BusLock(), Shutdown(), Hlt()]
    assert play(script, 1, 2) == [Io(port=0x3F8, data=b"h"), Hlt()]
    assert play(script, 3, 3) == [Signal(after_ns=1_000_000)] * 2 + [Hlt()]


def test_vcpus_of_one_section_do_not_share_their_place():
    script = parse(EXAMPLE, "s")
    assert play(script, 2, 1) == play(script, 3, 1)
    assert play(script, 0, 1) == play(script, 0, 1) == [BusLock()]


def test_faults_are_taken_out_of_the_guests():
    [fault] = parse(EXAMPLE, "s").faults
    assert (fault.first, fault.onwards) == (3, False)


def test_empty_file_halts():
    assert play(parse("", "s"), 0, 1) == [Hlt()]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[vcpu x]", 's:1: "[vcpu x]" is not a section (such as [vcpu 0] or [vcpu 1-3])'),
        ("\n[vcpu 3-1]", 's:2: "[vcpu 3-1]" names no vCPU'),
        ("[vcpu 1-3]\n[vcpu 0-2]", "s:2: vCPU 1 has a section already"),
        ("hlt\n[vcpu 1]\nhop", 's:3: "hop" is not a stop'),
        ("fail\n", 's:1: "fail" takes an ioctl, which call, and an errno'),
        ("fail KVM_FLY 1 EIO", 's:1: "KVM_FLY" is no ioctl of KVM and no SEV command'),
        ("fail KVM_RUN 0 EIO", 's:1: "0" does not say which call'),
        ("fail KVM_RUN 1 ENOTHING", 's:1: "ENOTHING" is not an errno'),
        ("fail KVM_RUN 1 firmware=3", "s:1: KVM_RUN is no command of the firmware"),
        ("no-asids 3 4", 's:1: "no-asids" takes at most one word'),
    ],
)
def test_mistake_is_one_line_that_names_file_and_line(text, line):
    with pytest.raises(ConfigError) as caught:
        parse(text, "s")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
