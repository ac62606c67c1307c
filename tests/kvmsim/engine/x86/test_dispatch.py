"""Code callbacks are found by emulator and address, however many there are."""

import platform
import sys
import threading

import pytest

from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.x86 import dispatch, native
from kvmsim.engine.x86 import registers as r

CODE, DATA = 0x1000, 0x8000
HLT = "f4"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 host")


def of(guest):
    return native.process(guest.vm.unicorn._lib._name).dispatch


def test_the_library_is_the_one_that_is_known(guest):
    assert of(guest) is not None


def test_each_of_many_instructions_calls_its_own(guest):
    called = []
    guest.long("90" * 2000, HLT, at=0x20000)
    for number in range(2000):
        guest.vm.unicorn.hook_code(lambda n=number: called.append(n), 0x20000 + number)
    assert isinstance(guest.run(), Hlt)
    assert called == list(range(2000))


def test_two_callbacks_at_one_address_are_both_called(guest):
    called = []
    guest.long("90", HLT)
    for name in "abc":
        guest.vm.unicorn.hook_code(lambda n=name: called.append(n), CODE)
    guest.run()
    assert called == ["a", "b", "c"]


def test_two_emulators_have_each_their_own(make_guest):
    called = []
    guests = [make_guest().long("90", HLT) for _ in range(2)]
    for name, guest in zip("ab", guests, strict=True):
        guest.vm.unicorn.hook_code(lambda n=name: called.append(n), CODE)
    for guest in guests:
        guest.run()
    assert called == ["a", "b"]


def test_more_than_the_table_takes_are_found_all_the_same(guest, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST", of(guest)._used)
    guest.long("f0 ff 07", "f0 ff 06", HLT)
    guest.q[r.RDI], guest.q[r.RSI] = DATA + 62, DATA + 126
    assert [type(guest.run()) for _ in range(3)] == [BusLock, BusLock, Hlt]


def test_entries_of_emulators_that_are_gone_are_used_again(make_guest):
    keeps = make_guest().long(HLT)
    keeps.run()
    used = of(keeps)._used
    for _ in range(20):
        guest = make_guest().long("f0 ff 07", HLT)
        guest.q[r.RDI] = DATA + 62
        assert isinstance(guest.run(), BusLock)
        guest.vm.close()
    assert of(keeps)._used - used < 20


def test_emulators_in_different_threads_find_each_their_own(guest):
    """They look for the same free places, among those of one that is gone."""
    table, old, gone, middle = of(guest), sys.getswitchinterval(), 1 << 30, 1 << 40
    table.add(guest.vm.unicorn.native.handle, CODE, 1)
    for address in range(80_000):
        table.add(gone, address, 1)
    table.forget(gone)
    rows = {middle + n: range(middle - n, middle - n + 2000) for n in range(4)}
    sys.setswitchinterval(1e-6)

    def fill(handle):
        for address in rows[handle]:
            table.add(handle, address, handle * 7 + address)

    threads = [threading.Thread(target=fill, args=(handle,)) for handle in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(old)
    missed = [
        (handle, address)
        for handle, addresses in rows.items()
        for address in addresses
        if found(table, handle, address) != handle * 7 + address
    ]
    for handle in rows:
        table.forget(handle)
    assert not missed


def found(table, handle, address):
    """What is called for an instruction, searched for as the machine code does."""
    at = dispatch._place(handle, address)
    while table._table[at]:
        if tuple(table._table[at : at + 2]) == (address + 1, handle):
            return table._table[at + 2]
        at = (at + 3) % len(table._table)
    return None
