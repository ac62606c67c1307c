"""Reading and writing control files: rows F.3 and sections 0.1, 0.4."""

import os

import pytest
from conformance.calls import attempt, opened, read, read_all, write

FULL_WIDTH_FIVE = "\N{FULLWIDTH DIGIT FIVE}".encode()


@pytest.fixture
def f(d):
    return d / "cgroup.max.depth"


def test_row_048_reading_cgroup_kill_says_einval(d, observe):
    observe("read", read(d / "cgroup.kill"), "EINVAL")


def test_row_049_writing_a_read_only_file_as_root_says_einval(d, world, observe):
    observe("events", write(d / "cgroup.events", b"1"), "EINVAL")
    observe(
        "controllers", write(d / "cgroup.controllers", b"+" + world.controller.encode()), "EINVAL"
    )
    observe("stat", write(d / "cgroup.stat", b"1"), "EINVAL")


def test_row_050_length_is_checked_before_the_write_handler(d, observe):
    observe("empty", write(d / "cgroup.controllers", b""), 0)
    observe("5000 bytes", write(d / "cgroup.controllers", b"x" * 5000), "E2BIG")


def test_row_051_a_write_may_have_4096_bytes(f, observe):
    observe("4096", write(f, b"7" + b" " * 4095), 4096)
    observe("text", read(f), b"7\n")
    observe("4097", write(f, b"8" + b" " * 4096), "E2BIG")
    observe("kept", read(f), b"7\n")
    observe("200000", write(f, b"8" + b" " * 200_000), "E2BIG")


def test_row_052_the_offset_of_a_write_is_ignored(f, observe):
    with opened(f, os.O_WRONLY) as fd:
        observe("pwrite", attempt(os.pwrite, fd, b"4", 10), 1)
    observe("text", read(f), b"4\n")


def test_row_053_each_write_is_a_command(f, observe):
    with opened(f, os.O_WRONLY) as fd:
        for text in (b"1", b"2", b"3\n"):
            observe(f"write {text!r}", attempt(os.write, fd, text), len(text))
        observe("position", os.lseek(fd, 0, os.SEEK_CUR), 4)
    observe("text", read(f), b"3\n")


def test_row_054_a_failed_write_leaves_the_descriptor_usable(f, observe):
    with opened(f, os.O_WRONLY) as fd:
        observe("bad", attempt(os.write, fd, b"bad"), "EINVAL")
        observe("good", attempt(os.write, fd, b"6"), 1)
        observe("position", os.lseek(fd, 0, os.SEEK_CUR), 1)


def test_row_055_writev_is_one_command(f, observe):
    with opened(f, os.O_WRONLY) as fd:
        observe("writev", attempt(os.writev, fd, [b"1", b"2"]), 2)
    observe("text", read(f), b"12\n")


def test_row_056_a_reader_keeps_its_snapshot_until_it_rewinds(f, observe):
    write(f, b"12345")
    with opened(f) as fd:
        observe("first", os.read(fd, 2), b"12")
        write(f, b"678")
        observe("rest", os.read(fd, 100), b"345\n")
        os.lseek(fd, 0, os.SEEK_SET)
        observe("rewound", os.read(fd, 100), b"678\n")


def test_row_057_the_text_is_that_of_the_first_read(f, observe):
    with opened(f) as fd:
        write(f, b"11")
        observe("read", os.read(fd, 100), b"11\n")


def test_row_058_a_read_after_a_write_continues_behind_it(f, observe):
    with opened(f, os.O_RDWR) as fd:
        observe("write", attempt(os.write, fd, b"21"), 2)
        observe("read", os.read(fd, 100), b"\n")
        os.lseek(fd, 0, os.SEEK_SET)
        observe("rewound", os.read(fd, 100), b"21\n")


def test_row_059_pread_starts_anywhere(f, observe):
    write(f, b"9")
    with opened(f) as fd:
        observe("offset 1", os.pread(fd, 100, 1), b"\n")
        observe("offset 2", os.pread(fd, 100, 2), b"")
        observe("offset 1000", os.pread(fd, 100, 1000), b"")


@pytest.mark.parametrize("text", [b"max", b"max\n", b" max "])
def test_row_060_max_in_its_spellings(f, observe, text):
    write(f, b"5")
    observe("write", write(f, text), len(text))
    observe("text", read(f), b"max\n")


@pytest.mark.parametrize(
    "text",
    [
        b"MAX", b"maxx", b"08", b"0b1", b"1 2", b"\n", b"1k", b"1.0", b"--5", b"+-5", b"+ 5", b"0x",
        b"0xg", FULL_WIDTH_FIVE, b"-+5", b"5\n6", b"\0", b"+",
    ],
)  # fmt: skip
def test_row_061_no_number_says_einval(f, observe, text):
    write(f, b"77")
    observe("write", write(f, text), "EINVAL")
    observe("kept", read(f), b"77\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0), (b"-0", 0), (b"+5", 5), (b"0x10", 16), (b"010", 8), (b"007", 7), (b"5\x0b", 5),
        (b"\xa05\xa0", 5), (b"5\0junk", 5), (b"8\n\n\n", 8), (b"0X1f", 31), (b"", 77),
    ],
)  # fmt: skip
def test_row_062_a_number_in_its_spellings(f, observe, text, value):
    write(f, b"77")
    observe("write", write(f, text), len(text))
    observe("text", read(f), b"%d\n" % value)


@pytest.mark.parametrize(
    "text",
    [
        b"-1", b"2147483648", b"-2147483648", b"-2147483649", b"99999999999999999999",
        b"99999999999999999999x",
    ],
)  # fmt: skip
def test_row_063_a_number_out_of_range_says_erange(f, observe, text):
    write(f, b"77")
    observe("write", write(f, text), "ERANGE")
    observe("kept", read(f), b"77\n")


def test_row_064_the_largest_number_is_max(f, observe):
    write(f, b"2147483646")
    observe("one less", read(f), b"2147483646\n")
    write(f, b"2147483647")
    observe("the largest", read(f), b"max\n")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        *((text, "ERANGE") for text in (b"2", b"-1", b"99999999999")),
        *((text, "EINVAL") for text in (b"abc", b"\n", b"1 1", b"on")),
        *((text, len(text)) for text in (b"01", b"0x1", b"+1", b"1\0", b" 1\n")),
    ],
)
def test_row_065_cgroup_freeze_takes_0_and_1(d, observe, text, result):
    observe("write", write(d / "cgroup.freeze", text), result)
    wanted = b"1\n" if isinstance(result, int) else b"0\n"
    observe("text", read(d / "cgroup.freeze"), wanted)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        *((text, "ERANGE") for text in (b"0", b"2", b"-1")),
        *((text, "EINVAL") for text in (b"abc", b"\n")),
        *((text, len(text)) for text in (b"", b"1", b"1\n", b"0x1", b"+1", b"1 ")),
    ],
)
def test_row_066_cgroup_kill_takes_1(d, observe, text, result):
    observe("write", write(d / "cgroup.kill", text), result)


@pytest.mark.parametrize("text", [b"domain", b"Threaded", b"threaded2", b"\n"])
def test_row_067_cgroup_type_takes_no_other_word(d, observe, text):
    observe("write", write(d / "cgroup.type", text), "EINVAL")
    observe("type", read(d / "cgroup.type"), b"domain\n")


def test_row_067_cgroup_type_is_stripped(d, observe):
    observe("write", write(d / "cgroup.type", b"threaded \n"), 10)
    observe("type", read(d / "cgroup.type"), b"threaded\n")


def test_row_068_cgroup_pressure_hides_the_pressure_files(d, observe):
    f = d / "cgroup.pressure"
    observe("fresh", read(f), b"1\n")
    for text in (b"2", b"-1"):
        observe(f"write {text!r}", write(f, text), "ERANGE")
    observe("write word", write(f, b"abc"), "EINVAL")
    observe("off", write(f, b"0"), 1)
    observe("hidden", attempt(os.stat, d / "cpu.pressure"), "ENOENT")
    observe("on", write(f, b"1"), 1)
    observe("shown", (d / "cpu.pressure").exists(), True)


def test_0_1_opening_obeys_the_mode_except_for_root(d, observe):
    with opened(d / "cgroup.events", os.O_RDWR) as fd:
        observe("read-only file opened for writing", os.read(fd, 100), b"populated 0\nfrozen 0\n")
        observe("write to it", attempt(os.write, fd, b"1"), "EINVAL")


def test_0_1_a_failed_write_does_not_move_the_position(f, observe):
    with opened(f, os.O_RDWR) as fd:
        os.write(fd, b"12")
        attempt(os.write, fd, b"bad")
        observe("position", os.lseek(fd, 0, os.SEEK_CUR), 2)


def test_0_4_one_byte_at_a_time_is_one_snapshot(f, observe):
    write(f, b"12345")
    text = b""
    with opened(f) as fd:
        for other in (b"9", b"88", b"777", b"66", b"5", b"4"):
            text += os.read(fd, 1)
            write(f, other)
    observe("text", text, b"12345\n")


def test_0_4_a_live_file_is_one_snapshot(d, kids, observe):
    with opened(d / "cgroup.events") as fd:
        text = os.read(fd, 5)
        (d / "cgroup.procs").write_text(str(kids().pid))
        observe("snapshot", text + read_all(fd), b"populated 0\nfrozen 0\n")
        os.lseek(fd, 0, os.SEEK_SET)
        observe("rewound", read_all(fd), b"populated 1\nfrozen 0\n")


def test_0_4_the_end_of_file_stays_the_end(f, observe):
    write(f, b"1")
    with opened(f) as fd:
        observe("text", os.read(fd, 100), b"1\n")
        observe("end", os.read(fd, 100), b"")
        write(f, b"12345")
        observe("longer text", os.read(fd, 100), b"")


def test_0_4_two_descriptors_have_their_own_snapshots(f, observe):
    write(f, b"12345")
    with opened(f) as first:
        os.read(first, 2)
        write(f, b"678")
        with opened(f) as second:
            observe("second", os.read(second, 100), b"678\n")
        observe("first", os.read(first, 100), b"345\n")


def test_0_4_every_opener_sees_a_completed_write(f, observe):
    seen = []
    for value in range(200):
        write(f, b"%d" % value)
        seen.append(read(f))
    observe("stale", [text for i, text in enumerate(seen) if text != b"%d\n" % i], [])
