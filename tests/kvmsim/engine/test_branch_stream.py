"""Branches of guests without code."""

from collections import Counter

import pytest

from kvmsim.engine.base import Hlt
from kvmsim.engine.branch_stream import KERNEL_TEXT, BranchStream
from kvmsim.engine.synthetic import parse_guest
from kvmsim.engine.x86.decode import Branch
from kvmsim.engine.x86.lbr import LBR_SELECT, LastBranches
from kvmsim.errors import ConfigError
from kvmsim.sim.streams import Stream

S = 1_000_000_000


class Notes:
    """Records that keep everything."""

    def __init__(self):
        self.taken = []

    def branch(self, source, target, kind, cpl, *, cycles):
        self.taken.append((source, target, kind, cpl, cycles))


class Vcpu:
    id = 0
    rip = 0
    input = b""
    records = None


@pytest.fixture
def walk():
    notes = Notes()
    stream = BranchStream(200, Stream(7), 3)
    for _ in range(20):
        stream.feed(notes, S)
    return notes.taken


def test_it_takes_as_many_as_the_rate_says(walk):
    assert len(walk) == 20 * 200


def test_a_rate_below_one_per_stretch_adds_up():
    notes = Notes()
    stream = BranchStream(10, Stream(7), 3)
    for _ in range(30):
        stream.feed(notes, S // 100)
    assert len(notes.taken) == 3


def test_of_very_many_only_the_last_count():
    notes = Notes()
    BranchStream(1e6, Stream(7), 3).feed(notes, 3600 * S)
    assert len(notes.taken) == 256


def test_every_kind_occurs(walk):
    kinds = Counter(kind for _, _, kind, _, _ in walk)
    assert set(kinds) == set(Branch)
    assert kinds[Branch.CONDITIONAL] == max(kinds.values())


def test_returns_go_back_behind_their_call(walk):
    open_calls = []
    for source, target, kind, _, _ in walk:
        if kind in {Branch.CALL, Branch.INDIRECT_CALL} and source < KERNEL_TEXT:
            open_calls.append(source + (5 if kind is Branch.CALL else 2))
        elif kind is Branch.FAR and target >= KERNEL_TEXT:
            open_calls.append(source + 2)
        elif kind in {Branch.RETURN, Branch.FAR}:
            assert target == open_calls.pop()


def test_system_calls_end_in_ring_0_and_come_back(walk):
    levels = {cpl for _, _, kind, cpl, _ in walk if kind is Branch.FAR}
    assert levels == {0, 3}
    assert all((target >= KERNEL_TEXT) == (cpl == 0) for _, target, _, cpl, _ in walk)


def test_the_same_seed_walks_the_same_way():
    walks = []
    for seed in (7, 7, 8):
        notes = Notes()
        BranchStream(100, Stream(seed), 3).feed(notes, S)
        walks.append(notes.taken)
    assert walks[0] == walks[1] != walks[2]


def test_a_synthetic_guest_feeds_the_records_of_its_vcpu():
    engine = parse_guest("buslock rate=100 branches=10000").engine(Stream(1))
    vcpu = Vcpu()
    vcpu.records = LastBranches(32)
    vcpu.records.enabled = True
    for _ in range(10):
        engine.next_stop(vcpu)
    assert all(source for source, _ in vcpu.records.newest())


def test_filters_apply_to_them_too():
    engine = parse_guest("busy branches=1000").engine(Stream(1))
    vcpu = Vcpu()
    vcpu.records = LastBranches(32)
    vcpu.records.enabled = True
    assert vcpu.records.write(LBR_SELECT, 0x1FF & ~(1 << 0) & ~(1 << Branch.FAR))
    engine.next_stop(vcpu)
    recorded = [pair for pair in vcpu.records.newest() if pair[0]]
    assert recorded
    assert all(target >= KERNEL_TEXT for _, target in recorded)


def test_whether_somebody_records_changes_nothing_else():
    stops = []
    for records in (None, LastBranches(32)):
        engine = parse_guest("buslock rate=100 branches=10000").engine(Stream(1))
        vcpu = Vcpu()
        vcpu.records = records
        stops.append([engine.next_stop(vcpu).after_ns for _ in range(50)])
    assert stops[0] == stops[1]


def test_an_idle_guest_takes_no_branches():
    assert parse_guest("idle").engine(Stream(1)).next_stop(Vcpu()) == Hlt()
    with pytest.raises(ConfigError):
        parse_guest("idle branches=5")


@pytest.mark.parametrize("words", ["busy branches=", "busy branches=x", "buslock branches=5"])
def test_bad_words_are_named(words):
    with pytest.raises(ConfigError):
        parse_guest(words)
