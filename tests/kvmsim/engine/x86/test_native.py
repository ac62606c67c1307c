"""Stops by other threads, and code the emulator gives up on."""

import platform
import threading

import pytest

from kvmsim.engine.base import Executing, Hlt, Mmio
from kvmsim.engine.x86 import native
from kvmsim.engine.x86 import registers as r

CODE, DATA = 0x1000, 0x8000
HLT = "f4"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 host")


@pytest.fixture
def aside(make_guest):
    """A guest that executes everything elsewhere, without a count."""
    return make_guest(inline_bytes=0, paced=False)


def test_checks_behind_memory_accesses_are_gone(guest):
    owner = native.process(guest.vm.unicorn._lib._name)
    assert owner.exact


@pytest.mark.parametrize(
    "body",
    [
        "ff 07",  # inc dword [rdi]
        "f0 ff 07",  # lock inc dword [rdi]
        "b8 01 00 00 00 f0 0f c1 07",  # mov eax, 1; lock xadd [rdi], eax
        "ff 37 8f 07 ff 07",  # push qword [rdi]; pop qword [rdi]; inc dword [rdi]
    ],
)
def test_kicks_at_any_time_execute_nothing_twice(aside, body):
    code = bytes.fromhex(body)
    back = (-(len(code) + 4)) & 0xFF
    aside.long(body, "ff c9 75", f"{back:02x}", HLT)  # l: ...; dec ecx; jnz l; hlt
    aside.q[r.RCX], aside.q[r.RDI] = 3_000_000, DATA
    kicks = 0
    while isinstance(stop := aside.run(), Executing):
        thread = threading.Thread(target=stop.work)
        thread.start()
        stop.kick()
        thread.join(10)
        assert not thread.is_alive()
        kicks += 1
        if kicks == 300:
            stop = aside.run()
            stop.work()
    assert isinstance(stop, Hlt)
    assert aside.word(DATA) == 3_000_000


def test_kick_while_execution_begins_is_not_lost(aside):
    aside.long("eb fe")
    for _ in range(500):
        stop = aside.run()
        thread = threading.Thread(target=stop.work)
        thread.start()
        stop.kick()
        thread.join(10)
        assert not thread.is_alive()


def test_store_to_no_memory_stops_before_the_rest_of_the_block(aside):
    aside.long("89 07 b8 02 00 00 00", HLT)  # mov [rdi], eax; mov eax, 2
    aside.q[r.RDI], aside.q[r.RAX] = 0x100000, 1
    while isinstance(stop := aside.run(), Executing):
        stop.work()
    assert isinstance(stop, Mmio)
    assert (stop.data, aside.r.rip, aside.q[r.RAX]) == (b"\1\0\0\0", CODE, 1)


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
@pytest.mark.parametrize("code", ["f0 0f ab c8", "f0 0f ba e8 01", "f0 0f b3 c8", "f0 0f bb c8"])
def test_lock_before_a_bit_test_of_a_register_is_ud(make_guest, mode, code):
    guest = make_guest()
    getattr(guest, mode)("43", code, HLT)  # inc ebx, or a REX prefix
    if mode == "real":
        guest.set_word(6 * 4, 0x2000, 4)
    else:
        guest.gate(6, 0x2000)
    guest.put(0x2000, HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2001
    for _ in range(50):
        guest.r.rip = CODE
        assert isinstance(guest.run(), Hlt)


def test_code_in_front_of_what_cannot_be_translated_is_executed(guest):
    # mov ebx, 7; push rbx; lock inc [rdi] within a line; lock bts eax, ecx
    guest.long("bb 07 00 00 00 53 f0 ff 07 f0 0f ab c8", HLT).gate(6, 0x2000)
    guest.put(0x2000, HLT)
    guest.q[r.RDI] = DATA
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RBX], guest.word(DATA), guest.r.rip) == (7, 1, 0x2001)
    pushed = guest.word(guest.q[r.RSP], 8)
    assert pushed == CODE + 9


def test_random_bytes_with_lock_prefixes_abort_nothing(make_guest):
    import random

    stream = random.Random(7)
    guest = make_guest(slice_bytes=3000)
    for _ in range(300):
        guest.cpu.abandon()
        guest.cpu.events.clear()
        guest.cpu.reset()
        code = b"".join(b"\xf0" + stream.randbytes(5) for _ in range(8))
        guest.long(code.hex())
        for number in range(16):
            guest.q[number] = DATA + stream.randrange(4096)
        guest.run()


@pytest.mark.parametrize("fault_like", [False, True])
def test_kicks_at_any_time_lose_and_repeat_no_bus_lock(make_guest, fault_like):
    from kvmsim.engine.base import BusLock
    from kvmsim.engine.x86.policy import PlainPolicy

    guest = make_guest(PlainPolicy(fault_like=fault_like), inline_bytes=0, paced=False)
    guest.long("f0 ff 07 ff c9 75 f9", HLT)  # l: lock inc dword [rdi]; dec ecx; jnz l
    guest.q[r.RCX], guest.q[r.RDI] = 3000, DATA + 62
    locks = 0
    while not isinstance(stop := guest.run(), Hlt):
        locks += isinstance(stop, BusLock)
        if isinstance(stop, Executing):
            thread = threading.Thread(target=stop.work)
            thread.start()
            stop.kick()
            thread.join(10)
    assert (locks, guest.word(DATA + 62), guest.cpu.bus_locks) == (3000, 3000, 3000)


def test_a_kick_that_comes_when_the_emulator_is_gone_does_nothing(make_guest):
    guest = make_guest(paced=False, inline_bytes=0)
    guest.long(HLT)
    meter, machine_code = guest.vm.meter, guest.vm.unicorn.native
    guest.vm.close()
    assert not machine_code._words[native.CPU]  # whose memory may be anybody's
    meter.kick()
    assert machine_code.kicked


def test_callbacks_are_forgotten_before_others_may_have_the_emulators_address(guest, monkeypatch):
    closed = []
    guest.long("f0 ff 07", HLT)
    guest.q[r.RDI] = DATA + 62
    guest.run()
    handle, table = (
        guest.vm.unicorn.native.handle,
        native.process(guest.vm.unicorn._lib._name).dispatch,
    )
    library = guest.vm.unicorn._lib

    class Library:
        def __getattr__(self, name):
            return getattr(library, name)

        def uc_close(self, uc):
            closed.append(handle in table._owned)
            return library.uc_close(uc)

    monkeypatch.setattr(guest.vm.unicorn, "_lib", Library())
    guest.vm.close()
    assert closed == [False]
