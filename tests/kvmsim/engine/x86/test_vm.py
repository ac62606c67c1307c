"""Execution in another thread, and memory that changes."""

import mmap
import threading

import pytest

from kvmsim.engine.base import BusLock, Executing, Hlt, InKernel, InternalError, Io, Mmio
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86 import stepping
from kvmsim.engine.x86.memory import Slot
from kvmsim.engine.x86.policy import PlainPolicy

CODE, DATA, STACK = 0x1000, 0x8000, 0x6000
HLT = "f4"
SPIN = "48 ff c0 eb fb"  # l: inc rax; jmp l
COUNT = "ff c9 75 fc f4"  # l: dec ecx; jnz l; hlt


@pytest.fixture
def aside(make_guest):
    """A guest that executes 1,000 bytes of code inline and the rest elsewhere."""
    return make_guest(inline_bytes=1000, paced=False)


def until_stop(vm, cpu):
    """Run a vCPU as an executor with one thread does."""
    while isinstance(stop := vm.run(cpu), Executing):
        stop.work()
    return stop


def test_short_way_to_a_stop_is_executed_inline(aside):
    aside.long("90", HLT)
    assert isinstance(aside.run(), Hlt)


def test_long_way_to_a_stop_is_executed_in_work(aside):
    aside.long(COUNT)
    aside.q[r.RCX] = 10_000
    stop = aside.run()
    assert type(stop) is Executing
    assert 9_000 < aside.q[r.RCX] < 10_000
    thread = threading.Thread(target=stop.work)
    thread.start()
    thread.join(10)
    assert isinstance(aside.run(), Hlt)
    assert (aside.q[r.RCX], aside.r.rip) == (0, CODE + 5)


def test_without_a_pace_no_stop_takes_time(aside):
    aside.long(COUNT)
    aside.q[r.RCX] = 100_000
    assert until_stop(aside.vm, aside.cpu).after_ns == 0
    assert aside.cpu.guest_ns > 0


def test_paced_guest_counts_what_it_executes_in_work(make_guest):
    times = []
    for inline_bytes in (None, 1000):
        guest = make_guest(inline_bytes=inline_bytes).long(COUNT)
        guest.q[r.RCX] = 100_000
        until_stop(guest.vm, guest.cpu)
        times.append(guest.cpu.guest_ns)
    assert times == [pytest.approx(400_000 // 12, rel=0.01)] * 2


def test_kick_ends_work(aside):
    stop = aside.long(SPIN).run()
    thread = threading.Thread(target=stop.work)
    thread.start()
    stop.kick()
    thread.join(10)
    assert not thread.is_alive()
    assert type(aside.run()) is Executing


def test_kick_before_work_begins_is_not_lost(aside):
    stop = aside.long(SPIN).run()
    before = aside.q[r.RAX]
    stop.kick()
    stop.work()
    assert aside.q[r.RAX] == before


def test_allowance_is_guest_time_after_which_the_guest_stops(make_guest):
    guest = make_guest().long(SPIN)
    stop = guest.vm.run(guest.cpu, 1000)
    assert type(stop) is InKernel
    assert 1000 <= stop.after_ns <= 1010


@pytest.mark.parametrize(
    ("code", "kind", "rip"),
    [
        ("e6 80 f4", Io, 5),
        ("f0 ff 07 f4", BusLock, 8),
        ("a3 00 00 10 00 00 00 00 00 f4", Mmio, 5),
        ("f4", Hlt, 6),
    ],
)
def test_stop_met_in_work_is_returned_by_the_next_run(aside, code, kind, rip):
    aside.long("ff c9 75 fc 90", code)  # l: dec ecx; jnz l; nop
    aside.q[r.RCX], aside.q[r.RDI] = 10_000, DATA + 62
    assert type(aside.run()) is Executing
    assert type(until_stop(aside.vm, aside.cpu)) is kind
    assert aside.r.rip == CODE + rip


def test_exceptions_of_the_guest_do_not_end_work(aside):
    # Handler: inc rbx; iretq behind the ud2.
    aside.long("0f 0b ff c9 75 fa f4").gate(6, 0x2000)  # l: ud2; dec ecx; jnz l; hlt
    aside.put(0x2000, "48 ff c3 48 83 04 24 02 48 cf")
    aside.q[r.RCX], aside.q[r.RBX] = 1000, 0
    stop = aside.run()
    assert type(stop) is Executing
    stop.work()
    assert isinstance(aside.run(), Hlt)
    assert aside.q[r.RBX] == 1000


@pytest.mark.parametrize("code", ["0f 21 f8", "0f 23 f8", "0f 01 d0", "0f 05", "c5 f9 6f c1"])
def test_instructions_kvm_has_no_part_in_do_not_end_work(aside, code):
    # mov rax, dr7; mov dr7, rax; xgetbv; syscall; vmovdqa xmm0, xmm1
    aside.long(code, "ff ce 75", f"{-len(bytes.fromhex(code)) - 4 & 0xFF:02x}", HLT)
    aside.put(0x2000, "ff e1")  # jmp rcx
    aside.r.set_msr(0xC0000081, 8 << 32)
    aside.r.set_msr(0xC0000082, 0x2000)
    aside.r.cr4 |= 1 << 18  # OSXSAVE
    aside.cpu.xcr0 = 7
    aside.q[r.RSI], aside.q[r.RAX], aside.q[r.RCX] = 1000, 0x400, 0
    stop = aside.run()
    assert type(stop) is Executing
    stop.work()
    assert isinstance(aside.run(), Hlt)
    assert aside.q[r.RSI] == 0


def test_vcpu_that_leaves_after_work_keeps_the_bus_lock_it_took(aside):
    aside.long("ff c9 75 fc", "f0 ff 07", HLT)
    aside.q[r.RCX], aside.q[r.RDI] = 10_000, DATA + 62
    stop = aside.run()
    stop.work()
    aside.vm.withdraw(aside.cpu)
    assert isinstance(aside.run(), BusLock)
    assert aside.word(DATA + 62) == 1


def test_vcpu_that_leaves_in_front_of_a_port_comes_back_to_it(aside):
    aside.long("ff c9 75 fc", "e6 80", HLT)
    aside.q[r.RCX] = 10_000
    aside.run().work()
    aside.vm.withdraw(aside.cpu)
    assert (aside.r.rip, aside.cpu.pending) == (CODE + 4, False)
    assert isinstance(aside.run(), Io)


def test_second_vcpu_waits_for_its_turn(aside):
    aside.long(SPIN)
    other = aside.vm.add_cpu()
    first = aside.run()
    waiting = aside.vm.run(other)
    assert type(waiting) is Executing
    waiting.work()
    assert other.registers.rip == 0xFFF0
    first.kick()
    first.work()
    assert type(aside.run()) is Executing


def test_two_vcpus_in_turns_lose_nothing(aside):
    aside.long("ff 07 ff c9 75 fa f4")  # l: inc dword [rdi]; dec ecx; jnz l; hlt
    other = aside.vm.add_cpu()
    other.saved[:] = aside.cpu.saved
    other.use_saved()
    cpus = [aside.cpu, other]
    for cpu in cpus:
        cpu.registers.q[r.RCX], cpu.registers.q[r.RDI] = 50_000, DATA
    turns = [(cpu, aside.vm.run(cpu)) for cpu in cpus]
    halted = 0
    while turns:
        cpu, stop = turns.pop(0)
        if isinstance(stop, Hlt):
            halted += 1
            continue
        stop.work()
        turns.append((cpu, aside.vm.run(cpu)))
    assert (halted, aside.word(DATA)) == (2, 100_000)


@pytest.mark.parametrize("fault_like", [False, True])
def test_kick_between_a_look_at_a_lock_and_the_lock_neither_loses_nor_adds_one(
    make_guest, monkeypatch, fault_like
):
    policy = PlainPolicy(fault_like=fault_like)
    guest = make_guest(policy, inline_bytes=0, paced=False)
    guest.long("f0 ff 07 ff c9 75 f9", HLT)  # l: lock inc dword [rdi]; dec ecx; jnz l; hlt
    guest.q[r.RCX], guest.q[r.RDI] = 20, DATA + 62
    classify, looks = guest.vm._operands.classify, []

    def kicking(*args, **kwargs):
        looks.append(args)
        guest.vm.kick(guest.cpu)
        return classify(*args, **kwargs)

    monkeypatch.setattr(guest.vm._operands, "classify", kicking)
    locks = 0
    while not isinstance(stop := until_stop(guest.vm, guest.cpu), Hlt):
        assert type(stop) is BusLock
        locks += 1
    assert len(looks) > 1
    assert (locks, guest.cpu.bus_locks, guest.word(DATA + 62)) == (20, 20, 20)


@pytest.mark.parametrize("offset", [0, 62], ids=["aligned", "split"])
@pytest.mark.parametrize("fault_like", [False, True], ids=["trap-like", "fault-like"])
def test_spin_lock_of_two_vcpus_survives_kicks_at_any_time(make_guest, fault_like, offset):
    guest = make_guest(PlainPolicy(fault_like=fault_like), inline_bytes=0, paced=False)
    # l: mov eax, 1; xchg [rdi], eax; test eax, eax; jnz l; inc dword [rsi]; mov dword [rdi], 0
    # dec ecx; jnz l; hlt
    guest.long("b8 01 00 00 00 87 07 85 c0 75 f5 ff 06 c7 07 00 00 00 00 ff c9 75 e9 f4")
    other = guest.vm.add_cpu()
    other.saved[:] = guest.cpu.saved
    other.use_saved()
    cpus = [guest.cpu, other]
    for cpu in cpus:
        q = cpu.registers.q
        q[r.RCX], q[r.RDI], q[r.RSI] = 1500, DATA + offset, DATA + 256
    ended = threading.Event()
    kicker = threading.Thread(target=lambda: kick_until(ended, guest.vm, cpus))
    kicker.start()
    try:
        kinds = {type(stop) for stop in stops_in_turns(guest.vm, cpus)}
    finally:
        ended.set()
        kicker.join()
    assert kinds == ({BusLock, Hlt} if offset else {Hlt})
    assert guest.word(DATA + 256) == 3000


@pytest.fixture
def kicked_alone(aside, monkeypatch):
    """A kick comes in front of each instruction that is executed alone."""
    single = stepping.single

    def kicked(*args, **kwargs):
        aside.vm.meter.kick()
        return single(*args, **kwargs)

    monkeypatch.setattr(stepping, "single", kicked)


@pytest.mark.usefixtures("kicked_alone")
def test_kick_in_front_of_an_access_to_a_device_does_not_repeat_it(aside):
    aside.long("8b 07 48 ff c0", HLT)  # mov eax, [rdi]; inc rax; hlt
    aside.q[r.RDI] = 0x100000
    assert isinstance(until_stop(aside.vm, aside.cpu), Mmio)
    aside.cpu.complete(b"\x41\0\0\0")
    assert isinstance(until_stop(aside.vm, aside.cpu), Hlt)
    assert aside.q[r.RAX] == 0x42


@pytest.mark.usefixtures("kicked_alone")
def test_kick_in_front_of_iret_leaves_nmis_masked_until_it_is_done(aside):
    aside.long("48 cf")  # iretq
    for at, word in enumerate((0x2000, 8, 2, STACK, 0x10)):
        aside.set_word(STACK + 8 * at, word)
    aside.put(0x2000, HLT)
    aside.cpu.nmi_masked = True
    while type(until_stop(aside.vm, aside.cpu)) is InKernel:
        assert aside.cpu.nmi_masked == (aside.r.rip == CODE)
    assert (aside.r.rip, aside.cpu.nmi_masked) == (0x2001, False)


def test_stop_without_a_reason_is_passed_over(guest, monkeypatch):
    go_on, ends = guest.vm.watch._go_on, [0]
    monkeypatch.setattr(guest.vm.watch, "_go_on", lambda: ends.pop() if ends else go_on())
    assert isinstance(guest.long("90", HLT).run(), Hlt)


@pytest.mark.parametrize("status", [0, 1])
def test_instruction_in_front_of_which_the_emulator_always_stops_is_an_error(
    guest, monkeypatch, status
):
    monkeypatch.setattr(guest.vm.watch, "_go_on", lambda: status)
    stop = guest.long("90", HLT).run()
    assert (type(stop), stop.suberror, stop.data) == (InternalError, 1, (0, status, CODE))


def kick_until(ended, vm, cpus):
    """Kick vCPUs all the time, at different intervals."""
    count = 0
    while not ended.is_set():
        vm.kick(cpus[count % 2])
        count += 1
        ended.wait((count % 7) * 2e-5)


def stops_in_turns(vm, cpus):
    """Stops of vCPUs that execute in turns until all of them have halted."""
    turns = [(cpu, vm.run(cpu)) for cpu in cpus]
    while turns:
        cpu, stop = turns.pop(0)
        if isinstance(stop, Executing):
            stop.work()
        else:
            yield stop
        if not isinstance(stop, Hlt):
            turns.append((cpu, vm.run(cpu)))


@pytest.mark.parametrize("answer", ["in", "out", "ins"])
def test_instruction_is_completed_on_its_own_vcpu_while_another_one_executes(aside, answer):
    aside.long({"in": "e4 80", "out": "e6 80", "ins": "6c"}[answer], HLT)  # in, out, insb
    aside.q[r.RDI] = DATA
    other = aside.vm.add_cpu()
    other.saved[:] = aside.cpu.saved
    other.registers.rip = 0x2000
    aside.put(0x2000, SPIN)
    assert isinstance(aside.run(), Io)
    spinning = aside.vm.run(other)
    spinning.kick()
    spinning.work()
    before = other.registers.rip
    aside.cpu.complete(b"\x5a")
    assert other.registers.rip == before
    assert aside.r.rip == CODE + (1 if answer == "ins" else 2)


def test_memory_that_comes_and_goes_is_seen_by_the_guest(guest):
    guest.long("a0 00 00 10 00 00 00 00 00", HLT)  # mov al, [0x100000]
    more = mmap.mmap(-1, 0x1000)
    more[0] = 0x77
    guest.set_word(0x10000 + 3 * 4096 + 0x100 * 8, 0x100007)
    slots = list(guest.vm.memory.slots)
    assert isinstance(guest.run(), Mmio)
    guest.cpu.abandon()
    guest.vm.set_slots([*slots, Slot(0x100000, memoryview(more))])
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] & 0xFF == 0x77
    guest.vm.set_slots(slots)
    guest.r.rip = CODE
    assert isinstance(guest.run(), Mmio)


def test_code_of_memory_that_was_replaced_is_forgotten(guest):
    guest.long("b0 01", HLT)
    guest.run()
    other = mmap.mmap(-1, len(guest.ram))
    other[:] = guest.ram[:]
    other[CODE + 1] = 2
    guest.vm.set_slots([Slot(0, memoryview(other))])
    guest.r.rip = CODE
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] & 0xFF == 2


def test_slot_that_becomes_read_only_sends_writes_out(guest):
    guest.long("88 07", HLT)  # mov [rdi], al
    guest.q[r.RDI] = DATA
    slot = guest.vm.memory.slots[0]
    guest.vm.set_slots([Slot(0, slot.memory, read_only=True)])
    stop = guest.run()
    assert isinstance(stop, Mmio)
    assert stop.gpa == DATA


def test_vcpus_that_execute_nothing_inline_execute_in_their_turns(make_guest):
    guest = make_guest(inline_bytes=0, paced=False).long(COUNT)
    other = guest.vm.add_cpu()
    other.saved[:] = guest.cpu.saved
    other.use_saved()
    cpus = [guest.cpu, other]
    for cpu in cpus:
        cpu.registers.q[r.RCX] = 1000
    turns = [(cpu, guest.vm.run(cpu)) for cpu in cpus]
    for _ in range(4):  # the second one waits for its turn first
        cpu, stop = turns.pop(0)
        if isinstance(stop, Executing):
            stop.work()
            stop = guest.vm.run(cpu)
        turns.append((cpu, stop))
    assert [type(stop) for _, stop in turns] == [Hlt, Hlt]


def test_vm_that_lost_its_emulator_goes_on_where_it_was(guest):
    guest.long("e6 80", "f0 ff 07", "48 ff c3", HLT)
    guest.q[r.RDI], guest.q[r.RBX] = DATA + 62, 0
    assert isinstance(guest.run(), Io)
    guest.vm.close()
    assert not guest.vm.awake
    guest.cpu.complete()
    assert isinstance(guest.run(), BusLock)
    guest.vm.close()
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RBX], guest.word(DATA + 62)) == (1, 1)


def test_memory_of_a_vm_without_an_emulator_is_shown_to_the_next(guest):
    guest.long("8a 07", HLT)
    guest.q[r.RDI] = DATA
    other = mmap.mmap(-1, len(guest.ram))
    other[:] = guest.ram[:]
    other[DATA] = 0x77
    guest.vm.close()
    guest.vm.set_slots([Slot(0, memoryview(other))])
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] & 0xFF == 0x77


def test_vm_that_ran_longest_ago_loses_its_emulator_first(make_guest, monkeypatch):
    from kvmsim.engine.x86 import vm

    monkeypatch.setattr(vm, "AWAKE", vm.Awake(2))
    first, second = make_guest().long(HLT), make_guest().long(HLT)
    first.run()
    second.run()
    first.r.rip = CODE
    first.run()
    make_guest()
    assert (first.vm.awake, second.vm.awake) == (True, False)


def test_vm_that_executes_keeps_its_emulator(make_guest, monkeypatch):
    from kvmsim.engine.x86 import vm

    monkeypatch.setattr(vm, "AWAKE", vm.Awake(1))
    busy = make_guest(inline_bytes=0, paced=False).long(SPIN)
    assert isinstance(busy.run(), Executing)
    make_guest()
    assert busy.vm.awake


@pytest.mark.parametrize(("mib", "room_mib"), [(1, 4), (64, 16), (1024, 64)])
def test_room_for_translated_code_goes_with_the_memory(guest, monkeypatch, mib, room_mib):
    from kvmsim.engine.x86 import vm as module

    rooms = []
    emulator = module.Unicorn
    monkeypatch.setattr(module, "Unicorn", lambda room: rooms.append(room) or emulator(1 << 20))
    slots = [Slot(0, memoryview(mmap.mmap(-1, mib << 20)))]
    module.X86Vm(slots, guest.policy).close()
    assert rooms == [room_mib << 20]


def test_vm_whose_memory_cannot_be_shown_leaves_no_emulator_behind(guest):
    from kvmsim.engine.x86 import vm as module
    from kvmsim.engine.x86.backend import BackendError

    before = set(module.AWAKE._vms)
    with pytest.raises(BackendError):
        module.X86Vm([Slot(0x123, memoryview(mmap.mmap(-1, 4096)))], guest.policy)
    assert set(module.AWAKE._vms) == before


def test_vm_that_is_closed_lets_go_of_memory_it_has_no_more(guest):
    guest.long("f0 ff 07", HLT)
    guest.q[r.RDI] = DATA + 62
    assert isinstance(guest.run(), BusLock)
    guest.vm.close()
    guest.vm.set_slots([])
    guest.ram.close()  # BufferError, were it in use
    assert guest.ram.closed


PAUSES = "f3 90 eb fc"  # l: pause; jmp l


def test_guest_that_pauses_lets_another_vcpu_of_its_own_execute(aside):
    aside.long(PAUSES)
    stop = aside.run()
    aside.vm.run(aside.vm.add_cpu())
    stop.work()
    assert type(aside.run()) is InKernel
    assert aside.r.rip == CODE + 2
    stop = aside.run()
    assert type(stop) is Executing
    assert stop.yields


def test_guest_that_pauses_alone_goes_on(aside):
    aside.long(PAUSES, HLT)
    stop = aside.run()
    stop.work()
    assert not aside.cpu.yields
