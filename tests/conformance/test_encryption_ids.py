"""Writing encryption_ids.*.max through the mount: the table of A.4. No kernel has it."""

import os

import pytest
from conformance.calls import read, write
from conformance.kids import NOBODY, become
from conformance.world import fresh

CONTROL = "cgroup.subtree_control"


@pytest.fixture
def d(cgfs_world, kids):
    del kids
    write(cgfs_world.root / CONTROL, b"+encryption_ids")
    with fresh(cgfs_world.root) as cgrp:
        yield cgrp
    write(cgfs_world.root / CONTROL, b"-encryption_ids")


@pytest.fixture(params=["sev", "sev_es"])
def limit(request, d):
    return d / f"encryption_ids.{request.param}.max"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((text, b"max\n") for text in (b"max", b"max\n", b" max\t")),
        (b"0", b"0\n"),
        *((text, b"5\n") for text in (b"5", b"5\n", b"5\n\n", b" 5 ", b"+5", b"\xa05")),
        *((text, b"16\n") for text in (b"0x10", b"0X10", b"020")),
        (b"010", b"8\n"),
        (b"+0x5", b"5\n"),
        (b"4294967294", b"4294967294\n"),
        *((text, b"max\n") for text in (b"4294967295", b"0xffffffff", b"037777777777")),
        (b"5\0junk", b"5\n"),
        (b"", b"77\n"),
    ],
)
def test_a4_limits_that_are_taken(limit, text, shown):
    write(limit, b"77")
    assert write(limit, text) == len(text)
    assert read(limit) == shown


@pytest.mark.parametrize(
    "text",
    [
        b"4294967296", b"0x100000000", b"18446744073709551615", b"18446744073709551616",
        b"99999999999999999999999", b"18446744073709551616x",
    ],
)  # fmt: skip
def test_a4_limits_out_of_range(limit, text):
    write(limit, b"77")
    assert write(limit, text) == "ERANGE"
    assert read(limit) == b"77\n"


@pytest.mark.parametrize(
    "text",
    [
        b"4294967296x", b"-1", b"-0", b"-5", b"MAX", b"Max", b"max0", b"maximum", b"\n", b"   ",
        b"\0", b"+", b"++5", b"0x", b"0x+5", b"08", b"5k", b"5.0", b"1e3", b"1 2", b"5\n6", b"abc",
    ],
)  # fmt: skip
def test_a4_limits_that_are_none(limit, text):
    write(limit, b"77")
    assert write(limit, text) == "EINVAL"
    assert read(limit) == b"77\n"


def test_a4_lengths(limit):
    assert write(limit, b"7" + b" " * 4095) == 4096
    assert write(limit, b"8" + b" " * 4096) == "E2BIG"
    assert read(limit) == b"7\n"


@pytest.mark.parametrize("name", ["sev.current", "sev_es.current"])
def test_a4_counters_cannot_be_written(d, kids, name):
    path = d / f"encryption_ids.{name}"
    assert write(path, b"0") == "EINVAL"
    kid = kids()
    kid.do(become, NOBODY)
    assert kid.do(write, str(path), b"0") == "EACCES"
    assert read(path) == b"0\n"


def test_a2_file_sets(cgfs_world, d):
    def names(cgrp):
        return sorted(name for name in os.listdir(cgrp) if name.startswith("encryption_ids."))

    files = ("sev.current", "sev.max", "sev_es.current", "sev_es.max")
    assert names(d) == [f"encryption_ids.{name}" for name in files]
    assert names(cgfs_world.root) == ["encryption_ids.sev.stat", "encryption_ids.sev_es.stat"]


def test_a3_stat_has_two_lines(cgfs_world):
    for kind in ("sev", "sev_es"):
        text = read(cgfs_world.root / f"encryption_ids.{kind}.stat").decode()
        assert [line.split()[0] for line in text.splitlines()] == ["total", "used"]


def test_a7_a_limit_does_not_survive_its_controller(cgfs_world, d):
    write(d / "encryption_ids.sev.max", b"5")
    write(cgfs_world.root / CONTROL, b"-encryption_ids")
    assert not (d / "encryption_ids.sev.max").exists()
    write(cgfs_world.root / CONTROL, b"+encryption_ids")
    assert read(d / "encryption_ids.sev.max") == b"max\n"
