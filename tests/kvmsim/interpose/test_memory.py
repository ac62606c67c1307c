import ctypes
import mmap
import os
from errno import EFAULT

import pytest

from kvmsim.errors import KvmError
from kvmsim.interpose import memory

ME = os.getpid()


@pytest.fixture
def area():
    pages = mmap.mmap(-1, 5 * 4096)
    pages[:] = bytes(range(256)) * 80
    return pages, ctypes.addressof(ctypes.c_char.from_buffer(pages))


@pytest.mark.parametrize("size_bytes", [0, 1, 144, 4096, 4097, 3 * 4096 + 5])
def test_bytes_are_copied_both_ways(area, size_bytes):
    pages, address = area
    assert memory.read(ME, address + 3, size_bytes) == pages[3 : 3 + size_bytes]
    memory.write(ME, address + 3, b"\xaa" * size_bytes)
    assert pages[3 : 3 + size_bytes] == b"\xaa" * size_bytes
    assert pages[3 + size_bytes] == (3 + size_bytes) % 256


@pytest.mark.parametrize("address", [0, 8, 1 << 47, (1 << 47) - 4, 1 << 63, (1 << 64) - 1])
def test_address_that_is_no_good_is_efault(address):
    with pytest.raises(KvmError) as read:
        memory.read(ME, address, 8)
    with pytest.raises(KvmError) as written:
        memory.write(ME, address, bytes(8))
    assert (read.value.errno, written.value.errno) == (EFAULT, EFAULT)


def test_thread_that_does_not_exist_is_efault(area):
    _, address = area
    with pytest.raises(KvmError) as refused:
        memory.read(1 << 22, address, 8)
    assert refused.value.errno == EFAULT
