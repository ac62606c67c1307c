"""Guests of a few bytes of code, on the kernel's KVM and on ours."""

import mmap
from pathlib import Path

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.memory import KVM_USERSPACE_MEMORY_REGION
from kvmsim.abi.regs import KVM_SREGS
from kvmsim.abi.structs import KVM_REGS
from kvmsim.errors import KvmError
from kvmsim.kvm import memslots

#: Where things are in a guest's memory; whatever lies behind RAM and below 2 MiB is a hole.
CODE, HANDLER, GDT, IDT, TSS, STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
DATA, TABLES, RAM = 0x8000, 0x10000, 0x40000
RING3_STACK = 0x7000
PVM = Path("/sys/module/kvm_pvm")


class Guest:
    """One vCPU with RAM from address 0 on.

    Attributes:
        world: the KVM it is a guest of.
        ram: its memory.
        page: the vCPU's page.
    """

    def __init__(self, world, *, irqchip=False):
        self.world = world
        self.vm = world.make(world.system, ioctls.KVM_CREATE_VM)
        if irqchip:
            world.ioctl(self.vm, ioctls.KVM_CREATE_IRQCHIP)
        self.engine = None
        self.ram = self.add_memory(0, 0, RAM)
        self.vcpu = world.make(self.vm, ioctls.KVM_CREATE_VCPU)
        self.page = world.page(self.vcpu)

    def add_memory(self, number, gpa, size_bytes, flags=0):
        """Add a slot; for all but the first, before anything runs."""
        address, memory = self.world.pages(size_bytes // 4096)
        region = KVM_USERSPACE_MEMORY_REGION.pack(
            slot=number,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size_bytes,
            userspace_addr=address,
        )
        assert self.world.ioctl(self.vm, ioctls.KVM_SET_USER_MEMORY_REGION, region) == (0, 0)
        self.world.remember(self, number, memory)
        return memory

    # -- memory --

    def put(self, at, *lines):
        """Write bytes given as hex."""
        code = bytes.fromhex("".join(lines))
        self.ram[at : at + len(code)] = code

    def word(self, at, value=None, size_bytes=8):
        """Write or read a number."""
        if value is not None:
            self.ram[at : at + size_bytes] = value.to_bytes(size_bytes, "little")
        return int.from_bytes(self.ram[at : at + size_bytes], "little")

    def gate(self, vector, at=HANDLER, *, dpl=0):
        """Have a handler of an exception or interrupt, in long mode."""
        value = at & 0xFFFF | 8 << 16 | (0x8E00 | dpl << 13) << 32 | at >> 16 << 48
        self.word(IDT + vector * 16, value)

    # -- registers --

    def regs(self, name):
        data = bytearray(144)
        assert self.world.ioctl(self.vcpu, ioctls.KVM_GET_REGS, data) == (0, 0)
        return KVM_REGS.get(data, name)

    def set_regs(self, **values):
        data = bytearray(144)
        self.world.ioctl(self.vcpu, ioctls.KVM_GET_REGS, data)
        for name, value in values.items():
            KVM_REGS.put(data, name, value)
        assert self.world.ioctl(self.vcpu, ioctls.KVM_SET_REGS, data) == (0, 0)

    def sregs(self, name):
        data = bytearray(312)
        assert self.world.ioctl(self.vcpu, ioctls.KVM_GET_SREGS, data) == (0, 0)
        return KVM_SREGS.get(data, name)

    def set_sregs(self, values):
        data = bytearray(312)
        self.world.ioctl(self.vcpu, ioctls.KVM_GET_SREGS, data)
        for name, value in values.items():
            KVM_SREGS.put(data, name, value)
        assert self.world.ioctl(self.vcpu, ioctls.KVM_SET_SREGS, data) == (0, 0)

    def set_cpuid(self, *entries):
        """KVM_SET_CPUID2 with (leaf, subleaf, flags, eax, ebx, ecx, edx) of each."""
        data = bytearray(len(entries).to_bytes(8, "little"))
        for entry in entries:
            data += b"".join(word.to_bytes(4, "little") for word in (*entry, 0, 0, 0))
        assert self.ioctl(ioctls.KVM_SET_CPUID2, data) == (0, 0)

    def ioctl(self, request, arg=0):
        return self.world.ioctl(self.vcpu, request, arg)

    # -- the page and running --

    def field(self, at, size_bytes=4):
        return int.from_bytes(self.page[at : at + size_bytes], "little")

    def io(self):
        """The exit KVM_EXIT_IO: (is a write, size, port, its bytes)."""
        direction, size, port, count = (
            self.page[32],
            self.page[33],
            self.field(34, 2),
            self.field(36),
        )
        at = self.field(40, 8)
        return bool(direction), size, port, bytes(self.page[at : at + size * count])

    def answer_io(self, data):
        at = self.field(40, 8)
        self.page[at : at + len(data)] = data

    def mmio(self):
        """The exit KVM_EXIT_MMIO: (is a write, address, its bytes or how many)."""
        size = self.field(48)
        data = bytes(self.page[40 : 40 + size])
        is_write = bool(self.page[52])
        return is_write, self.field(32, 8), data if is_write else size

    def answer_mmio(self, data):
        self.page[40 : 40 + len(data)] = data

    def run(self):
        """Run up to the next exit; its reason."""
        assert self.try_run() == (0, 0)
        return self.field(8)

    def try_run(self):
        """KVM_RUN; its result and errno."""
        return self.world.kvm_run(self)

    def finish(self):
        """Have KVM complete the last exit without entering the guest."""
        self.page[1] = 1
        result = self.try_run()
        self.page[1] = 0
        return result

    # -- modes --

    def real(self, *code, **values):
        """Code at 0:1000 in real mode."""
        self.put(CODE, *code)
        self.set_sregs({"cs.base": 0, "cs.selector": 0})
        self.set_regs(**{"rip": CODE, "rsp": STACK, "rflags": 2, **values})

    def long(self, *code, ring=0, **values):
        """Code in 64-bit mode, with the first 2 MiB mapped one to one and a TSS."""
        self.put(CODE, *code)
        for level in range(3):
            self.word(TABLES + level * 4096, TABLES + (level + 1) * 4096 | 7)
        for number in range(512):
            self.word(TABLES + 3 * 4096 + number * 8, number * 4096 | 7)
        for number, descriptor in enumerate(
            (0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF)
        ):
            self.word(GDT + 8 + number * 8, descriptor)
        self.word(TSS + 4, STACK)
        self.set_sregs(long_mode(ring))
        stack = RING3_STACK if ring else STACK
        self.set_regs(**{"rip": CODE, "rsp": stack, "rdi": DATA, "rflags": 2, **values})


def long_mode(ring):
    """Special registers of 64-bit mode."""
    values = {"cr0": 0x80010033, "cr3": TABLES, "cr4": 0x620, "efer": 0xD01}
    for name in ("cs", "ds", "es", "ss", "fs", "gs"):
        code = name == "cs"
        selector = (0x18 if code else 0x20) | 3 if ring else 8 if code else 0x10
        values |= {
            f"{name}.selector": selector,
            f"{name}.base": 0,
            f"{name}.limit": 0xFFFFFFFF,
            f"{name}.type": 11 if code else 3,
            f"{name}.s": 1,
            f"{name}.present": 1,
            f"{name}.dpl": ring,
            f"{name}.g": 1,
            f"{name}.l": int(code),
            f"{name}.db": int(not code),
            f"{name}.unusable": 0,
        }
    values |= {
        "tr.base": TSS,
        "tr.limit": 0x67,
        "tr.type": 11,
        "tr.present": 1,
        "tr.selector": 0x28,
    }
    for name, base, limit in (("gdt", GDT, 0x3F), ("idt", IDT, 0xFFF)):
        values |= {f"{name}.base": base, f"{name}.limit": limit}
    return values


class RealWorld:
    """What a guest needs of the kernel's KVM."""

    def __init__(self, world):
        self._world = world

    def __getattr__(self, name):
        return getattr(self._world, name)

    def remember(self, guest, number, memory):
        pass

    def close(self):
        pass

    def kvm_run(self, guest):
        return self._world.ioctl(guest.vcpu, ioctls.KVM_RUN)


class OurWorld:
    """What a guest needs of ours: an engine, and somebody who steps KVM_RUN."""

    def __init__(self, world):
        self._world = world
        self._guests = []

    def __getattr__(self, name):
        return getattr(self._world, name)

    def pages(self, count):
        memory = mmap.mmap(-1, count * 4096)
        return self._world.system.creator.map(memoryview(memory)), memory

    def remember(self, guest, number, memory):
        slot = memslots.of(guest.vm).slots[number]
        slot.pages = ((0, memoryview(memory)),)

    def kvm_run(self, guest):
        from kvmsim.kvm.x86.guest import attach
        from kvmsim.kvm.x86.slots import engine_slots

        if guest.engine is None:
            guest.engine = attach(guest.vm, [guest.vcpu], engine_slots(guest.vm))
            self._guests.append(guest)
        try:
            blocked = guest.vcpu.kvm_run(0)
            while blocked is not None:
                blocked = guest.vcpu.resume(0)
        except KvmError as error:
            return -1, error.errno
        return 0, 0

    def close(self):
        for guest in self._guests:
            guest.engine.close()


@pytest.fixture
def make_guest(world):
    """Make guests of each KVM."""
    if not hasattr(world, "fds"):
        pytest.importorskip("unicorn")
    guests = RealWorld(world) if hasattr(world, "fds") else OurWorld(world)
    yield lambda **options: Guest(guests, **options)
    guests.close()


@pytest.fixture
def guest(make_guest):
    """A guest of each KVM."""
    return make_guest()


@pytest.fixture
def both_guests(both_worlds):
    """A guest with interrupt controllers of the kernel's KVM, and one of ours."""
    pytest.importorskip("unicorn")
    real, ours = both_worlds
    worlds = RealWorld(real), OurWorld(ours)
    yield [Guest(world, irqchip=True) for world in worlds]
    for world in worlds:
        world.close()


@pytest.fixture
def on_hardware(world):
    """For rows in which a KVM without hardware virtualisation does something else."""
    if hasattr(world, "fds") and PVM.exists():
        pytest.skip("the machine's KVM has no hardware behind it")
