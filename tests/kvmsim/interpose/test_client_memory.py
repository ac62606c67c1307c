import ctypes
import mmap
import os
from errno import EFAULT

import pytest

from kvmsim.errors import KvmError
from kvmsim.interpose import client_memory
from kvmsim.interpose.client_memory import COPIED, REMAPPED, SHARED, share

ME = os.getpid()
PAGE = 4096


def address_of(pages):
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


@pytest.fixture
def ram():
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8 * PAGE)
    pages = mmap.mmap(fd, 4 * PAGE, offset=2 * PAGE)
    yield pages
    os.close(fd)


def test_shared_file_is_the_same_pages_from_the_right_offset(ram):
    memory = share(ME, address_of(ram) + PAGE, 2 * PAGE)
    assert (memory.how, memory.size_bytes) == (SHARED, 2 * PAGE)
    ram[PAGE : PAGE + 5] = b"hello"
    assert memory.read(0, 5) == b"hello"
    memory.write(PAGE, b"there")
    assert ram[2 * PAGE : 2 * PAGE + 5] == b"there"
    memory.close()
    memory.close()


def test_client_whose_mappings_may_not_be_opened_is_shared_by_its_descriptor(ram, monkeypatch):
    opened = os.open

    def refuse(path, *args, **kwargs):
        if "map_files" in str(path):
            raise PermissionError(1, "no CAP_CHECKPOINT_RESTORE")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(client_memory.os, "open", refuse)
    memory = share(ME, address_of(ram), PAGE)
    assert memory.how == SHARED
    memory.write(0, b"through the descriptor")
    assert ram[:22] == b"through the descriptor"
    memory.close()


def test_private_memory_is_copied_unless_it_can_be_replaced():
    pages = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = address_of(pages)
    memory = share(ME, address, 2 * PAGE)
    assert (memory.how, memory.view) == (COPIED, None)
    memory.write(10, b"copied")
    assert pages[10:16] == b"copied"
    assert memory.read(10, 6) == b"copied"
    with pytest.raises(ValueError, match="not within"):
        memory.read(2 * PAGE - 1, 2)

    new = mmap.mmap(-1, 2 * PAGE)
    asked = []

    def remap(address, size_bytes, mapping):
        asked.append((address, size_bytes, mapping.shared))
        return new

    replaced = share(ME, address, 2 * PAGE, remap)
    assert (replaced.how, asked) == (REMAPPED, [(address, 2 * PAGE, False)])
    replaced.close()
    assert share(ME, address, 2 * PAGE, lambda *_: None).how == COPIED


def test_private_file_is_copied_because_its_file_does_not_have_the_changes(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as file:
        pages = mmap.mmap(file.fileno(), 2 * PAGE, flags=mmap.MAP_PRIVATE)
    pages[0] = 1

    def remap(*_):
        pytest.fail("a private file mapping has pages of the file in it")

    memory = share(ME, address_of(pages), 2 * PAGE, remap)
    assert (memory.how, memory.read(0, 1)) == (COPIED, b"\1")


def test_memory_that_is_not_there_is_efault():
    memory = share(ME, 16 * PAGE, PAGE)
    assert memory.how == COPIED
    with pytest.raises(KvmError) as refused:
        memory.read(0, 1)
    assert refused.value.errno == EFAULT
