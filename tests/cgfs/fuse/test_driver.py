from __future__ import annotations

import errno
import os
import threading
import time

import pyfuse3
import pytest
import trio
import trio.lowlevel

from cgfs.fuse.driver import Driver


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


async def test_a_waiting_request_is_found(pipe):
    reader, writer = pipe
    driver = Driver()
    os.write(writer, b"x")
    with trio.fail_after(5):
        await driver.lowlevel.wait_readable(reader)
    assert os.read(reader, 10) == b"x"


async def test_requests_in_a_row_are_found_without_the_loop(pipe):
    reader, writer = pipe
    driver = Driver(slice_ns=10**10)
    os.write(writer, b"xx")
    await driver.lowlevel.wait_readable(reader)
    others = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, lambda: others.append(1))
        await driver.lowlevel.wait_readable(reader)
        during = list(others)
    assert (during, others) == ([], [1])


async def test_other_tasks_run_when_the_slice_is_over(pipe):
    reader, writer = pipe
    driver = Driver(slice_ns=1_000_000)
    os.write(writer, b"x")
    turns = []

    async def other():
        while True:
            turns.append(time.monotonic())
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            await driver.lowlevel.wait_readable(reader)
        nursery.cancel_scope.cancel()
    assert len(turns) > 10


async def test_while_a_handler_waits_the_loop_runs(pipe):
    reader, writer = pipe
    driver = Driver(slice_ns=10**10)
    os.write(writer, b"x")
    await driver.lowlevel.wait_readable(reader)
    woken = trio.Event()

    async def handler(task_status):
        with driver.waiting():
            task_status.started()
            await trio.sleep(0.001)
        woken.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(handler)
        with trio.fail_after(5):
            while not woken.is_set():
                await driver.lowlevel.wait_readable(reader)


async def test_an_idle_descriptor_is_waited_for_by_the_loop(pipe):
    reader, writer = pipe
    driver = Driver(idle_ms=1)
    threading.Timer(0.05, os.write, (writer, b"x")).start()
    with trio.fail_after(5):
        await driver.lowlevel.wait_readable(reader)


async def test_closing_ends_the_wait(pipe):
    reader, _ = pipe
    driver = Driver()
    ended = []

    async def wait():
        try:
            await driver.lowlevel.wait_readable(reader)
        except driver.ClosedResourceError:
            ended.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(0.01)
        driver.lowlevel.notify_closing(reader)
    assert ended == [True]


async def test_a_worker_that_found_nothing_to_read_goes_on():
    driver, calls = Driver(), []

    async def worker():
        await trio.lowlevel.checkpoint()
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.EAGAIN, "nothing")

    async with driver.open_nursery() as nursery:
        nursery.start_soon(worker, name="worker")
    assert len(calls) == 3


def test_pyfuse3_runs_on_the_driver_only_inside_the_block():
    driver, before = Driver(), pyfuse3.trio
    with driver.installed():
        inside = pyfuse3.trio
    assert (inside, pyfuse3.trio) == (driver, before)
