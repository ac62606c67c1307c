import ctypes
import os
import subprocess
import sys
import threading
from errno import EBADF, EFAULT

import pytest

from kvmsim.errors import KvmError
from kvmsim.interpose.clients import Clients
from kvmsim.kvm.dispatch import KvmFile


class Answering:
    def __init__(self):
        self.files = {}
        self.waits = True

    def still_waits(self):
        return self.waits

    def file_of(self, thread, fd):
        return self.files.get((thread.number, fd))


@pytest.fixture
def calls():
    return Answering()


@pytest.fixture
def clients(calls):
    made = Clients(calls)
    yield made
    made.close()


@pytest.fixture
def child():
    """A process that becomes another program when it reads a line, and ends at end of file."""
    code = "import os; os.read(0, 3); os.execlp('cat', 'cat')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


def test_threads_of_a_process_are_one_caller(clients):
    numbers = []
    ready, done = threading.Event(), threading.Event()

    def other():
        numbers.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    first = clients.meet(os.getpid())
    second = clients.meet(numbers[0])
    assert first.process is second.process
    assert clients.caller(second, 0, 0).pid == os.getpid()
    assert clients.known(numbers[0]) is second
    done.set()
    thread.join()


def test_program_that_is_executed_is_another_caller(clients, child):
    thread = clients.meet(child.pid)
    before = clients.caller(thread, 0, 0)
    assert clients.caller(thread, 0, 0) is before
    child.stdin.write(b"go\nhello\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"hello\n"
    after = clients.caller(thread, 0, 0)
    assert after is not before
    assert (after.pid, after.mm == before.mm) == (before.pid, False)


def test_process_that_ended_is_no_caller(clients, child):
    thread = clients.meet(child.pid)
    child.kill()
    child.wait()
    with pytest.raises(OSError, match="No such"):
        clients.caller(thread, 0, 0)
    with pytest.raises(OSError, match="No such"):
        clients.meet(child.pid)
    assert clients.known(child.pid) is None


def test_two_processes_have_two_address_spaces(clients, child):
    mine = clients.meet(os.getpid()).process
    other = clients.meet(child.pid).process
    assert mine.mm != other.mm


def test_descriptors_are_ours_foreign_or_not_open(clients, calls):
    process = clients.meet(os.getpid()).process
    file = calls.files[os.getpid(), 77] = KvmFile()
    foreign = os.open("/dev/null", os.O_RDONLY)
    assert process.file(77) is file
    assert process.file(foreign) is None
    os.close(foreign)
    for fd in (foreign, -1, 1 << 31):
        with pytest.raises(KvmError) as refused:
            process.file(fd)
        assert refused.value.errno == EBADF


def test_nothing_is_written_once_the_caller_is_gone(clients, calls):
    process = clients.meet(os.getpid()).process
    target = ctypes.create_string_buffer(b"before", 6)
    calls.waits = False
    with pytest.raises(KvmError) as refused:
        process.write(ctypes.addressof(target), b"after!")
    assert (refused.value.errno, target.raw) == (EFAULT, b"before")
    calls.waits = True
    process.write(ctypes.addressof(target), b"after!")
    assert process.read(ctypes.addressof(target), 6) == b"after!"


def test_mapped_memory_can_be_pinned_and_a_hole_cannot(clients):
    process = clients.meet(os.getpid()).process
    target = ctypes.create_string_buffer(64)
    assert process.mapped(ctypes.addressof(target), 64, writable=True)
    assert not process.mapped(0, 4096, writable=False)
    text = ctypes.cast(ctypes.pythonapi.Py_IncRef, ctypes.c_void_p).value
    assert process.mapped(text, 16, writable=False)
    assert not process.mapped(text, 16, writable=True)


def test_limit_of_pinned_memory_is_the_clients_own(clients):
    process = clients.meet(os.getpid()).process
    limit = process.memlock_bytes
    assert limit is None or limit >= 0
