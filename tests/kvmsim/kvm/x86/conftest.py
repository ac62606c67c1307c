"""Guests of a few instructions in 64-bit mode, driven as a VMM drives them."""

import mmap

import pytest

from kvmsim.abi.structs import KVM_REGS
from kvmsim.kvm import cpuid, debug, debugctl, sregs
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.vm import KvmEnableCap

CODE, DATA, STACK, IDT, TABLES = 0x1000, 0x8000, 0x6000, 0x4000, 0x10000
HANDLER = 0x2000
PID = 4194304


class Guest:
    """A vCPU in 64-bit mode with its first 2 MiB mapped one to one."""

    def __init__(self, vm, *code, ring=0, exits=True):
        from kvmsim.engine.x86.memory import Slot
        from kvmsim.kvm.x86.guest import attach

        self.ram = mmap.mmap(-1, 0x40000)
        self.vm = vm
        if exits:
            vm.enable_cap(KvmEnableCap(cap=193, args=(2, 0, 0, 0)))
        self.vcpu = vm.create_vcpu(0)
        self.engine = attach(vm, [self.vcpu], [Slot(0, memoryview(self.ram))])
        self.put(CODE, *code)
        for level in range(3):
            self.word(TABLES + level * 4096, TABLES + (level + 1) * 4096 | 7)
        for page in range(512):
            self.word(TABLES + 3 * 4096 + page * 8, page * 4096 | 7)
        self.word(0x3008, 0x00AF9B000000FFFF)
        self.word(0x3010, 0x00CF93000000FFFF)
        self.word(0x3018, 0x00AFFB000000FFFF)
        self.word(0x3020, 0x00CFF3000000FFFF)
        self.word(0x5004, STACK - 0x400)
        self._special(ring)
        self.set_regs(rip=CODE, rsp=STACK, rdi=DATA + 62, rflags=2)

    def _special(self, ring):
        put = sregs.of(self.vcpu).put
        for name in ("cs", "ds", "es", "ss", "fs", "gs"):
            code = name == "cs"
            for part, value in {
                "selector": (0x18 if code else 0x20) | ring if ring else 8 if code else 0x10,
                "base": 0,
                "limit": 0xFFFFFFFF,
                "type": 11 if code else 3,
                "s": 1,
                "present": 1,
                "dpl": ring,
                "g": 1,
                "l": int(code),
                "db": int(not code),
            }.items():
                put(f"{name}.{part}", value)
        for part, value in {"base": 0x5000, "limit": 0x67, "type": 11, "present": 1}.items():
            put(f"tr.{part}", value)
        for name, base, limit in (("gdt", 0x3000, 0x3F), ("idt", IDT, 0xFFF)):
            put(f"{name}.base", base)
            put(f"{name}.limit", limit)
        for name, value in {"cr0": 0x80010011, "cr3": TABLES, "cr4": 0x620, "efer": 0xD01}.items():
            put(name, value)

    def put(self, at, *lines):
        code = bytes.fromhex("".join(lines))
        self.ram[at : at + len(code)] = code

    def word(self, at, value):
        self.ram[at : at + 8] = value.to_bytes(8, "little")

    def regs(self, name):
        return KVM_REGS.get(self.vcpu.get_regs(), name)

    def set_regs(self, **values):
        data = bytearray(self.vcpu.get_regs())
        for name, value in values.items():
            KVM_REGS.put(data, name, value)
        self.vcpu.set_regs(bytes(data))

    def offer_everything(self):
        """The CPUID its machine supports."""
        entries = cpuid.supported(self.vm.machine)
        cpuid.set_table(self.vcpu, b"".join(entry.pack() for entry in entries))
        return self

    def gate(self, vector, *code, at=HANDLER, dpl=0):
        """A handler in ring 0."""
        rights = 0x8E00 | dpl << 13
        self.word(IDT + vector * 16, at | 8 << 16 | rights << 32)
        self.put(at, *code)
        return self

    def set_debugctl(self, value):
        assert debugctl.write(self.vcpu, value, host_initiated=True)
        return self

    @property
    def debug(self):
        return debug.of(self.vcpu)

    def word_at(self, at, size=8):
        return int.from_bytes(self.ram[at : at + size], "little")

    def run(self):
        blocked = self.vcpu.kvm_run(0)
        while blocked is not None:
            blocked = self.vcpu.resume(0)
        return self.vcpu.run.exit_reason


@pytest.fixture
def start(kvm):
    made = []

    def begin(preset, *code, irqchip=False, **options):
        vm = kvm(preset).create_vm(0, LocalClient(PID))
        if irqchip:
            vm.create_irqchip()
        made.append(Guest(vm, *code, **options))
        return made[-1]

    yield begin
    for guest in made:
        guest.engine.close()
