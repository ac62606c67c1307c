import ctypes
import os

import pytest
import trio

from kvmsim.interpose import notify


class BusyListener:
    """Calls that wait already, as many as given, before the clients end."""

    def __init__(self, fd, calls):
        self.fd = fd
        self.left = calls

    def waiting(self):
        return True if self.left else None

    def receive(self):
        self.left -= 1
        return None if self.left % 10 == 0 else self.left


@pytest.fixture
def readable():
    reader, writer = os.pipe()
    os.close(writer)
    yield reader
    os.close(reader)


def test_structures_have_the_sizes_of_their_requests():
    for request, layout in (
        (notify.NOTIF_RECV, notify.NOTIF),
        (notify.NOTIF_SEND, notify.RESPONSE),
        (notify.NOTIF_ADDFD, notify.ADDFD),
    ):
        assert request >> 16 & 0x3FFF == layout.size
    assert notify.NOTIF.size == notify.NOTIF_BYTES
    assert ctypes.sizeof(ctypes.c_uint64) == notify.NOTIF_ID_VALID >> 16 & 0x3FFF


async def test_busy_clients_leave_time_for_others_and_dead_callers_get_no_answer(readable):
    turns, answered = [], []

    async def other():
        while True:
            turns.append(len(answered))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await notify.answer_calls(BusyListener(readable, 10_000), answered.append)
        nursery.cancel_scope.cancel()
    assert len(answered) == 9_000
    assert len(set(turns)) > 10
