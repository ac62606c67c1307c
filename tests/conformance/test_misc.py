"""Writing misc.max through the mount: the table of B.4. Ours only: few kernels count anything."""

import pytest
from conformance.calls import read, write
from conformance.world import fresh

CONTROL = "cgroup.subtree_control"


@pytest.fixture
def d(cgfs_world, kids):
    del kids
    write(cgfs_world.root / CONTROL, b"+misc")
    with fresh(cgfs_world.root) as cgrp:
        yield cgrp
    write(cgfs_world.root / CONTROL, b"-misc")


@pytest.fixture
def limit(d):
    """The file, set to a value that a refused write has to leave."""
    path = d / "misc.max"
    assert write(path, b"sev 77") == 6
    return path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((text, b"sev 5\n") for text in (b"sev 5", b"sev 5\n", b" sev 5 ", b"sev 5\0x")),
        *((text, b"sev max\n") for text in (b"sev max", b"sev 18446744073709551615")),
        (b"sev +7", b"sev 7\n"),
        (b"sev 0x10", b"sev 16\n"),
        (b"sev 010", b"sev 8\n"),
        (b"sev 4294967296", b"sev 4294967296\n"),
        (b"sev 0", b"sev 0\n"),
        (b"", b"sev 77\n"),
    ],
)
def test_b4_limits_that_are_taken(limit, text, shown):
    assert write(limit, text) == len(text)
    assert read(limit) == shown


@pytest.mark.parametrize(
    "text",
    [
        b"sev  5", b"sev  max", b"sev\t5", b"sev", b"sev ", b"5", b"max", b"\n", b"SEV 5",
        b"bogus 5", b"sev=5", b"sev: 5", b"sev -1", b"sev MAX", b"sev 5k", b"sev 5 sev_es 3",
        b"sev 5\nsev_es 3", b"tdx 3", b"tdx max", b"sev_es 3",
    ],
)  # fmt: skip
def test_b4_limits_that_are_none(limit, text):
    assert write(limit, text) == "EINVAL"
    assert read(limit) == b"sev 77\n"


@pytest.mark.parametrize("text", [b"sev 18446744073709551616", b"tdx 99999999999999999999999"])
def test_b4_limits_out_of_range(limit, text):
    assert write(limit, text) == "ERANGE"
    assert read(limit) == b"sev 77\n"


def test_b4_lengths(limit):
    assert write(limit, b"sev 7" + b" " * 4091) == 4096
    assert write(limit, b"sev 8" + b" " * 4092) == "E2BIG"
    assert read(limit) == b"sev 7\n"


def test_b3_fresh_files(cgfs_world, d):
    texts = {
        "misc.current": b"sev 0\n",
        "misc.events": b"sev.max 0\n",
        "misc.events.local": b"sev.max 0\n",
        "misc.max": b"sev max\n",
        "misc.peak": b"sev 0\n",
    }
    assert {name: read(d / name) for name in texts} == texts
    assert read(cgfs_world.root / "misc.capacity") == b"sev 10\n"
    assert not (cgfs_world.root / "misc.max").exists()


@pytest.mark.parametrize("name", ["current", "events", "events.local", "peak"])
def test_b2_counters_cannot_be_written(d, name):
    assert write(d / f"misc.{name}", b"0") == "EINVAL"
