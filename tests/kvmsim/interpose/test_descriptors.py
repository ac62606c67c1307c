import fcntl
import mmap
import os
from contextlib import suppress

import pytest

from kvmsim.interpose import libc
from kvmsim.interpose.descriptors import _EVENT, Descriptors
from kvmsim.kvm.dispatch import KvmFile


@pytest.fixture
def table():
    made = Descriptors()
    yield made
    made.close(lambda _: None)


def hand_out(table, size_bytes=0):
    file = KvmFile()
    descriptor, fd = table.make("kvm-test", size_bytes)
    descriptor.file = file
    return file, fd


def identity(fd):
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def test_object_is_found_by_what_is_open(table):
    file, fd = hand_out(table)
    copy = os.dup(fd)
    assert table.find(identity(copy)) is file
    assert table.find((0, 0)) is None
    os.close(fd)
    assert table.closed() == []
    os.close(copy)
    assert table.closed() == [file]
    assert len(table) == 0


def test_mapping_keeps_an_object(table):
    file, fd = hand_out(table, 3 * 4096)
    page = mmap.mmap(fd, 4096)
    [descriptor] = table
    descriptor.memory[8:12] = b"exit"
    assert page[8:12] == b"exit"
    os.close(fd)
    assert table.closed() == []
    page.close()
    assert table.closed() == [file]


def test_second_open_of_the_same_file_is_not_the_last_close(table):
    file, fd = hand_out(table)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.close(again)
    assert table.closed() == []
    assert table.in_doubt()
    table.settle()
    assert not table.in_doubt()
    os.close(fd)
    assert table.closed() == [file]


def test_close_in_doubt_is_settled_by_the_next_look(table):
    file, fd = hand_out(table)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.close(again)
    assert table.closed() == []
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)  # as the last close is about to
    assert table.closed() == [file]
    os.close(fd)


def test_overflow_of_the_queue_is_made_good_by_the_locks(table):
    kept, kept_fd = hand_out(table)
    lost, lost_fd = hand_out(table)
    os.close(lost_fd)
    os.read(table.fd, 4096)
    gone = []
    table._note(_EVENT.pack(-1, libc.IN_Q_OVERFLOW, 0, 0), gone)
    assert gone == []
    assert table.closed() == [lost]
    os.close(kept_fd)
    assert table.closed() == [kept]


def test_client_cannot_take_pages_away(table):
    _, fd = hand_out(table, 3 * 4096)
    for size_bytes in (0, 4 * 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    os.close(fd)


def test_closing_the_table_releases_everything():
    table = Descriptors()
    file, fd = hand_out(table)
    released = []
    table.close(released.append)
    os.close(fd)
    assert released == [file]
