"""The guest writes to interrupt controllers: what it reads, and what user space gets, is equal."""

import random

import pytest

from kvmsim.abi import ioctls, irq
from kvmsim.abi.exits import Exit

DATA, TABLES = 0x8000, 0x10000
SEEDS = range(8)
END = "e6 f4"  # out 0xf4, al: nobody's port
PICS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
#: Where a page of 4 KiB is mapped that is a device's.
WINDOW = 0x100000


def chip(guest, number):
    data = irq.KVM_IRQCHIP.pack(chip_id=number)
    assert guest.world.ioctl(guest.vm, ioctls.KVM_GET_IRQCHIP, data) == (0, 0)
    return bytes(data[8:])


def line(guest, number, up):
    data = irq.KVM_IRQ_LEVEL.pack(irq=number, level=up)
    assert guest.world.ioctl(guest.vm, ioctls.KVM_IRQ_LINE_STATUS, data) == (0, 0)
    return irq.KVM_IRQ_LEVEL.get(data, "irq")


def ports(chance, nr_accesses):
    """Real mode: accesses to the PICs; what is read goes to memory at DS:DI."""
    code = ""
    for _ in range(nr_accesses):
        port = chance.choice(PICS)
        code += "ba" + port.to_bytes(2, "little").hex()
        if chance.random() < 0.4:
            code += "ec 88 05 47"  # in al, dx; mov [di], al; inc di
        else:
            code += f"b0 {chance.choice(COMMANDS):02x} ee"
    return code


#: ICW1 with and without ICW4, ends of interrupt, rotations, polls, reads, masks.
COMMANDS = (
    *(0x11, 0x10, 0x20, 0x20, 0x60, 0x61, 0x63, 0xA0, 0xC2, 0xE1, 0x80, 0x00, 0x40),
    *(0x0A, 0x0B, 0x0C, 0x68, 0x48, 0x08, 0x70, 0xFB, 0x00, 0x01, 0x03, 0x13, 0xFF),
)


@pytest.mark.parametrize("seed", SEEDS)
def test_pics_by_their_ports(both_guests, seed):
    chance = random.Random(seed)
    code, moves = ports(chance, 12), [(chance.randrange(16), chance.randrange(2)) for _ in range(9)]
    more = ports(chance, 12)
    found = []
    for guest in both_guests:
        guest.real(code, END, more, END, rdi=DATA)
        assert guest.run() == Exit.IO
        answers = [line(guest, *move) for move in moves]
        assert guest.run() == Exit.IO
        read = bytes(guest.ram[DATA : DATA + 64])
        found.append((answers, read.hex(), chip(guest, 0).hex(), chip(guest, 1).hex()))
    kernels, our = found
    assert our == kernels


def accesses(chance, registers, values, nr_accesses, unreadable=()):
    """64-bit mode: accesses to words of the window; what is read goes to memory at RDI."""
    code = ""
    for _ in range(nr_accesses):
        register = chance.choice(registers)
        at = (WINDOW + register).to_bytes(4, "little").hex()
        if chance.random() < 0.4 and register not in unreadable:
            code += f"8b 04 25 {at} 89 07 48 83 c7 04"
        else:
            code += f"c7 04 25 {at}" + values(chance).to_bytes(4, "little").hex()
    return code


def run_at(guest, gpa, code):
    """Run with a device's page in the window."""
    guest.long(code, END)
    guest.word(TABLES + 3 * 4096 + (WINDOW >> 12) * 8, gpa | 0x1B)
    assert guest.run() == Exit.IO
    return bytes(guest.ram[DATA : DATA + 128]).hex()


def any_word(chance):
    return chance.choice(
        (0, 0x31, 0x8041, 0x10, 0x11, 0x2F, 0x10052, 0x1FF, chance.getrandbits(32))
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_ioapic_by_its_window(both_guests, seed):
    chance = random.Random(seed)
    # Fixed and lowest-priority rows only: an INIT would take the guest away.
    code = accesses(chance, (0, 0, 0x10, 0x10, 0x20), lambda c: any_word(c) & ~0x600, 30)
    moves = [(chance.randrange(24), chance.randrange(2)) for _ in range(9)]
    found = []
    for guest in both_guests:
        before = [line(guest, *move) for move in moves]
        read = run_at(guest, 0xFEC00000, code)
        after = [line(guest, *move) for move in moves]
        found.append((before, read, after, chip(guest, 2)[:216].hex()))
    kernels, our = found
    assert our == kernels


APIC = (
    *(0x20, 0x30, 0x80, 0x80, 0x90, 0xA0, 0xB0, 0xB0, 0xD0, 0xE0, 0xF0, 0xF0, 0x100, 0x110, 0x180),
    *(0x200, 0x210, 0x220, 0x280, 0x2F0, 0x300, 0x300, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350),
    *(0x360, 0x370, 0x390, 0x3E0, 0x3F0, 0x84, 0x3C0),
)


#: Registers that cannot be read give the kernel's guest whatever it read before.
UNREADABLE = (0xB0, 0x2F0, 0x3F0, 0x84, 0x3C0)


def apic_word(chance):
    """Self-IPIs of several vectors among other values; never INIT, SIPI or NMI by ICR."""
    value = chance.choice((0x44000 | chance.randrange(256), 0x1FF, any_word(chance)))
    return value & ~0x700


@pytest.mark.parametrize("seed", SEEDS)
def test_local_apic_by_its_page(both_guests, seed):
    chance = random.Random(seed)
    code = accesses(chance, APIC, apic_word, 32, UNREADABLE)
    found = []
    for guest in both_guests:
        read = run_at(guest, 0xFEE00000, code)
        page = bytearray(1024)
        assert guest.ioctl(ioctls.KVM_GET_LAPIC, page) == (0, 0)
        words = {at: page[at : at + 4].hex() for at in range(0, 1024, 16)}
        found.append((read, words))
    kernels, our = found
    assert our == kernels


def timer_state(guest):
    """All of the interval timer but times."""
    data = bytearray(112)
    assert guest.world.ioctl(guest.vm, ioctls.KVM_GET_PIT2, data) == (0, 0)
    left_out = ("count_load_time", "latched_count")
    state = {
        name: irq.KVM_PIT_STATE2.get(data, name)
        for name in irq.KVM_PIT_STATE2.fields
        if not name.endswith(left_out)
    }
    # Bit 7 of a status is the output at the time it was latched.
    return {
        name: value & 0x7F if name.endswith(".status") else value for name, value in state.items()
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_interval_timer_by_its_ports(both_guests, seed):
    chance = random.Random(seed)
    code = ""
    for _ in range(24):
        port = chance.choice((0x40, 0x41, 0x42, 0x43, 0x43, 0x61))
        code += f"b0 {chance.getrandbits(8):02x} e6 {port:02x}" if chance.random() < 0.7 else ""
        code += f"e4 {port:02x}" if chance.random() < 0.3 else ""
    found = []
    for guest in both_guests:
        guest.world.ioctl(guest.vm, ioctls.KVM_CREATE_PIT2, bytearray(b"\1" + bytes(63)))
        guest.real(code, END)
        assert guest.run() == Exit.IO
        found.append(timer_state(guest))
    kernels, our = found
    assert our == kernels
