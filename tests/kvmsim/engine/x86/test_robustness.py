"""Guests that do anything at all: the engine goes on, and every stop is one it knows."""

import random

import pytest

from kvmsim.engine.base import (
    BusLock,
    Debug,
    Hlt,
    InKernel,
    InternalError,
    Io,
    IrqWindow,
    Mmio,
    Shutdown,
)
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.breakpoints import Debugger
from kvmsim.engine.x86.meter import Meter
from kvmsim.engine.x86.policy import PlainPolicy

CODE, DATA = 0x1000, 0x8000
STOPS = (BusLock, Hlt, InKernel, InternalError, Io, IrqWindow, Mmio, Shutdown)
HLT = "f4"


def drive(guest, runs=12):
    """Run a guest for a while, answering whatever it asks."""
    for _ in range(runs):
        stop = guest.run()
        assert isinstance(stop, STOPS)
        assert stop.after_ns >= 0
        if isinstance(stop, Shutdown | InternalError):
            return
        while guest.cpu.pending and not guest.cpu.stops:
            guest.cpu.complete(b"\x5a" * 8)


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_random_bytes_end_in_known_stops(make_guest, mode):
    stream = random.Random(mode)
    guest = make_guest(slice_bytes=2000)
    for _ in range(150):
        guest.ram[:] = bytes(len(guest.ram))
        guest.cpu.abandon()
        guest.cpu.events.clear()
        guest.cpu.reset()
        getattr(guest, mode)()
        # A LOCK prefix before BT of a register aborts the emulator's process.
        code = stream.randbytes(64).replace(b"\xf0", b"\x90")
        guest.put(CODE, code.hex())
        for number in range(16):
            guest.q[number] = stream.choice([stream.getrandbits(64), DATA + stream.randrange(256)])
        drive(guest)


def test_random_locked_instructions_are_found_by_the_rule(make_guest):
    stream = random.Random(5)
    guest = make_guest()
    forms = ["01 07", "48 01 07", "66 01 07", "00 07", "ff 07", "0f c1 07", "0f b1 0f", "31 47 07"]
    for _ in range(300):
        guest.cpu.abandon()
        form = stream.choice(forms)
        guest.long("f0", form, HLT)
        offset = stream.randrange(200)
        guest.q[r.RDI] = DATA + offset
        raw = bytes.fromhex(form)
        size = {0x48: 8, 0x66: 2, 0x00: 1}.get(raw[0], 4)
        at = offset + (7 if raw[-1] == 7 and raw[-2] == 0x47 else 0)
        expected = (at & 63) + size > 64
        assert isinstance(guest.run(), BusLock) == expected
        if expected:
            assert isinstance(guest.run(), Hlt)


def test_a_debugger_steps_through_everything(guest):
    guest.long("90", "f0 ff 07", "0f a2", "eb 00", HLT)
    guest.q[r.RDI] = DATA + 62
    guest.cpu.debugger = Debugger(single_step=True)
    seen = []
    while not isinstance(stop := guest.run(), Hlt):
        seen.append((type(stop), guest.r.rip - CODE))
    assert seen == [(Debug, 1), (BusLock, 4), (Debug, 4), (Debug, 6), (Debug, 8)]
    assert guest.r.debug(6) == 0xFFFF0FF0


def test_a_debugger_sees_a_port_access_and_goes_on(guest):
    guest.long("ec", "90", HLT)
    guest.cpu.debugger = Debugger(single_step=True)
    assert isinstance(guest.run(), Io)
    guest.cpu.complete(b"\x01")
    stop = guest.run()
    assert isinstance(stop, Debug)
    assert stop.dr6 == 1 << 14


def test_a_kick_stops_a_spinning_guest(make_guest):
    guest = make_guest().long("eb fe")
    started = guest.vm.meter.start

    def start_kicked(size_bytes):
        started(size_bytes)
        guest.vm.meter.kick()

    guest.vm.meter.start = start_kicked
    assert isinstance(guest.run(), InKernel)
    assert guest.r.rip == CODE


def test_the_meter_works_without_machine_code(guest):
    guest.vm.unicorn.flush_code()
    meter = Meter(guest.vm.unicorn, native=False)
    meter.start(1000)
    guest.long("eb fe")
    guest.vm.load(guest.cpu)
    guest.vm.meter.start(1 << 40)
    guest.vm.watch.execute(guest.cpu)
    assert meter.expired()
    assert 1000 < meter.used() <= 1004


def test_read_only_memory_is_executed_and_its_writes_go_out(make_guest):
    import mmap

    from kvmsim.engine.x86.memory import Slot
    from kvmsim.engine.x86.vm import X86Vm

    guest = make_guest()
    rom = mmap.mmap(-1, 4096)
    rom[0xFF0:0xFF5] = bytes.fromhex("ea 00 f0 00 f0")  # jmp f000:f000
    rom[0:7] = bytes.fromhex("2e c6 06 80 f0 55 f4")  # mov byte cs:[0xf080], 0x55; hlt
    slots = [Slot(base, memoryview(rom), read_only=True) for base in (0xFF000, 0xFFFFF000)]
    vm = X86Vm([Slot(0, memoryview(guest.ram)), *slots], PlainPolicy())
    cpu = vm.add_cpu()
    stop = vm.run(cpu)
    assert isinstance(stop, Mmio)
    assert (stop.gpa, stop.data) == (0xFF080, b"\x55")
    cpu.complete()
    assert isinstance(vm.run(cpu), Hlt)
    assert rom[0x80] == 0
    vm.close()


def test_more_code_than_there_is_room_for_is_translated_again(make_guest):
    guest = make_guest(code_bytes=1 << 20)
    # 14,000 blocks, each: inc ebx; jmp to the next. Three times over.
    guest.long()
    body = "ff c3 eb 00" * 14_000
    end = guest.put(0x20000, body, "ff c9", "74 05", "e9 00 00 00 00", HLT)
    guest.set_word(end - 5, (0x20000 - (end - 1)) & r.U32, 4)
    guest.q[r.RBX], guest.q[r.RCX], guest.r.rip = 0, 3, 0x20000
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RBX] == 42_000
