import ctypes
import mmap
import os
from pathlib import Path

import pytest

from kvmsim.interpose import client_memory, maps
from kvmsim.interpose.client_memory import map_shared

ME = os.getpid()
PAGE = 4096


def address_of(pages):
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def mapping_of(address):
    return maps.covering(Path("/proc/self/maps").read_text(), address, 1)[0]


@pytest.fixture
def fd():
    number = os.memfd_create("ram")
    os.ftruncate(number, 8 * PAGE)
    yield number
    os.close(number)


@pytest.fixture
def ram(fd):
    return mmap.mmap(fd, 4 * PAGE, offset=2 * PAGE)


def test_shared_file_is_the_same_pages_from_the_right_offset(ram):
    address = address_of(ram)
    pages = map_shared(ME, mapping_of(address), address + PAGE, 2 * PAGE)
    ram[PAGE : PAGE + 5] = b"hello"
    assert pages[:5] == b"hello"
    pages[PAGE : PAGE + 5] = b"there"
    assert ram[2 * PAGE : 2 * PAGE + 5] == b"there"
    assert len(pages) == 2 * PAGE


def test_client_whose_mappings_may_not_be_opened_is_shared_by_its_descriptor(ram, monkeypatch):
    opened = os.open

    def refuse(path, *args, **kwargs):
        if "map_files" in str(path):
            raise PermissionError(1, "no CAP_CHECKPOINT_RESTORE")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(client_memory.os, "open", refuse)
    address = address_of(ram)
    pages = map_shared(ME, mapping_of(address), address, PAGE)
    pages[:22] = b"through the descriptor"
    assert ram[:22] == b"through the descriptor"


def test_file_the_client_may_only_read_stays_as_it_is(tmp_path):
    path = tmp_path / "rom"
    path.write_bytes(b"rom".ljust(PAGE, b"\0"))
    path.chmod(0o444)
    with path.open("rb") as file:
        theirs = mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ)
    text = Path("/proc/self/maps").read_text()
    mapping = next(mapping for mapping in maps.parse(text) if mapping.name == str(path))
    pages = map_shared(ME, mapping, mapping.start, PAGE)
    pages[1:3] = b"am"
    assert (pages[:3], theirs[:3]) == (b"ram", b"rom")


def test_memory_without_a_file_is_not_reached():
    private = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = address_of(private)
    assert map_shared(ME, mapping_of(address), address, PAGE) is None
