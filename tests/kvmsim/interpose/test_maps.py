from kvmsim.interpose.maps import covering, parse

TEXT = """\
00400000-00401000 r--p 00000000 fe:00 1234                               /usr/bin/a program
00401000-00403000 rw-p 00001000 fe:00 1234                               /usr/bin/a program
7f0000000000-7f0000010000 rw-s 00002000 00:01 99                         /memfd:ram (deleted)
7f0000020000-7f0000021000 ---p 00000000 00:00 0
"""


def test_lines_are_taken_apart():
    first, _, shared, last = parse(TEXT)
    assert (first.start, first.end, first.readable, first.writable) == (
        0x400000,
        0x401000,
        True,
        False,
    )
    assert first.name == "/usr/bin/a program"
    assert (shared.shared, shared.offset, shared.inode) == (True, 0x2000, 99)
    assert (last.readable, last.name, last.inode) == (False, "", 0)


def test_range_across_two_mappings_is_covered_by_both():
    found = covering(TEXT, 0x400800, 0x1000)
    assert [mapping.start for mapping in found] == [0x400000, 0x401000]
    assert len(covering(TEXT, 0x401000, 0x2000)) == 1


def test_range_with_a_hole_is_not_covered():
    assert covering(TEXT, 0x402000, 0x1001) is None
    assert covering(TEXT, 0x3FFFFF, 2) is None
    assert covering(TEXT, 0x7F0000010000, 1) is None
    assert covering(TEXT, 0x7F0000021000, 1) is None
