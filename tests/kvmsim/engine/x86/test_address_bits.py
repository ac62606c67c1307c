"""Memory far up, where the emulator's own page walk sees reserved bits."""

import mmap

import pytest

from kvmsim.engine.base import Hlt
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.memory import Slot


@pytest.mark.parametrize("bit", [39, 40, 46, 51])
def test_memory_at_any_bit_of_an_address_is_read_and_written(guest, bit):
    far = mmap.mmap(-1, 4096)
    far[:4] = b"\x11\0\0\0"
    guest.vm.set_slots([Slot(0, memoryview(guest.ram)), Slot(1 << bit, memoryview(far))])
    guest.long("8b 07", "ff 07", "f4")  # mov eax, [rdi]; inc dword [rdi]; hlt
    guest.map_page(0x9000, 1 << bit)
    guest.q[r.RDI] = 0x9000
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 0x11
    assert far[0] == 0x12


def test_a_page_directory_may_be_there_too(guest):
    far = mmap.mmap(-1, 4096)
    guest.vm.set_slots([Slot(0, memoryview(guest.ram)), Slot(1 << 45, memoryview(far))])
    guest.long("8b 07", "f4")
    guest.ram[0xA000:0xA004] = b"\x22\0\0\0"
    far[:8] = (0xA007).to_bytes(8, "little")
    guest.set_word(0x12008, 1 << 45 | 7)  # 2 MiB on
    guest.cpu.changed()
    guest.q[r.RDI] = 0x20_0000
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 0x22


def test_other_reserved_bits_are_faults_as_ever(guest):
    """A large page's address is on its boundary."""
    guest.long("8b 07", "f4")
    guest.gate(14, 0x2000)
    guest.put(0x2000, "f4")
    guest.set_word(0x12008, 0x40_0000 | 1 << 13 | 0x87)
    guest.cpu.changed()
    guest.q[r.RDI] = 0x20_0000
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2001
    assert guest.word(guest.q[r.RSP]) == 9
