"""Guests with interrupt controllers in the kernel: timers and IPIs, in virtual time."""

import heapq
import mmap
from errno import EAGAIN

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import KVM_REGS
from kvmsim.errors import KvmError
from kvmsim.kvm import cpuid, events, lapic, sregs
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.run import Halted

pytest.importorskip("unicorn")

CODE, HANDLER, AP, STACK, TABLES, IDT, GDT = 0x1000, 0x2000, 0x3000, 0x8000, 0x10000, 0x4000, 0x5000
COUNTER = 0x700
HLT, STI, CLI, IRET, IRETQ = "f4", "fb", "fa", "cf", "48 cf"
DONE_PORT = 0xF4
DONE = "e6 f4"  # out 0xf4, al
HALT_FOR_EVER = "f4 eb fd"
MS = 1_000_000


def out(port, value):
    """mov al, value; out port, al."""
    return f"b0 {value:02x} e6 {port:02x}"


def wrmsr(index, low, high=0):
    """64-bit mode."""
    numbers = ((0xB9, index), (0xB8, low), (0xBA, high))
    return (
        "".join(f"{op:02x}" + value.to_bytes(4, "little").hex() for op, value in numbers) + "0f30"
    )


def store(address, value):
    """64-bit mode: mov dword [address], value, by way of RDI."""
    return f"bf{address.to_bytes(4, 'little').hex()}c707{value.to_bytes(4, 'little').hex()}"


class Board:
    """vCPUs with local APICs, IOAPIC, PICs and interval timer."""

    def __init__(self, vm, nr_vcpus):
        from kvmsim.engine.x86.memory import Slot
        from kvmsim.kvm.x86.guest import attach

        self.vm = vm
        vm.create_irqchip()
        vm.ioctl(ioctls.KVM_CREATE_PIT2, bytearray(b"\1" + bytes(63)))
        self.vcpus = [vm.create_vcpu(number) for number in range(nr_vcpus)]
        self.ram = mmap.mmap(-1, 0x40000)
        self.engine = attach(vm, self.vcpus, [Slot(0, memoryview(self.ram))])
        entries = b"".join(entry.pack() for entry in cpuid.supported(vm.machine))
        for vcpu in self.vcpus:
            cpuid.set_table(vcpu, entries)
        self.now_ns = 0
        self.done = []
        self._queue = []

    def put(self, at, *code):
        data = bytes.fromhex("".join(code))
        self.ram[at : at + len(data)] = data

    def word(self, at, size=4):
        return int.from_bytes(self.ram[at : at + size], "little")

    def real(self, vcpu, at=CODE):
        """Start in real mode."""
        special = sregs.of(vcpu)
        special.put("cs.selector", 0)
        special.put("cs.base", 0)
        self._regs(vcpu, rip=at, rsp=STACK)

    def long(self, vcpu, at=CODE):
        """Start in 64-bit mode, everything below 4 GiB mapped one to one by pages of 1 GiB."""
        self._entry(TABLES, TABLES + 4096 | 7)
        for gib in range(4):
            self._entry(TABLES + 4096 + 8 * gib, gib << 30 | 0x83)
        put = sregs.of(vcpu).put
        for name in ("cs", "ds", "es", "ss"):
            code = name == "cs"
            parts = {"selector": 8 if code else 16, "limit": 0xFFFFFFFF, "type": 11 if code else 3}
            parts |= {"base": 0, "s": 1, "present": 1, "g": 1, "l": int(code), "db": int(not code)}
            for part, value in parts.items():
                put(f"{name}.{part}", value)
        self._entry(GDT + 8, 0x00AF9B000000FFFF)
        self._entry(GDT + 16, 0x00CF93000000FFFF)
        for name, base, limit in (("gdt", GDT, 0x17), ("idt", IDT, 0xFFF)):
            put(f"{name}.base", base)
            put(f"{name}.limit", limit)
        for name, value in {"cr0": 0x80010011, "cr3": TABLES, "cr4": 0x620, "efer": 0xD01}.items():
            put(name, value)
        self._regs(vcpu, rip=at, rsp=STACK + 0x400 * vcpu.id)

    def gate(self, vector, at=HANDLER):
        """A handler in 64-bit mode."""
        self._entry(IDT + vector * 16, at & 0xFFFF | 8 << 16 | 0x8E00 << 32)
        self._entry(IDT + vector * 16 + 8, 0)

    def _entry(self, at, value):
        self.ram[at : at + 8] = value.to_bytes(8, "little")

    def _regs(self, vcpu, **values):
        data = bytearray(vcpu.get_regs())
        for name, value in values.items():
            KVM_REGS.put(data, name, value)
        vcpu.set_regs(bytes(data))

    def run(self, until_ns):
        """Let all vCPUs run, each at its own times, until then or until one writes DONE_PORT."""
        for vcpu in self.vcpus:
            vcpu.on_wake = self._woken
            if vcpu.phase == 0:
                self._go(vcpu, vcpu.kvm_run)
        while self._queue and not self.done:
            if self._queue[0][0] > until_ns:
                break
            due_ns, _, vcpu = heapq.heappop(self._queue)
            if vcpu.data != due_ns:
                continue
            self.now_ns = max(self.now_ns, due_ns)
            if vcpu.phase == 2:
                vcpu.wake(self.now_ns)
            self._go(vcpu, vcpu.resume)
        self.now_ns = max(self.now_ns, until_ns)
        return self

    def _woken(self, vcpu, now_ns):
        self._at(vcpu, now_ns)

    def _at(self, vcpu, due_ns):
        vcpu.data = due_ns
        if due_ns is not None:
            heapq.heappush(self._queue, (due_ns, vcpu.id, vcpu))

    def _go(self, vcpu, call):
        while True:
            try:
                blocked = call(self.now_ns)
            except KvmError as error:
                assert error.errno == EAGAIN
                call = vcpu.kvm_run
                continue
            if blocked is not None:
                break
            self._exit(vcpu)
            if self.done:
                return
            call = vcpu.kvm_run
        if isinstance(blocked, Halted):
            after_ns = blocked.wake_after_ns
            self._at(vcpu, None if after_ns is None else self.now_ns + after_ns)
        else:
            self._at(vcpu, self.now_ns + blocked.guest_ns)

    def _exit(self, vcpu):
        assert vcpu.run.exit_reason == Exit.IO, Exit(vcpu.run.exit_reason)
        assert vcpu.run.io[2] == DONE_PORT
        self.done.append(vcpu.id)


@pytest.fixture
def board(kvm):
    made = []

    def make(nr_vcpus=1, preset='vendor = "intel"\n'):
        made.append(Board(kvm(preset).create_vm(0, LocalClient(1)), nr_vcpus))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


PIC_INIT = (
    out(0x20, 0x11),
    out(0x21, 0x08),
    out(0x21, 0x04),
    out(0x21, 0x01),
    out(0x21, 0xFE),
)


def pit(command, count):
    return out(0x43, command) + out(0x40, count & 0xFF) + out(0x40, count >> 8)


def ticking(board, command=0x34, count=1193):
    one = board()
    one.real(one.vcpus[0])
    one.put(8 * 4, HANDLER.to_bytes(2, "little").hex(), "0000")
    one.put(CODE, *PIC_INIT, pit(command, count), STI, HALT_FOR_EVER)
    one.put(HANDLER, "ff 06 00 07", out(0x20, 0x20), IRET)
    return one


def test_real_mode_guest_counts_ticks_of_the_interval_timer(board):
    one = ticking(board).run(100 * MS)
    assert one.word(COUNTER) in {99, 100}


def test_ticks_do_not_drift(board):
    one = ticking(board).run(3000 * MS)
    # 1193182 Hz / 1193 is 1000.15 Hz.
    assert one.word(COUNTER) in {2999, 3000}


def test_one_shot_ticks_once(board):
    one = ticking(board, command=0x30).run(100 * MS)
    assert one.word(COUNTER) == 1


def test_ticks_the_guest_did_not_take_are_made_up_for(board):
    one = board()
    one.real(one.vcpus[0])
    one.put(8 * 4, HANDLER.to_bytes(2, "little").hex(), "0000")
    # Interrupts off for some 14 ms of virtual time: a loop of 10 million instructions.
    wait = "66 b9 80 96 98 00 66 49 75 fc"
    one.put(CODE, *PIC_INIT, pit(0x34, 1193), wait, STI, HALT_FOR_EVER)
    one.put(HANDLER, "ff 06 00 07", out(0x20, 0x20), IRET)
    one.run(60 * MS)
    assert one.word(COUNTER) in range(58, 61)


X2APIC_ON = wrmsr(0x1B, 0xFEE00D00) + wrmsr(0x80F, 0x1FF)
EOI_X2APIC = "51 52 50" + wrmsr(0x80B, 0) + "58 5a 59"
COUNT = "ff 04 25 00 07 00 00"  # inc dword [0x700]


def long_guest(board, *code, handler=COUNT + EOI_X2APIC + IRETQ, vector=0x40):
    one = board()
    one.long(one.vcpus[0])
    one.gate(vector)
    one.put(HANDLER, handler)
    one.put(CODE, *code)
    return one


def test_periodic_timer_of_an_x2apic(board):
    # A divisor of 1, and 1 ms of the bus.
    timer = wrmsr(0x83E, 0xB) + wrmsr(0x832, 1 << 17 | 0x40) + wrmsr(0x838, 1_000_000)
    one = long_guest(board, X2APIC_ON, timer, STI, HALT_FOR_EVER).run(1000 * MS)
    assert one.word(COUNTER) in {999, 1000}
    assert lapic.of(one.vcpus[0]).isr == 0


def test_one_shot_timer_by_memory(board):
    apic = 0xFEE00000
    timer = (
        store(apic + 0xF0, 0x1FF)
        + store(apic + 0x3E0, 0xB)
        + store(apic + 0x320, 0x40)
        + store(apic + 0x380, 5_000_000)
    )
    eoi = "57" + store(apic + 0xB0, 0) + "5f"
    one = long_guest(board, timer, STI, HALT_FOR_EVER, handler=COUNT + eoi + IRETQ)
    one.run(4_999_000)
    assert one.word(COUNTER) == 0
    one.run(20 * MS)
    assert one.word(COUNTER) == 1


def test_deadline_timer(board):
    # rdtsc; add eax, 3,000,000 (1 ms at 3 GHz); the counter starts near 0, so EDX stays.
    khz = 3_000_000
    arm = "0f 31 05" + khz.to_bytes(4, "little").hex() + "b9 e0 06 00 00 0f 30"
    one = long_guest(board, X2APIC_ON, wrmsr(0x832, 2 << 17 | 0x40), arm, STI, HALT_FOR_EVER)
    before_ns = one.vm.machine.preset.tsc_khz
    one.run(khz * MS // before_ns - 10_000)
    assert one.word(COUNTER) == 0
    one.run(20 * MS)
    assert one.word(COUNTER) == 1


def test_interrupt_that_waits_comes_when_the_task_priority_falls(board):
    # CR8 = 15, self-IPI of vector 0x40, STI, nops; then CR8 = 0.
    mov_cr8 = "44 0f 22 c0"  # mov cr8, rax
    one = long_guest(
        board,
        X2APIC_ON,
        "b8 0f 00 00 00" + mov_cr8,
        wrmsr(0x83F, 0x40),
        STI,
        "90 8b 1c 25 00 07 00 00",  # mov ebx, [0x700]
        "31 c0" + mov_cr8,
        "90" + DONE,
    )
    one.run(MS)
    assert one.done == [0]
    assert KVM_REGS.get(one.vcpus[0].get_regs(), "rbx") == 0
    assert one.word(COUNTER) == 1


@pytest.mark.parametrize("window", ["fb 90 fa", "e8 02 00 00 00 eb 02 fb c3 fa"])
def test_guest_that_keeps_interrupts_on_for_two_instructions_takes_one(board, window):
    # Self-IPI; then for ever: STI, one instruction, CLI.
    one = long_guest(
        board,
        X2APIC_ON,
        wrmsr(0x83F, 0x40),
        window + f"eb {256 - 2 - len(bytes.fromhex(window)):02x}",
    )
    one.engine.slice_bytes = 24_000
    one.run(MS // 50)
    assert one.word(COUNTER) == 1


def test_vectors_come_by_priority(board):
    # Self-IPIs 0x41, 0x72, 0x55 with interrupts off; the handlers note their order.
    order = {0x41: HANDLER, 0x55: HANDLER + 0x80, 0x72: HANDLER + 0x100}
    one = board()
    one.long(one.vcpus[0])
    for vector, at in order.items():
        one.gate(vector, at)
        # movzx edi, byte [0x700]; mov byte [rdi+0x710], vector; inc byte [0x700]
        note = f"0f b6 3c 25 00 07 00 00 c6 87 10 07 00 00 {vector:02x} fe 04 25 00 07 00 00"
        one.put(at, note, EOI_X2APIC, IRETQ)
    ipis = "".join(wrmsr(0x83F, vector) for vector in order)
    one.put(CODE, X2APIC_ON, ipis, STI, "90 90 90" + DONE)
    one.run(MS)
    assert bytes(one.ram[0x710:0x713]) == bytes([0x72, 0x55, 0x41])
    assert events.of(one.vcpus[0]).nr_interrupts == 3


def test_ipi_wakes_the_other_vcpu(board):
    one = board(2)
    for vcpu in one.vcpus:
        one.long(vcpu, CODE if vcpu.id == 0 else AP)
        vcpu.set_mp_state(0)
    one.gate(0x40)
    one.put(HANDLER, COUNT, EOI_X2APIC, IRETQ)
    # The first waits a while, sends an IPI, waits for the count and is done.
    wait = "b9 00 00 10 00 ff c9 75 fc"
    spin = "83 3c 25 00 07 00 00 00 74 f6"  # cmp dword [0x700], 0; je .
    one.put(CODE, X2APIC_ON, wait, wrmsr(0x830, 0x40, 1), spin, DONE)
    one.put(AP, X2APIC_ON, STI, HALT_FOR_EVER)
    one.run(100 * MS)
    assert one.done == [0]
    assert lapic.of(one.vcpus[1]).isr == 0


def test_boot_processor_starts_another_by_init_and_sipi(board):
    one = board(2)
    boot, other = one.vcpus
    one.long(boot)
    # INIT, then SIPI with vector 3: real mode at 0x3000.
    icr = lambda value: store(0xFEE00310, 1 << 24) + store(0xFEE00300, value)  # noqa: E731
    spin = "83 3c 25 00 07 00 00 00 74 f6"
    one.put(CODE, store(0xFEE000F0, 0x1FF), icr(0x4500), icr(0x4603), icr(0x4603), spin, DONE)
    one.put(AP, "31 c0 8e d8 c7 06 00 07 34 12", HALT_FOR_EVER)  # mov word [0x700], 0x1234
    assert other.mp_state == 1
    one.run(100 * MS)
    assert one.done == [0]
    assert one.word(COUNTER) == 0x1234
    assert other.mp_state == 3


def test_init_takes_a_running_processor_back_to_its_wait(board):
    one = board(2)
    boot, other = one.vcpus
    one.long(boot)
    one.long(other, AP)
    other.set_mp_state(0)
    wait = "b9 00 00 80 00 ff c9 75 fc"  # some 3 ms
    icr = store(0xFEE00310, 1 << 24) + store(0xFEE00300, 0x4500)
    one.put(CODE, store(0xFEE000F0, 0x1FF), wait, icr, wait, DONE)
    one.put(AP, "ff 04 25 00 07 00 00 eb f7")  # counts for ever
    one.run(100 * MS)
    assert one.done == [0]
    assert one.word(COUNTER) > 0
    assert other.mp_state == 2
    assert (other.rip, sregs.of(other).get("cr0")) == (0xFFF0, 0x60000010)


def test_level_triggered_line_comes_again_until_it_falls(board):
    one = board()
    one.long(one.vcpus[0])
    one.gate(0x40)
    one.put(HANDLER, COUNT, EOI_X2APIC, IRETQ)
    # IOAPIC pin 20: level, vector 0x40, to APIC 0; then wait.
    window = store(0xFEC00000, 0x38) + store(0xFEC00010, 0x8040)
    window += store(0xFEC00000, 0x39) + store(0xFEC00010, 0)
    one.put(CODE, X2APIC_ON, window, STI, HALT_FOR_EVER)
    one.run(MS)
    line = ioctls.KVM_IRQ_LINE
    one.vm.ioctl(line, bytearray([20, 0, 0, 0, 1, 0, 0, 0]), now_ns=one.now_ns)
    one.run(MS + MS // 10)
    assert one.word(COUNTER) > 3
    one.vm.ioctl(line, bytearray([20, 0, 0, 0, 0, 0, 0, 0]), now_ns=one.now_ns)
    one.run(2 * MS)
    before = one.word(COUNTER)
    one.run(3 * MS)
    assert one.word(COUNTER) == before


KICK_CPU, SEND_IPI = 5, 10


def hypercall(number, *arguments):
    """64-bit mode, Intel: EBX, ECX, EDX, ESI as given."""
    loads = zip((0xB8, 0xBB, 0xB9, 0xBA, 0xBE), (number, *arguments), strict=False)
    return (
        "".join(f"{op:02x}" + value.to_bytes(4, "little").hex() for op, value in loads) + "0f01c1"
    )


def test_hypercall_ends_a_halt_with_interrupts_off(board):
    one = board(2)
    for vcpu in one.vcpus:
        one.long(vcpu, CODE if vcpu.id == 0 else AP)
        vcpu.set_mp_state(0)
    wait = "b9 00 00 10 00 ff c9 75 fc"
    one.put(CODE, wait, hypercall(KICK_CPU, 0, 1), HALT_FOR_EVER)
    one.put(AP, CLI, HLT, DONE)
    one.run(100 * MS)
    assert one.done == [1]


def test_kick_before_the_halt_is_not_lost(board):
    one = board()
    one.long(one.vcpus[0])
    one.put(CODE, hypercall(KICK_CPU, 0, 0), HLT, DONE)
    one.run(MS)
    assert one.done == [0]


def test_hypercall_sends_an_interrupt_to_many(board):
    one = board(3)
    for vcpu in one.vcpus:
        one.long(vcpu, CODE if vcpu.id == 0 else AP)
        vcpu.set_mp_state(0)
    one.gate(0x40)
    one.put(HANDLER, COUNT, EOI_X2APIC, IRETQ)
    wait = "b9 00 00 80 00 ff c9 75 fc"
    spin = "83 3c 25 00 07 00 00 02 75 f6"  # until both have counted
    one.put(CODE, X2APIC_ON, wait, hypercall(SEND_IPI, 0b11, 0, 1, 0x40), "89 c5", spin, DONE)
    one.put(AP, X2APIC_ON, STI, HALT_FOR_EVER)
    one.run(200 * MS)
    assert one.done == [0]
    assert KVM_REGS.get(one.vcpus[0].get_regs(), "rbp") == 2


def test_window_is_no_exit_where_the_pics_are_in_the_kernel(board):
    one = board()
    one.real(one.vcpus[0])
    one.vcpus[0].run.request_interrupt_window = 1
    one.put(CODE, STI, "90 90", DONE)
    one.run(MS)
    assert one.done == [0]
