from __future__ import annotations

from cgfs.fuse.inodes import Inodes


def test_an_inode_is_known_until_every_lookup_is_given_back():
    inodes = Inodes()
    inodes.looked_up(7)
    inodes.looked_up(7)
    first = inodes.forget([(7, 1)])
    known = inodes.known(7)
    assert (first, known, inodes.forget([(7, 1)]), inodes.known(7)) == ([], True, [7], False)


def test_the_root_is_always_known():
    assert Inodes().known(1)


def test_a_missing_name_is_remembered_until_it_appears():
    inodes = Inodes()
    remembered = inodes.remember_missing(1, b"misc.max")
    assert (remembered, inodes.appeared(1, b"misc.max")) == (True, True)
    assert not inodes.appeared(1, b"misc.max")


def test_names_in_a_directory_nobody_knows_are_not_remembered():
    assert not Inodes().remember_missing(99, b"x")


def test_missing_names_beyond_the_limit_are_not_remembered():
    inodes = Inodes(missing_limit=2)
    assert [inodes.remember_missing(1, name) for name in (b"a", b"b", b"c", b"a")] == [
        True,
        True,
        False,
        True,
    ]


def test_forgetting_a_directory_makes_room_for_other_missing_names():
    inodes = Inodes(missing_limit=1)
    inodes.looked_up(7)
    inodes.remember_missing(7, b"a")
    full = inodes.remember_missing(1, b"b")
    inodes.forget([(7, 1)])
    assert (full, inodes.remember_missing(1, b"b")) == (False, True)
