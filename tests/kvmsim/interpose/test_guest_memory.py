"""Memory of a VM whose client is this process."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from cgfs.controllers.misc import CONTROLLER as MISC
from cgfs.core.roots import Roots
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.interpose.guest_memory import COPIED, SHARED, GuestMemory
from kvmsim.interpose.remap import NAME, Replaced
from kvmsim.kvm import memslots
from kvmsim.kvm.system import System

ME = os.getpid()
PAGE = 4096
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def address_of(pages):
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


class Remapped:
    """Takes note of what is to be replaced, and does it for this process: copies, or refuses."""

    def __init__(self, *, done=True):
        self.asked = []
        self.done = done
        self.answered = False

    def __call__(self, find):
        ranges = find()
        self.asked.append([(part.address, part.size_bytes) for part in ranges])
        if not self.done:
            return None
        pages = mmap.mmap(-1, sum(part.size_bytes for part in ranges))
        places, base = {}, 0
        for part in ranges:
            size = part.size_bytes
            pages[base : base + size] = ctypes.string_at(part.address, size)
            places[part] = base
            base += size
        return Replaced(pages, 1, places)


class Client:
    """A VM and its memory."""

    def __init__(self):
        roots = Roots([MISC])
        machine = Machine(load("lab-intel"), roots, CgroupAccounting(roots))
        self.vm = System(machine).create_vm()
        self.memory = GuestMemory(self.vm, {})

    def slot(self, number, hva, pages, gpa=None):
        slot = memslots.Slot(number, (gpa or number << 20), pages * PAGE, hva)
        memslots.of(self.vm).put(slot)
        return slot

    def update(self, remap=None):
        self.memory.update(ME, Path("/proc/self/maps").read_text, remap)


@pytest.fixture
def client():
    made = Client()
    yield made
    made.memory.close()


@pytest.fixture
def private():
    return mmap.mmap(-1, 8 * PAGE, flags=ANONYMOUS)


def test_private_pages_of_all_slots_are_replaced_at_once(client, private):
    private[0:5], private[4 * PAGE : 4 * PAGE + 4] = b"first", b"last"
    at = address_of(private)
    low, high = client.slot(0, at, 2), client.slot(1, at + 4 * PAGE, 4)
    remap = Remapped()
    client.update(remap)
    assert remap.asked == [[(at, 2 * PAGE), (at + 4 * PAGE, 4 * PAGE)]]
    assert [(offset, bytes(view[:5])) for offset, view in low.pages] == [(0, b"first")]
    assert [(offset, bytes(view[:4])) for offset, view in high.pages] == [(0, b"last")]
    assert client.memory.how() == {SHARED: 6 * PAGE, COPIED: 0}
    assert client.memory.is_current


def test_slots_of_the_same_pages_share_them(client, private):
    at = address_of(private)
    whole, part = client.slot(0, at, 4), client.slot(1, at + 2 * PAGE, 4)
    remap = Remapped()
    client.update(remap)
    assert remap.asked == [[(at, 6 * PAGE)]]
    whole.pages[0][1][2 * PAGE] = 7
    assert part.pages[0][1][0] == 7


def test_slots_that_are_known_are_not_looked_for_again(client, private):
    known = client.slot(0, address_of(private), 2)
    client.update(Remapped())
    pages = known.pages
    client.slot(1, address_of(private) + 4 * PAGE, 1)
    assert not client.memory.is_current
    remap = Remapped()
    client.update(remap)
    assert known.pages is pages
    assert len(remap.asked[0]) == 1


def test_shared_pages_are_the_same_pages(client):
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8 * PAGE)
    theirs = mmap.mmap(fd, 4 * PAGE, offset=4 * PAGE)
    os.close(fd)
    slot = client.slot(0, address_of(theirs) + PAGE, 2)
    client.update()
    slot.pages[0][1][0] = 5
    assert theirs[PAGE] == 5
    assert client.memory.how() == {SHARED: 2 * PAGE, COPIED: 0}


@pytest.mark.parametrize("remap", [None, Remapped(done=False)])
def test_pages_that_cannot_be_replaced_are_copied_in_and_out(client, private, remap):
    private[10] = 1
    slot = client.slot(0, address_of(private), 2)
    client.update(remap)
    assert (client.memory.is_copied, client.memory.how()[COPIED]) == (True, 2 * PAGE)
    [(_, view)] = slot.pages
    client.memory.bring()
    assert view[10] == 1
    view[PAGE + 70] = 2
    client.memory.take_back()
    assert private[PAGE + 70] == 2


def test_what_a_client_writes_while_its_guest_executes_beside_stays(client, private):
    slot = client.slot(0, address_of(private), 1)
    client.update()
    client.memory.bring()
    slot.pages[0][1][0] = 1
    private[128] = 2
    client.memory.take_back()
    assert (private[0], private[128]) == (1, 2)


def test_nothing_is_written_back_twice(client, private):
    slot = client.slot(0, address_of(private), 1)
    client.update()
    client.memory.bring()
    slot.pages[0][1][0] = 1
    client.memory.take_back()
    private[0] = 9
    client.memory.take_back()
    assert private[0] == 9


def test_pages_that_are_not_mapped_are_not_there(client, private):
    gone = mmap.mmap(-1, 4 * PAGE, flags=ANONYMOUS)
    at = address_of(gone)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(at + PAGE, PAGE, 0) == 0
    slot = client.slot(0, at, 3)
    client.update(Remapped())
    assert [(offset, len(view)) for offset, view in slot.pages] == [(0, PAGE), (2 * PAGE, PAGE)]
    assert libc.mprotect(at + PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_copy_of_pages_that_vanished_stays_as_it_was(client):
    gone = mmap.mmap(-1, PAGE, flags=ANONYMOUS)
    gone[0] = 3
    slot = client.slot(0, address_of(gone), 1)
    client.update()
    client.memory.bring()
    [(_, view)] = slot.pages
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(slot.hva, PAGE, 0) == 0
    view[0] = 4
    client.memory.take_back()
    client.memory.bring()
    assert view[0] == 4
    assert libc.mprotect(slot.hva, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    assert gone[0] == 3


def test_copies_of_slots_that_are_gone_are_forgotten(client, private):
    client.slot(0, address_of(private), 1)
    client.update()
    assert client.memory.is_copied
    memslots.of(client.vm).remove(0)
    client.update()
    assert not client.memory.is_copied


def test_replaced_pages_nobody_holds_any_more_are_replaced_again(client):
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, PAGE)
    earlier = mmap.mmap(fd, PAGE)
    os.close(fd)
    client.slot(0, address_of(earlier), 1)
    remap = Remapped()
    client.update(remap)
    assert remap.asked == [[(address_of(earlier), PAGE)]]
