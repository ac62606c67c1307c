import os
from errno import EBADF, EINVAL

import pytest
import trio

from kvmsim.errors import KvmError
from kvmsim.interpose.eventfds import Eventfds


@pytest.fixture
def eventfds():
    made = Eventfds(lambda: 77)
    yield made
    made.close()


@pytest.fixture
def clients_fd():
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def take(eventfds, fd):
    return eventfds.get(os.getpid(), fd)


def test_signal_is_seen_by_the_client(eventfds, clients_fd):
    ours = take(eventfds, clients_fd)
    assert [ours.signal() for _ in range(3)] == [True] * 3
    assert os.eventfd_read(clients_fd) == 3
    ours.close()


def test_signal_of_a_full_one_does_not_wait(eventfds, clients_fd):
    os.eventfd_write(clients_fd, (1 << 64) - 2)
    ours = take(eventfds, clients_fd)
    assert ours.signal()
    ours.close()


def test_who_watches_is_told_once_per_signal_and_it_is_zero_then(eventfds, clients_fd):
    told = []
    ours = take(eventfds, clients_fd)
    ours.watch(told.append)
    os.eventfd_write(clients_fd, 5)
    eventfds.look()
    eventfds.look()
    assert told == [77]
    ours.close()
    os.eventfd_write(clients_fd, 1)
    eventfds.look()
    assert told == [77]


async def test_serve_tells_as_soon_as_it_is_signalled(eventfds, clients_fd):
    told = trio.Event()
    ours = take(eventfds, clients_fd)
    ours.watch(lambda _now_ns: told.set())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(eventfds.serve)
        os.eventfd_write(clients_fd, 1)
        with trio.fail_after(5):
            await told.wait()
        nursery.cancel_scope.cancel()
    ours.close()


def test_two_descriptors_of_one_are_the_same_and_of_two_are_not(eventfds, clients_fd):
    again, other = os.dup(clients_fd), os.eventfd(0)
    held = [take(eventfds, fd) for fd in (clients_fd, again, other)]
    first, second, third = (one.identity for one in held)
    assert first == second
    assert first != third
    for one in held:
        one.close()
    os.close(again)
    os.close(other)


def test_what_is_no_eventfd_is_refused(eventfds, tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(KvmError) as error:
        take(eventfds, file.fileno())
    assert error.value.errno == EINVAL
    with pytest.raises(KvmError) as error:
        take(eventfds, 9999)
    assert error.value.errno == EBADF
