import os
import signal
import time

import pytest
import trio

from cgfs.procs import watch


@pytest.fixture
async def running(processes, nursery):
    await nursery.start(watch.run, processes)
    return processes


async def poll(answer, seconds=5.0):
    with trio.fail_after(seconds):
        while not answer():  # noqa: ASYNC110  the kernel sets no event
            await trio.sleep(0.001)


async def test_exit_is_told_though_nobody_asks(running, recorder, start):
    child = start.sh("read line")
    running.watch(child.pid)
    child.stdin.close()
    await poll(lambda: recorder.exits)
    assert recorder.exits == [(child.pid, child.pid)]


async def test_fork_is_told_though_nobody_asks(running, recorder, start):
    child = start.sh("read line; sleep 60 & wait")
    running.watch(child.pid)
    child.stdin.close()
    await poll(lambda: recorder.children)


async def test_process_that_died_before_the_watch_is_told(running, recorder, start):
    child = start("/bin/true")
    child.wait()
    running.watch(child.pid)
    await poll(lambda: recorder.exits)


async def test_frozen_process_that_is_continued_stops_again(running, start, eventually):
    child = start.sh("read line")
    running.watch(child.pid)
    running.freeze(child.pid)
    eventually(lambda: running.is_frozen(child.pid))
    child.send_signal(signal.SIGCONT)
    await trio.sleep(watch.ENFORCE_EVERY_S)
    await poll(lambda: running.is_frozen(child.pid))


async def test_sigterm_to_a_frozen_process_ends_it(running, recorder, start, eventually):
    child = start.sh("read line")
    running.watch(child.pid)
    running.freeze(child.pid)
    eventually(lambda: running.is_frozen(child.pid))
    child.terminate()
    await poll(lambda: recorder.exits)
    assert child.wait() == -signal.SIGTERM


async def test_idle_watch_takes_no_processor_time(connected, nursery, start):
    await nursery.start(watch.run, connected)
    connected.watch(start("sleep", "60").pid)
    connected.sync()
    before = time.process_time()
    await trio.sleep(0.2)
    assert time.process_time() - before < 0.1


async def test_burst_of_forks_elsewhere_wakes_at_most_every_few_milliseconds(
    connected, nursery, start, monkeypatch
):
    connected.watch(start("sleep", "60").pid)
    syncs = []
    sync = connected.sync
    monkeypatch.setattr(connected, "sync", lambda: (syncs.append(1), sync()))
    await nursery.start(watch.run, connected)
    burst = start.sh("read line; for i in $(seq 200); do /bin/true; done; echo")
    began = trio.current_time()
    os.write(burst.stdin.fileno(), b"\n")
    await trio.to_thread.run_sync(burst.stdout.readline)
    elapsed = trio.current_time() - began
    assert len(syncs) <= elapsed / watch.BURST_S + 2
